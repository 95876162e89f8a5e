"""`tessera sample`: images from a pipeline, as PNGs, one NPZ or a grid."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer
from rich.console import Console
from rich.table import Column

from tessera.cli.completing import offer_sampling
from tessera.cli.parts import OwnParts, import_parts
from tessera.cli.tables import make_table
from tessera.errors import TesseraError
from tessera.files import check_folder_name, check_free

if TYPE_CHECKING:
    from tessera.pipelines.base import Pipeline
    from tessera.pipelines.generate import Job, JobSummary
    from tessera.sampling.output import Trajectory

Format = StrEnum("Format", ["png", "npz", "grid"])
Precision = StrEnum("Precision", ["auto", "fp32", "bf16"])
_SUFFIXES = {"npz": ".npz", "grid": ".png"}  # of the formats that are one file

_KEYS = typer.Argument(
    None,
    metavar="KEY=VALUE",
    help="What belongs to this model's sampler, network or canvas; see --options.",
    autocompletion=offer_sampling,
)
_CLASS = typer.Option(
    None,
    "--class",
    metavar="CLASS",
    help="Index or name; 'balanced' takes turns, 'none' is no class. (default: random)",
)
_GUIDE = typer.Option(
    None,
    metavar="PIPELINE",
    help="Guide by this weaker model instead of by the model without class.",
)
_FORMAT = typer.Option(
    None,
    "--format",
    help="One PNG per seed, one NPZ, or one picture. (default: by the suffix of --out)",
)


def sample(
    pipeline: str = typer.Argument(help="Pipeline folder, run folder, or Hugging Face id."),
    overrides: list[str] = _KEYS,
    options: bool = typer.Option(
        False, "--options", help="Print every KEY that this model takes, and make nothing."
    ),
    seeds: str = typer.Option("0-63", help="One image for each seed, like 0-63,100."),
    out: Path = typer.Option(Path("samples"), help="Folder; or a file .npz or .png (a grid)."),
    labels: str | None = _CLASS,
    steps: str | None = typer.Option(None, help="Number of steps. (default: the recipe's)"),
    guidance: float | None = typer.Option(None, help="Weight of guidance. (default: 1, none)"),
    guide: str | None = _GUIDE,
    start_from: Path | None = typer.Option(
        None,
        help="Pictures that a model starts from (folder, archive or NPZ); seed s takes s mod N.",
    ),
    batch: int = typer.Option(64, min=1, help="Most images at once on one device."),
    output: Format | None = _FORMAT,
    overwrite: bool = typer.Option(
        False, "--overwrite", help="Replace an NPZ, a grid or an animation of the same name."
    ),
    subdirs: bool = typer.Option(False, "--subdirs", help="A sub-folder for each 1,000 seeds."),
    grid: bool = typer.Option(False, "--grid", help="A grid beside the folder of PNGs, too."),
    trajectory: Path | None = typer.Option(
        None, help="Animate the first 16 images' denoising, as .gif or .webp."
    ),
    ema: str | None = typer.Option(None, help="Average of the weights, by its half-life."),
    vae: str | None = typer.Option(
        None, help="Folder or Hugging Face id of the VAE of a model of latents."
    ),
    device: str | None = typer.Option(None, help="cpu, cuda, ... (default: the fastest)"),
    precision: Precision = typer.Option(
        Precision.auto, help="Arithmetic of the network; auto: bf16 where it is fast, else fp32."
    ),
    own_parts: OwnParts = None,
) -> None:
    """Make images, the same one for a seed whatever the batch size and number of processes.

    Seeds whose PNG is there already are skipped, so a command that was stopped can be repeated.
    Several processes: torchrun --nproc_per_node N -m tessera sample ...
    """
    from tessera import distributed
    from tessera.pipelines.generate import Job
    from tessera.pipelines.loading import load
    from tessera.precision import Precision as Arithmetic
    from tessera.precision import resolve
    from tessera.sampling.output import Trajectory
    from tessera.sampling.seeds import parse_seeds

    given = parse_options(overrides or (), steps=steps, guidance=guidance)
    parts = import_parts(own_parts)
    if options:
        pipe = load(pipeline, ema=ema, vae=vae, device="cpu", parts=parts)
        print_options(pipe, given.get("sampler"))
        return
    if guide is not None and guidance in (None, 1):
        raise TesseraError("`guide` does nothing at `guidance=1`. Give a weight, like 1.5")
    kind = output or {".npz": "npz", ".png": "grid"}.get(out.suffix.lower(), "png")
    if kind != "png" and (subdirs or grid):
        raise TesseraError(f"--subdirs and --grid belong to PNGs, not to --format {kind}")
    if out.suffix.lower() != _SUFFIXES.get(kind) and output != Format.png:
        check_folder_name(out, _SUFFIXES.get(kind, ".npz or .png (a grid)"), "output=png")
    places = Places.choose(out, kind, grid, trajectory)
    places.check(overwrite)

    wanted = parse_seeds(seeds)
    with distributed.session(device) as target, plain_warnings():
        pipe = load(pipeline, ema=ema, vae=vae, device=target, parts=parts)
        wanted_precision = cast("Arithmetic", precision.value)
        given |= {"precision": resolve(wanted_precision, target, together=True)}
        if start_from is not None:
            given["start_from"] = _read_images(start_from)
        if guide is not None:
            given["guide"] = load(guide, device=target, parts=parts)
        job = Job(pipe, wanted, "-1" if labels == "none" else labels, batch, given)
        film = None if trajectory is None else Trajectory(trajectory, pipe.to_pixels)
        summary = write_images(job, kind, places, subdirs, film)
        if distributed.is_main():
            print_summary(summary, [places.main, *places.beside()])


# Names that Python gives to what has an option, or no place, on the command line.
_NOT_KEYS = {
    "class": "--class", "label": "--class", "labels": "--class", "seed": "--seed",
    "seeds": "--seeds", "batch": "--batch", "guide": "--guide", "start_from": "--start-from",
    "precision": "--precision", "output": "--format", "latents": None, "on_step": None,
    "recipe": None, "parts": None,
}  # fmt: skip


def parse_options(overrides: Sequence[str], **options: Any) -> dict[str, Any]:
    """`name=value` of a command line as a dictionary; "none" is no value.

    Args:
        options: what options of the command say of the same names; None: nothing.

    Raises:
        TesseraError: no `=`, a name that stands there twice, or one that is no KEY.
    """
    given: dict[str, Any] = {name: v for name, v in options.items() if v is not None}
    for override in overrides:
        name, separator, value = override.partition("=")
        if not separator or not name.strip():
            raise TesseraError(
                f"{override!r} is not of the form KEY=VALUE, like s_churn=10; `--options` prints "
                "what there is"
            )
        name = name.strip().removeprefix("--")
        if name in given:
            raise TesseraError(f"{name} is given twice")
        if name in _NOT_KEYS:
            option = _NOT_KEYS[name]
            hint = f"`tessera sample` has the option {option}" if option else "it is for Python"
            raise TesseraError(f"{override!r}: {name} is not given as KEY=VALUE; {hint}")
        given[name] = None if value.strip().lower() in ("none", "null") else value.strip()
    return given


def print_options(pipe: Pipeline, sampler: str | None = None) -> None:
    """A table of everything that a model takes as KEY=VALUE, by one of the samplers."""
    table = make_table(
        Column(style="cyan", no_wrap=True), Column(no_wrap=True), Column(style="dim")
    )
    section = None
    for option in pipe.options(sampler):
        if option.section != section:
            table.add_row(f"[bold not dim default]{option.section}[/]")
            section = option.section
        table.add_row(option.name, _shown(option.value), option.meaning)
    Console().print(table)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@dataclass(frozen=True)
class Places:
    """Where the images go: a folder of PNGs or one file, and what is written beside it.

    Attributes:
        main: the folder or file.
        folder: the folder that holds nothing but samples; None for a file under its own name.
    """

    main: Path
    folder: Path | None
    grid: Path | None
    trajectory: Path | None

    @classmethod
    def choose(cls, out: Path, kind: str, grid: bool, trajectory: Path | None) -> Places:
        """The places that the options name; `kind` is that of `--format`."""
        suffix = _SUFFIXES.get(kind)
        named = out if out.name.strip(".") else out.resolve()
        return cls(
            out if suffix in (None, out.suffix.lower()) else out / f"samples{suffix}",
            None if suffix == out.suffix.lower() else out,
            named.with_name(f"{named.name}-grid.png") if grid else None,
            trajectory,
        )

    def beside(self) -> list[Path]:
        """The files beside the folder or file of images."""
        return [p for p in (self.grid, self.trajectory) if p is not None]

    def check(self, overwrite: bool) -> None:
        """Raise if something would be lost, or samples come among files of others."""
        from tessera.sampling.output import check_folder

        files = self.beside() if self.main == self.folder else [self.main, *self.beside()]
        if overwrite and not files:
            raise TesseraError(
                "--overwrite replaces single files; images in a folder are never replaced. Choose "
                "another folder"
            )
        for file in files:
            check_free(file, overwrite)
        if self.folder is not None:
            check_folder(self.folder, [f"samples{suffix}" for suffix in _SUFFIXES.values()])


def write_images(
    job: Job, kind: str, places: Places, subdirs: bool, film: Trajectory | None
) -> JobSummary:
    """Make the images and write them."""
    from tessera import distributed
    from tessera.files import check_writable
    from tessera.images import grid as tiled
    from tessera.images import save_png
    from tessera.pipelines.generate import generate_arrays, generate_folder, read_images
    from tessera.sampling.output import write_npz

    out = places.main
    if kind == "png":
        summary = generate_folder(job, out, subdirs=subdirs, trajectory=film)
        if places.grid is not None and distributed.is_main():
            save_png(places.grid, tiled(read_images(out, job.seeds, subdirs)))
        return summary
    check_writable(out)
    images, labels, summary = generate_arrays(job, out.parent, trajectory=film)
    if distributed.is_main():
        if kind == "npz":
            write_npz(out, images, labels)
        else:
            save_png(out, tiled(images))
    return summary


def print_summary(summary: JobSummary, where: list[Path]) -> None:
    """Say what a job did, and where its images are."""
    console = Console(soft_wrap=True, highlight=False)
    if summary.made:
        console.print(
            f"{summary.made} images in {summary.seconds:.1f} s, "
            f"{summary.made / summary.seconds:.3g} images/s, "
            f"{summary.evaluations:.4g} network evaluations per image"
        )
    if summary.saved_flops is not None:
        time = "and no time to compare: no step ran the whole network alone"
        if summary.saved_seconds is not None:
            time = f"{summary.saved_seconds:.1%} of its time (median calls of this run)"
        console.print(
            f"skipped parts saved {summary.saved_flops:.1%} of the network's FLOPs, {time}"
        )
    for name, value in summary.reported.items():
        console.print(f"{name.replace('_', ' ')} {value:.4g}")
    if summary.skipped:
        console.print(f"{summary.skipped} images were there already")
    for path in where:
        console.print("written to", style="dim", end=" ")
        console.print(str(path), markup=False)


def _read_images(path: Path) -> Any:
    """All images of a folder, archive or NPZ, uint8 [N, h, w, C]."""
    import numpy as np

    from tessera.metrics.images import open_images

    data = open_images(path)
    return np.ascontiguousarray(data.read(np.arange(len(data))).transpose(0, 2, 3, 1))


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Print the library's warnings as one line for people, on the main process only."""
    from tessera import distributed

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if distributed.is_main():
            console = Console(stderr=True, soft_wrap=True, highlight=False)
            console.print("[bold yellow]warning:[/]", end=" ")
            console.print(str(message), markup=False)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield

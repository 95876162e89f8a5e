"""`tessera sample`: images from a pipeline, as PNGs, one NPZ or a grid."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer
from rich.console import Console

from tessera.errors import TesseraError
from tessera.files import check_folder_name, check_free

if TYPE_CHECKING:
    from tessera.pipelines.generate import Job, Summary
    from tessera.precision import Precision as Arithmetic
    from tessera.sampling.output import Trajectory

# Options of one group, by its heading in the help.
_guidance = partial(typer.Option, rich_help_panel="Guidance")
_bricks = partial(typer.Option, rich_help_panel="Bricks (LEGO models)")
_larger = partial(typer.Option, rich_help_panel="Larger pictures")
_window = partial(
    typer.Option, rich_help_panel="Part of the picture (models that know coordinates)"
)
_sampler = partial(typer.Option, rich_help_panel="Sampler (default: the recipe's)")
_discrete = partial(typer.Option, rich_help_panel="Samplers ddpm and ddim")
_ablation = partial(
    typer.Option, rich_help_panel="Sampler of EDM's ablations (any of these selects it)"
)

Format = StrEnum("Format", ["png", "npz", "grid"])
WindowNoise = StrEnum("WindowNoise", ["crop", "own"])
Layout = StrEnum("Layout", ["tiles", "pad", "windows"])
_SUFFIXES = {"npz": ".npz", "grid": ".png"}  # of the formats that are one file
Precision = StrEnum("Precision", ["auto", "fp32", "bf16"])
Sampler = StrEnum("Sampler", ["edm", "ablation", "ddpm", "ddim"])
Clip = StrEnum("Clip", ["auto", "none", "static", "dynamic"])
Variance = StrEnum("Variance", ["learned", "large", "small"])
Solver = StrEnum("Solver", ["heun", "euler"])
Discretization = StrEnum("Discretization", ["edm", "vp", "ve", "iddpm"])
Schedule = StrEnum("Schedule", ["linear", "vp", "ve"])
Scaling = StrEnum("Scaling", ["none", "vp"])


def sample(
    pipeline: str = typer.Argument(help="Pipeline folder, run folder, or Hugging Face id."),
    seeds: str = typer.Option("0-63", help="One image for each seed, like 0-63,100."),
    out: Path = typer.Option(Path("samples"), help="Folder; or a file .npz or .png (a grid)."),
    labels: str | None = typer.Option(
        None,
        "--class",
        metavar="CLASS",
        help="Index or name; 'balanced' takes turns, 'none' is no class. (default: random)",
    ),
    batch: int = typer.Option(64, min=1, help="Most images at once on one device."),
    output: Format | None = typer.Option(
        None,
        "--format",
        help="One PNG per seed, one NPZ, or one picture. (default: by the suffix of --out)",
    ),
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
        Precision.auto,
        help="Arithmetic of the network; auto: bf16 where the device multiplies it natively.",
    ),
    guidance: float = _guidance(1.0, help="Weight; 1 is none."),
    guidance_interval: str | None = _guidance(
        None, metavar="LOW,HIGH", help="Noise levels where it acts."
    ),
    guide: str | None = _guidance(
        None,
        metavar="PIPELINE",
        help="Guide by this weaker model instead of by the model without class.",
    ),
    skip: float = _bricks(
        0.0,
        min=0,
        max=1,
        help="Share of the steps without the last brick: the last ones if it is the largest, "
        "the first ones if the smallest.",
    ),
    bricks: str | None = _bricks(
        None,
        metavar="LOW-HIGH:N",
        help="Instead: run N bricks at these noise levels, like 0-0.5:2,20-inf:1.",
    ),
    show_bricks: bool = _bricks(
        False,
        "--show-bricks",
        help="Also a picture of each brick's output for the first seed.",
    ),
    height: int | None = _larger(
        None, min=1, help="In pixels; of latents where the model has any."
    ),
    width: int | None = _larger(None, min=1, help="Likewise."),
    layout: Layout | None = _larger(
        None,
        help="By the network as it is (tiles, the default); the same, padded to a size that fits; "
        "or by overlapping windows of the trained size, for any size.",
    ),
    overlap: float | None = _larger(
        None, help="Share of a window that the next one sees, too. (default: 0.5)"
    ),
    x_start: int = _window(0, help="First column."),
    y_start: int = _window(0, help="First row."),
    image_size: str | None = _window(
        None,
        metavar="SIZE",
        help="Side, or WIDTHxHEIGHT. (default: the whole picture)",
    ),
    resolution: int | None = _window(None, help="Side of the whole picture. (default: as trained)"),
    window_noise: WindowNoise | None = _window(
        None,
        help="Noise cut from the whole picture's (crop, the default), or the window's own.",
    ),
    mask_coords: bool = _window(False, "--mask-coords", help="Set all coordinates to 0."),
    low_res: Path | None = typer.Option(
        None, help="Small images to enlarge (folder, archive or NPZ); seed s takes number s mod N."
    ),
    sampler: Sampler | None = _sampler(None, help="Another sampler, with its own defaults."),
    steps: str | None = _sampler(
        None,
        help="Number of steps; of ddpm and ddim also 90,60,60,20,20 or ddim50.",
    ),
    sigma_min: float | None = _sampler(None, help="Last noise."),
    sigma_max: float | None = _sampler(None, help="First noise."),
    rho: float | None = _sampler(None, help="Larger: shorter steps at low noise."),
    solver: Solver | None = _sampler(None, help="Order 2 or 1."),
    s_churn: float | None = _sampler(None, help="Noise added while sampling; 0 is deterministic."),
    s_min: float | None = _sampler(None, help="Lowest noise level at which noise is added."),
    s_max: float | None = _sampler(None, help="Highest noise level at which noise is added."),
    s_noise: float | None = _sampler(None, help="Scale of the noise added."),
    eta: float | None = _discrete(None, help="Noise of ddim; 0 is deterministic."),
    clip: Clip | None = _discrete(None, help="Estimates of the image; auto: dynamic if guided."),
    quantile: float | None = _discrete(None, help="Of dynamic clipping. (default: 0.995)"),
    variance: Variance | None = _discrete(None, help="Of ddpm's steps: as learned, β, or β̃."),
    noise_schedule: str | None = _discrete(
        None, help="For models of continuous noise: linear, cosine, ..."
    ),
    discretization: Discretization | None = _ablation(None, help="Where the steps are."),
    schedule: Schedule | None = _ablation(None, help="Noise level σ(t)."),
    scaling: Scaling | None = _ablation(None, help="Scale s(t)."),
    alpha: float | None = _ablation(None, help="Second evaluation: 1 Heun's, 0.5 the midpoint."),
    epsilon_s: float | None = _ablation(None, help="Last time of VP's steps."),
) -> None:
    """Make images, the same one for a seed whatever the batch size and number of processes.

    Seeds whose PNG is there already are skipped, so a command that was stopped can be repeated.
    Several processes: torchrun --nproc_per_node N -m tessera sample ...
    """
    chosen: dict[str, Any] = {
        "steps": steps, "sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho,
        "solver": solver, "s_churn": s_churn, "s_min": s_min, "s_max": s_max, "s_noise": s_noise,
        "discretization": discretization, "schedule": schedule, "scaling": scaling,
        "alpha": alpha, "epsilon_s": epsilon_s, "sampler": sampler, "eta": eta, "clip": clip,
        "noise_schedule": noise_schedule, "quantile": quantile, "variance": variance,
    }  # fmt: skip
    options = {
        name: value.value if isinstance(value, StrEnum) else value
        for name, value in chosen.items()
        if value is not None
    }
    if guidance_interval is not None:
        options["guidance_interval"] = parse_interval(guidance_interval)
    for given, name in ((guidance_interval, "--guidance-interval"), (guide, "--guide")):
        if given is not None and guidance == 1:
            raise TesseraError(f"{name} does nothing at --guidance 1. Give a weight, like 1.5")
    if image_size is not None or x_start or y_start:
        options["window"] = (x_start, y_start, *_size(image_size))
    if resolution is not None:
        options["resolution"] = resolution
    if window_noise is not None:
        if "window" not in options and resolution is None:
            raise TesseraError("--window-noise belongs to a window: give --image-size, too")
        options["window_noise"] = window_noise.value
    if mask_coords:
        options["mask_coords"] = True
    options |= _larger_options(height, width, layout, overlap)
    if skip:
        options["skip"] = skip
    if bricks is not None:
        options["bricks"] = bricks
    kind = output or {".npz": "npz", ".png": "grid"}.get(out.suffix.lower(), "png")
    if kind != "png" and (subdirs or grid):
        raise TesseraError(f"--subdirs and --grid belong to PNGs, not to --format {kind}")
    if out.suffix.lower() != _SUFFIXES.get(kind) and output != Format.png:
        check_folder_name(out, _SUFFIXES.get(kind, ".npz or .png (a grid)"), "output=png")
    places = _Places.choose(out, kind, grid, show_bricks, trajectory)
    places.check(overwrite)

    from tessera import distributed
    from tessera.pipelines.bricks import joint_bricks
    from tessera.pipelines.generate import Job
    from tessera.pipelines.pipeline import Pipeline
    from tessera.precision import resolve
    from tessera.sampling.output import Trajectory
    from tessera.sampling.seeds import parse_seeds

    wanted = parse_seeds(seeds)
    with distributed.session(device) as target, _plain_warnings():
        pipe = Pipeline.load(pipeline, ema=ema, vae=vae, device=target)
        chosen_precision = resolve(cast("Arithmetic", precision.value), target, together=True)
        options |= {"guidance": guidance, "precision": chosen_precision}
        if "size" in options:
            _, *trained = pipe.denoiser.shape
            options["size"] = (height or trained[0], width or trained[1])
        if low_res is not None:
            options["low_res"] = _read_images(low_res)
        if guide is not None:
            options["guide"] = Pipeline.load(guide, device=target)
        job = Job(pipe, wanted, "-1" if labels == "none" else labels, batch, options)
        if show_bricks:
            joint_bricks(pipe)
        film = None if trajectory is None else Trajectory(trajectory, pipe.to_pixels)
        summary = _write(job, kind, places, subdirs, film)
        if places.bricks is not None and distributed.is_main():
            _show_bricks(job, places.bricks)
        if distributed.is_main():
            _report(summary, [places.main, *places.beside()])


@dataclass(frozen=True)
class _Places:
    """Where the images go: a folder of PNGs or one file, and what is written beside it.

    Attributes:
        main: the folder or file.
        folder: the folder that holds nothing but samples; None for a file under its own name.
    """

    main: Path
    folder: Path | None
    grid: Path | None
    bricks: Path | None
    trajectory: Path | None

    @classmethod
    def choose(
        cls, out: Path, kind: str, grid: bool, show_bricks: bool, trajectory: Path | None
    ) -> _Places:
        """The places that the options name; `kind` is that of `--format`."""
        suffix = _SUFFIXES.get(kind)
        named = out if out.name.strip(".") else out.resolve()
        return cls(
            out if suffix in (None, out.suffix.lower()) else out / f"samples{suffix}",
            None if suffix == out.suffix.lower() else out,
            named.with_name(f"{named.name}-grid.png") if grid else None,
            named.with_name(f"{named.stem}-bricks.png") if show_bricks else None,
            trajectory,
        )

    def beside(self) -> list[Path]:
        """The files beside the folder or file of images."""
        return [p for p in (self.grid, self.bricks, self.trajectory) if p is not None]

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


def _write(job: Job, kind: str, places: _Places, subdirs: bool, film: Trajectory | None) -> Summary:
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


def _show_bricks(job: Job, picture: Path) -> None:
    """Write the picture of each brick's output beside the images."""
    from tessera.images import save_png
    from tessera.pipelines.bricks import brick_picture

    without = ("skip", "bricks")
    options = {name: value for name, value in job.options.items() if name not in without}
    save_png(picture, brick_picture(job.pipe, job.seeds[0], job.label, **options))


def _report(summary: Summary, where: list[Path]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    if summary.made:
        console.print(
            f"{summary.made} images in {summary.seconds:.1f} s, "
            f"{summary.made / summary.seconds:.3g} images/s, "
            f"{summary.evaluations:.4g} network evaluations per image"
        )
    if summary.savings is not None:
        seconds = summary.savings.seconds
        time = "no step ran all bricks to compare the time with"
        if seconds is not None:
            time = f"{seconds:.1%} of its time (median calls of this run)"
        console.print(
            f"skipped bricks saved {summary.savings.flops:.1%} of the network's FLOPs, {time}"
        )
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


def parse_interval(text: str) -> tuple[float, float]:
    """`LOW,HIGH` as two noise levels."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise TesseraError(
            f"--guidance-interval {text!r}: give two noise levels like 0.3,5"
        ) from None
    return low, high


def _larger_options(
    height: int | None, width: int | None, layout: Layout | None, overlap: float | None
) -> dict[str, Any]:
    """The options of a larger picture, as far as they are given."""
    if height is None and width is None:
        if layout is not None or overlap is not None:
            raise TesseraError(
                "--layout and --overlap say how a larger picture is made: give --height or "
                "--width, too"
            )
        return {}
    options: dict[str, Any] = {"size": (height, width)}
    if layout is not None:
        options["layout"] = layout.value
    if overlap is not None:
        if layout != Layout.windows:
            raise TesseraError("--overlap is that of windows: give --layout windows, too")
        options["overlap"] = overlap
    return options


def _size(text: str | None) -> tuple[int, int]:
    if text is None:
        raise TesseraError("--x-start and --y-start need --image-size, the side of the window")
    try:
        sides = [int(side) for side in text.lower().split("x")]
        width, height = sides * 2 if len(sides) == 1 else sides
    except ValueError:
        raise TesseraError(
            f"--image-size {text!r}: give a side like 32, or WIDTHxHEIGHT like 48x32"
        ) from None
    return width, height


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
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

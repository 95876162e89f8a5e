"""`tessera energy`: energies of given images, for ranking them and for telling sets apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tessera.cli.parts import OwnParts, import_parts
from tessera.errors import TesseraError
from tessera.files import check_free

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tessera.metrics.classifier import LabelledImages
    from tessera.metrics.energies import Energies
    from tessera.pipelines.diffusion import DiffusionPipeline

_COLUMNS, _MOST_SHOWN = 10, 100


def energies(
    pipeline: str = typer.Argument(help="Pipeline folder, run folder, or Hugging Face id."),
    images: Path = typer.Argument(help="Images: archive, packed set, folder or NPZ."),
    others: Path | None = typer.Argument(
        None, help="Images to tell from those, with AUROC.", show_default=False
    ),
    noise: str = typer.Option("0.1,0.3,1", help="Noise levels σ."),
    num: int = typer.Option(1000, min=1, help="Images of each set, drawn from all of it."),
    classes: bool = typer.Option(
        False, "--classes", help="Tell the model the classes of the images."
    ),
    repeats: int = typer.Option(1, min=1, help="Draws of noise to average over."),
    batch: int = typer.Option(32, min=1, help="Images at once."),
    seed: int = typer.Option(0, min=0, help="Of the noise, and of the images drawn."),
    ema: str | None = typer.Option(None, help="Average of the weights, by its half-life."),
    device: str | None = typer.Option(None, help="cpu, cuda, ... (default: the fastest)"),
    grid: Path | None = typer.Option(None, help="PNG of images sorted by energy, low to high."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the PNG if it exists."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON, with every image's energies."),
    own_parts: OwnParts = None,
) -> None:
    """Energies of images under an energy model, in nats, up to a constant of the noise level.

    With two sets, AUROC is the share of pairs in which the image of OTHERS has the larger energy.
    """
    from tessera import distributed
    from tessera.data.dataset import choose_subset
    from tessera.metrics.images import open_images

    sigmas = _levels(noise)
    if grid is not None:
        check_free(grid, overwrite)
    parts = import_parts(own_parts)
    with distributed.session(device) as where:
        pipe = _open(pipeline, ema, where, parts)
        sets = [open_images(path) for path in (images, others) if path is not None]
        given = {"repeats": repeats, "batch": batch, "seed": seed}
        rows = [choose_subset(len(data), min(num, len(data)), seed) for data in sets]
        found = [
            _energies(pipe, data, chosen, sigmas, classes, given)
            for data, chosen in zip(sets, rows, strict=True)
        ]
    names = [str(path) for path in (images, others) if path is not None]
    if grid is not None:
        _save_grid(grid, sets, rows, found)
    if as_json:
        print(json.dumps(_report(names, found), indent=2))
    else:
        _print(names, found, grid)


def _levels(text: str) -> list[float]:
    """Positive numbers between commas."""
    try:
        levels = [float(part) for part in text.split(",")]
    except ValueError:
        levels = []
    if not levels or not all(0 < level < float("inf") for level in levels):
        raise TesseraError(f"`noise={text}`: give noise levels above 0, as in 0.1,0.3,1")
    return levels


def _open(pipeline: str, ema: str | None, device: Any, parts: Any) -> DiffusionPipeline:
    from tessera.pipelines.diffusion import DiffusionPipeline
    from tessera.pipelines.loading import load

    pipe = load(pipeline, ema=ema, device=device, parts=parts)
    if not isinstance(pipe, DiffusionPipeline):
        raise TesseraError(
            f"{pipeline} is a pipeline of kind {pipe.kind}, which has no energy; name one of kind "
            "diffusion or experts with an energy network"
        )
    pipe.check_complete()
    return pipe


def _energies(
    pipe: DiffusionPipeline,
    data: LabelledImages,
    rows: NDArray[np.int64],
    sigmas: list[float],
    classes: bool,
    options: dict[str, Any],
) -> Energies:
    from tessera.metrics.energies import image_energies
    from tessera.progress import progress

    labels = data.labels if classes else None
    known = pipe.denoiser.num_classes
    if classes and labels is None:
        raise TesseraError(f"--classes: the images of {data.name} have none")
    if labels is not None and labels.max() >= known:
        raise TesseraError(
            f"--classes: {data.name} has class {labels.max()}, the model {known or 'no'} classes"
        )
    with progress("energies", len(rows), unit="images") as bar:
        return image_energies(
            pipe.denoiser, data, rows, sigmas, pipe.codec, labels=labels, device=pipe.device,
            advance=bar.advance, **options,
        )  # fmt: skip


def _rows(found: list[Energies]) -> list[tuple[str, list[NDArray[np.float64]]]]:
    """(noise level or mean of all, numbers of each set)."""
    rows = [
        (f"{sigma:g}", [energies.values[:, column] for energies in found])
        for column, sigma in enumerate(found[0].sigmas)
    ]
    if len(rows) > 1:
        rows.append(("all, standardised", [each.standardised(found[0]) for each in found]))
    return rows


def _report(names: list[str], found: list[Energies]) -> dict[str, Any]:
    from tessera.metrics.energies import auroc

    sets = [
        {
            "images": name,
            "mean": energies.values.mean(axis=0).tolist(),
            "std": energies.values.std(axis=0).tolist(),
            "standardised": energies.standardised(found[0]).tolist(),
            "energies": energies.values.tolist(),
        }
        for name, energies in zip(names, found, strict=True)
    ]
    report: dict[str, Any] = {"noise": list(found[0].sigmas), "sets": sets}
    if len(found) == 2:
        report["auroc"] = {name: auroc(*columns) for name, columns in _rows(found)}
    return report


def _print(names: list[str], found: list[Energies], grid: Path | None) -> None:
    from rich.console import Console
    from rich.table import Column

    from tessera.cli.tables import make_table
    from tessera.metrics.energies import auroc

    heads = [Path(name).name for name in names]
    columns = [Column("noise"), *(Column(head, justify="right") for head in heads)]
    if len(found) == 2:
        columns.append(Column("AUROC", justify="right"))
    table = make_table(*columns, title="Energies, mean ± standard deviation", boxed=True)
    for name, numbers in _rows(found):
        # Not the rounding error of a mean that is 0.
        cells = [f"{round(part.mean(), 9) + 0.0:.4g} ± {part.std():.2g}" for part in numbers]
        if len(found) == 2:
            cells.append(f"{auroc(*numbers):.3f}")
        table.add_row(name, *cells)
    console = Console()
    console.print(table)
    if grid is not None:
        console.print(f"sorted by energy: {grid}")


def _save_grid(
    path: Path,
    sets: list[LabelledImages],
    rows: list[NDArray[np.int64]],
    found: list[Energies],
) -> None:
    """Images from low to high energy, evenly chosen: of two sets the second below the first."""
    import numpy as np

    from tessera.images import grid, save_png

    chosen = []
    for data, drawn, energies in zip(sets, rows, found, strict=True):
        order = energies.standardised(found[0]).argsort(kind="stable")
        shown = min(len(order), _MOST_SHOWN // len(sets))
        shown -= shown % _COLUMNS if shown > _COLUMNS else 0
        places = order[np.linspace(0, len(order) - 1, shown).round().astype(np.int64)]
        chosen.append(np.array(data.read(drawn[places])).transpose(0, 2, 3, 1))
    save_png(path, grid(np.concatenate(chosen), columns=_COLUMNS))

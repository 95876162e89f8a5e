"""`tessera eval`: score images against real ones."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from tessera.metrics.reference import Reference
    from tessera.metrics.score import Score

eval_app = typer.Typer(no_args_is_help=True, help="Score images against real ones.")


@eval_app.command()
def reference(
    data: Path = typer.Argument(help="Real images: archive, packed set, folder or NPZ."),
    out: Path = typer.Argument(help="Reference file to write (.npz)."),
    seed: int = typer.Option(0, min=0, help="Seed of the classifier's training."),
    training_images: int = typer.Option(
        60_000, min=1, help="Images to train the classifier on, counting repetitions."
    ),
) -> None:
    """Train the in-domain classifier on DATA and write its statistics of them to OUT."""
    from tessera.distributed import device
    from tessera.errors import TesseraError
    from tessera.metrics.images import open_images
    from tessera.metrics.reference import build_reference, save_reference

    if out.suffix != ".npz":
        raise TesseraError(f"{out}: a reference file is an NPZ file; give it a name with .npz")
    result = build_reference(
        open_images(data), seed=seed, training_images=training_images, device=device()
    )
    save_reference(out, result)
    _print_table("Reference", [*_reference_rows(result), ("written to", str(out))])


@eval_app.command()
def score(
    samples: Path = typer.Argument(help="Images (folder, archive, packed set, NPZ) or a pipeline."),
    reference: Path = typer.Argument(help="Reference file, or the real images themselves."),
    num: int | None = typer.Option(
        None, min=2, help="Images to score; of a pipeline 1,000 by default, of images all."
    ),
    seed: int = typer.Option(0, min=0, help="A pipeline's first seed; the classifier's seed."),
    batch: int = typer.Option(64, min=1, help="A pipeline's batch size."),
    training_images: int = typer.Option(
        60_000, min=1, help="As in `reference`, if REFERENCE is a set of images."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """Score SAMPLES against REFERENCE by the Fréchet distance of in-domain classifier features."""
    from tessera.distributed import device
    from tessera.metrics import score as scoring
    from tessera.metrics.images import open_images
    from tessera.metrics.reference import open_reference

    is_pipeline = (samples / "config.json").exists() or (samples / "pipeline").is_dir()
    data = None if is_pipeline else open_images(samples)
    known = open_reference(reference, seed=seed, training_images=training_images, device=device())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if data is None:
            result = scoring.score(_from_pipeline(samples, num or 1000, seed, batch), known)
        else:
            result = scoring.score_images(data, known, num=num, seed=seed)
    for warning in caught:
        typer.secho(f"warning: {warning.message}", fg=typer.colors.YELLOW, err=True)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        _print_score(result, known)


def _from_pipeline(
    path: Path, num: int, seed: int, batch: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    import torch

    from tessera.distributed import device
    from tessera.pipelines.pipeline import load
    from tessera.progress import progress

    pipeline = load(path, device=device())
    with progress("samples", num, unit="images") as bar:
        for made in pipeline.sample_batches(range(seed, seed + num), batch=batch):
            labels = None if made.labels is None else torch.from_numpy(made.labels)
            yield torch.from_numpy(made.images).permute(0, 3, 1, 2), labels
            bar.advance(len(made.images))


def _reference_rows(result: Reference) -> list[tuple[str, str]]:
    facts = result.extractor.facts
    channels, height, width = facts.shape
    task = "quarter turns (no labels)"
    return [
        ("real images", f"{result.statistics.n:,} of {result.name}, {width}x{height}x{channels}"),
        ("features", f"{result.extractor.dim} of the {result.extractor.name}"),
        ("classifier tells apart", f"{facts.outputs} classes" if facts.task == "classes" else task),
        (
            "right on held-out real images",
            f"{facts.accuracy:.1%} of {facts.held_out:,} (chance {1 / facts.outputs:.1%})",
        ),
    ]


def _print_score(result: Score, known: Reference) -> None:
    rows = [("Fréchet distance (in-domain classifier)", f"{result.fd_classifier:.6g}")]
    if result.recognised is not None:
        rows.append(("recognised as their class", f"{result.recognised:.1%}"))
    rows.append(("samples", f"{result.n:,}"))
    _print_table("Score", [*rows, *_reference_rows(known)])


def _print_table(title: str, rows: list[tuple[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows:
        table.add_row(name, str(value))
    Console().print(table)

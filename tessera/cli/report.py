"""`tessera report`: a page of a run or pipeline."""

from __future__ import annotations

from pathlib import Path

import typer

from tessera.cli.completing import offer_sampling
from tessera.cli.parts import OwnParts, import_parts


def report(
    run: str = typer.Argument(help="Run folder, pipeline folder, or Hugging Face id."),
    overrides: list[str] | None = typer.Argument(
        None,
        metavar="KEY=VALUE...",
        help="Options of sampling, as of `tessera sample`.",
        autocompletion=offer_sampling,
    ),
    out: Path | None = typer.Option(
        None, help="HTML file to write. (default: report.html in the run's folder)"
    ),
    samples: int | None = typer.Option(
        None, min=2, help="Images to make and score; by default what takes half a minute."
    ),
    seed: int = typer.Option(0, min=0, help="First seed of the samples, and of all else."),
    data: Path | None = typer.Option(
        None, help="The training images, if they are not where the recipe says."
    ),
    held_out: Path | None = typer.Option(
        None, help="Such images that were not trained on, to tell copies from likeness."
    ),
    reference: Path | None = typer.Option(
        None, help="Reference file with a classifier. (default: the one beside the images)"
    ),
    device: str | None = typer.Option(None, help="cpu, cuda, ... (default: the fastest)"),
    own_parts: OwnParts = None,
) -> None:
    """Write a page about a trained model: samples, scores, copies, losses, cost, how to go on.

    It is one HTML file that needs nothing else. Nothing is trained, and an earlier report in its
    place is replaced.
    """
    from tessera.cli.sample import parse_options, plain_warnings
    from tessera.reports import write_report

    options = parse_options(overrides or ())
    with plain_warnings():
        path = write_report(
            run, out, samples=samples, seed=seed, data=data, held_out=held_out,
            reference=reference, device=device, parts=import_parts(own_parts),
            with_module=own_parts, **options,
        )  # fmt: skip
    print(f"written to {path}")

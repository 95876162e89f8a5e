"""`tessera experts`: one pipeline from several that were trained for parts of the noise levels."""

from __future__ import annotations

from pathlib import Path

import typer

from tessera.cli.parts import OwnParts, import_parts
from tessera.errors import TesseraError


def experts(
    out: Path = typer.Argument(help="Pipeline folder to write; must not exist."),
    pipelines: list[str] = typer.Argument(
        help="Pipelines or runs, from the cleanest noise levels to the noisiest."
    ),
    thresholds: str | None = typer.Option(
        None,
        metavar="SNR,...",
        help="Signal-to-noise ratios between them, falling. (default: as trained)",
    ),
    own_parts: OwnParts = None,
) -> None:
    """Put experts together into one pipeline, which samples like any other."""
    from tessera.pipelines.experts import assemble
    from tessera.pipelines.loading import load

    if out.exists():
        raise TesseraError(f"{out} exists already. Name another folder, or remove it first")
    try:
        values = [float(part) for part in (thresholds or "").split(",") if part.strip()]
    except ValueError:
        raise TesseraError(f"--thresholds {thresholds!r}: give numbers like 4,0.25") from None
    parts = import_parts(own_parts)
    pipes = [load(source, device="cpu", parts=parts) for source in pipelines]
    made = assemble(pipes, values)
    made.save(out)
    between = ", ".join(f"{threshold:g}" for threshold in made.recipe.snr_splits)
    print(f"{len(pipelines)} experts, SNR thresholds {between}, written to {out}")
    for source, pipe in zip(pipelines, made.pipes, strict=True):
        if pipe.recipe.expert is None:
            print(f"note: {source} was trained for all noise levels, and makes a part of them now")

"""`tessera bricks`: what each brick of a LEGO model makes of a sample, as a picture."""

from __future__ import annotations

from pathlib import Path

import typer

from tessera.cli.completing import offer_sampling
from tessera.cli.parts import OwnParts, import_parts
from tessera.errors import TesseraError
from tessera.files import check_free


def bricks(
    pipeline: str = typer.Argument(help="Pipeline folder, run folder, or Hugging Face id."),
    out: Path = typer.Argument(help="Picture to write, .png."),
    overrides: list[str] = typer.Argument(
        None,
        metavar="KEY=VALUE",
        help="Options of sampling, as of `tessera sample`.",
        autocompletion=offer_sampling,
    ),
    seed: int = typer.Option(0, min=0, help="Of the sample."),
    labels: str | None = typer.Option(
        None, "--class", metavar="CLASS", help="Index or name. (default: random)"
    ),
    rows: int = typer.Option(5, min=1, help="Noise levels that are shown."),
    ema: str | None = typer.Option(None, help="Average of the weights, by its half-life."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace a file of that name."),
    device: str | None = typer.Option(None, help="cpu, cuda, ... (default: the fastest)"),
    own_parts: OwnParts = None,
) -> None:
    """Show what each brick of a stack makes of a sample, at a few noise levels."""
    from tessera.cli.sample import parse_options, plain_warnings
    from tessera.images import save_png
    from tessera.pipelines.bricks import brick_picture
    from tessera.pipelines.loading import load

    if out.suffix.lower() != ".png":
        raise TesseraError(f"{out}: the picture is written as .png; end the name so")
    check_free(out, overwrite)
    given = parse_options(overrides or ())
    with plain_warnings():
        pipe = load(pipeline, ema=ema, device=device, parts=import_parts(own_parts))
        save_png(out, brick_picture(pipe, seed, labels, rows=rows, **given))
    print(f"written to {out}")

"""`tessera export`: pipelines in the forms that other code reads."""

from __future__ import annotations

from pathlib import Path

import typer

from tessera.cli.parts import OwnParts, import_parts


def export(
    pipeline: str = typer.Argument(help="Pipeline folder, run folder, or Hugging Face id."),
    dest: Path = typer.Argument(help="To write: .safetensors, or a folder for diffusers."),
    to: str = typer.Option(
        ..., "--to", metavar="FORM", help="dit, mar, guided-diffusion (also PDM), or diffusers."
    ),
    ema: str | None = typer.Option(None, help="Average of the weights, by its half-life."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an earlier export."),
    own_parts: OwnParts = None,
) -> None:
    """Write a model in another form: under released names, or for diffusers.

    Models without an exact counterpart there are refused, with the reason.
    """
    from tessera.convert.export import plan_export
    from tessera.pipelines.loading import load

    pipe = load(pipeline, ema=ema, device="cpu", parts=import_parts(own_parts))
    exported = plan_export(pipe, to)
    exported.write(dest, overwrite=overwrite)
    print(f"written to {dest}")
    for note in exported.notes:
        print(f"note: {note}")

"""`tessera relay`: one pipeline from several of rising resolution, each going on with the last."""

from __future__ import annotations

from pathlib import Path

import typer

from tessera.cli.parts import OwnParts, import_parts
from tessera.errors import TesseraError


def relay(
    places: list[str] = typer.Argument(
        metavar="FIRST SECOND [THIRD ...] OUT",
        help="Pipelines or runs, from the lowest resolution to the highest; then the folder to "
        "write, which must not exist.",
    ),
    own_parts: OwnParts = None,
) -> None:
    """Put trained stages together into one pipeline, in which each starts from the last's picture.

    It samples like any other; options of a stage stand behind its name: second.s_block=0.1.
    """
    from tessera.files import user_path
    from tessera.pipelines.loading import load
    from tessera.pipelines.relay import assemble_relay

    *sources, last = places
    out = user_path(Path(last))
    if len(sources) < 2:
        raise TesseraError(
            "name two stages or more, from the lowest resolution to the highest, and then the "
            "folder to write: tessera relay FIRST SECOND OUT"
        )
    if out.exists():
        raise TesseraError(f"{out} exists already. Name another folder, or remove it first")
    parts = import_parts(own_parts)
    made = assemble_relay([load(source, device="cpu", parts=parts) for source in sources])
    made.save(out)
    sides = " > ".join(f"{width}x{height}" for height, width in made.sides)
    print(f"a relay of {len(made.pipes)} stages, {sides}, written to {out}")

"""`tessera convert`: released checkpoints to pipeline folders."""

from __future__ import annotations

from pathlib import Path

import typer

from tessera.cli.tables import print_facts


def convert(
    checkpoint: Path = typer.Argument(
        help="network-snapshot-*.pkl or a published .pkl (averaged weights), or "
        "training-state-*.pt (the trained weights themselves)."
    ),
    dest: Path = typer.Argument(help="Pipeline folder to write; must not exist."),
    snapshot: Path | None = typer.Option(
        None,
        metavar="PKL",
        help="With a training state, its network snapshot: averaged and trained weights together.",
    ),
) -> None:
    """Make a pipeline of a checkpoint of EDM's released code; nothing in it is run."""
    from tessera.convert.run import convert_checkpoint

    made = convert_checkpoint(checkpoint, dest, snapshot=snapshot)
    recipe = made.recipe
    channels, side, _ = recipe.shape
    rows = {
        "checkpoint": f"{made.family}, {recipe.name}",
        "network": recipe.network.kind,
        "preconditioning": recipe.preconditioning.kind,
        "parameters": f"{made.parameters:,}",
        "images": f"{side} x {side}, {channels} channels",
        "classes": str(recipe.data.num_classes or "none"),
        "weights": ", ".join(made.weights),
        "images seen": f"{made.images_seen:,}" if made.images_seen else "not known",
    }
    print_facts(rows)
    print(f"written to {made.folder}; its images: tessera sample {made.folder} --out samples/")

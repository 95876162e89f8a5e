"""`tessera train` on images in the place of a recipe."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from tessera.starting.begin import PlannedRun
    from tessera.starting.trained import TrainedRun


def show_plan(images: str, minutes: float | None, overrides: list[str], save: Path | None) -> None:
    """Show what would be trained on images.

    Args:
        images: folder, archive or set of images.
        minutes: of training; None asks, or takes what is proposed where nobody can answer.
        overrides: `key=value`.
        save: file for the recipe of the plan.
    """
    from tessera import distributed
    from tessera.cli.sample import plain_warnings
    from tessera.files import check_free
    from tessera.starting.begin import plan_training

    if save is not None:
        check_free(save, overwrite=False)
    with distributed.session() as device, plain_warnings():
        start = plan_training(images, minutes, overrides, ask=ask_minutes, device=device)
        if distributed.is_main():
            print_plan(start)
            if save is not None:
                _save(start, save)


def ask_minutes(proposed: float) -> float:
    """The minutes that the user wants, or what is proposed where nobody can answer."""
    from tessera import distributed

    if not sys.stdin.isatty() or distributed.world() > 1:
        return proposed
    return float(typer.prompt("minutes to train", default=proposed, type=float))


def print_plan(start: PlannedRun) -> None:
    """The images, what was chosen for them and why, and what it takes."""
    from rich.console import Console
    from rich.table import Column

    from tessera.cli.tables import make_table

    table = make_table(
        Column(style="bold", no_wrap=True), Column(overflow="fold"), Column(style="dim")
    )
    for row in start.rows():
        table.add_row(*row)
    Console().print(table)


def _save(start: PlannedRun, file: Path) -> None:
    from tessera.files import create_file
    from tessera.recipes.loading import dump_recipe
    from tessera.recipes.text import write_yaml

    create_file(file, write_yaml(dump_recipe(start.plan.recipe)))
    print(f"written to {file}; its data.path is not set: convert the images, or name a set")


def print_outcome(done: TrainedRun) -> None:
    """Where things are, and what can be done next."""
    from tessera.commands import tessera_command
    from tessera.training.run_folder import longer

    run, command = shlex.quote(str(done.run_dir)), tessera_command()
    if done.stopped_by is not None:
        print(f"stopped after {done.images_seen:,} images; saved. To go on:")
        print(f"  {command} train --resume {run}")
        return
    print(f"trained on {done.images_seen:,} images")
    for name, path in (("samples", done.samples), ("report", done.report)):
        if path is not None:
            print(f"{name}: {path}")
    print("Next:")
    print(f"  {command} sample {run} --seeds 0-63 --grid --out more")
    print(f"  {command} train --resume {run} {longer(done.recipe)}   # to train longer")

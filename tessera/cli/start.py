"""`tessera train` on images in the place of a recipe."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from tessera.starting.begin import Finished, PlannedRun


def train_on_images(
    images: str,
    words: Sequence[str],
    minutes: float | None,
    *,
    only_plan: bool,
    save: Path | None,
) -> None:
    """Show the plan, and train it unless that is all that was asked for.

    Args:
        images: folder, archive or set of images.
        words: `key=value`, and the run folder at most once among them.
        minutes: of training; None asks, or takes what is proposed where nobody can answer.
        only_plan: convert and train nothing.
        save: file for the recipe of the plan.
    """
    from tessera import distributed
    from tessera.cli.sample import plain_warnings
    from tessera.errors import RecipeError
    from tessera.files import check_free
    from tessera.starting.begin import plan_training, train_images

    folders = [word for word in words if "=" not in word]
    if len(folders) > 1:
        raise RecipeError(f"{' and '.join(folders)}: name one run folder, or give key=value")
    if save is not None:
        if not only_plan:
            raise RecipeError("--save goes with --plan; a run keeps its recipe in its folder")
        check_free(save, overwrite=False)
    overrides = [word for word in words if "=" in word]
    with distributed.session() as device, plain_warnings():
        ask = _asked if sys.stdin.isatty() and distributed.world() == 1 else None
        start = plan_training(images, minutes, overrides, ask=ask, device=device)
        if distributed.is_main():
            _show(start)
        if only_plan:
            if save is not None and distributed.is_main():
                _save(start, save)
            return
        say = print if distributed.is_main() else lambda text: None
        done = train_images(start, folders[0] if folders else None, say=say)
        if distributed.is_main():
            _conclude(done, start)
    if done.stopped_by is not None:
        raise typer.Exit(128 + done.stopped_by)


def _asked(proposed: float) -> float:
    """The minutes that the user wants."""
    return float(typer.prompt("minutes to train", default=proposed, type=float))


def _show(start: PlannedRun) -> None:
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


def _conclude(done: Finished, start: PlannedRun) -> None:
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
    print(f"  {command} train --resume {run} {longer(start.plan.recipe)}   # to train longer")

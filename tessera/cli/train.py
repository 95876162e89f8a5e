"""`tessera train`."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tessera.cli.parts import OwnParts, import_parts
from tessera.cli.start import train_on_images

if TYPE_CHECKING:
    from tessera.recipes.parts import Parts
    from tessera.recipes.schema import Recipe
    from tessera.training.trainer import Trainer


def train(
    recipe: str | None = typer.Argument(
        None,
        metavar="RECIPE|IMAGES",
        help="Name of a shipped recipe, or a YAML or JSON file; or a folder, archive or set of "
        "images.",
    ),
    overrides: list[str] | None = typer.Argument(
        None,
        metavar="[OUT] KEY.PATH=VALUE...",
        help="Changes to the recipe, e.g. data.path=x.zip; with images also the new run folder.",
    ),
    resume: str | None = typer.Option(
        None, "--resume", metavar="RUN", help="Go on with the run in this folder."
    ),
    minutes: float | None = typer.Option(
        None, min=0.01, help="End well after so many minutes of training."
    ),
    plan: bool = typer.Option(
        False, "--plan", help="With images: show what would be trained, and train nothing."
    ),
    save: Path | None = typer.Option(
        None, help="With --plan: a recipe file (.yaml) to write the plan to, for changes by hand."
    ),
    own_parts: OwnParts = None,
) -> None:
    """Train a model, on images alone or by a recipe, or go on with a run.

    tessera train photos/ --minutes 10

    tessera train cifar10-small data.path=cifar10.zip run.dir=runs/a

    tessera train --resume runs/a training.images=800000

    torchrun --nproc_per_node 8 -m tessera train edm-cifar10-cond-vp data.path=c.zip
    """
    from tessera import distributed
    from tessera.cli.sample import plain_warnings
    from tessera.errors import RecipeError
    from tessera.starting.facts import is_collection
    from tessera.training.trainer import Trainer

    changes = list(overrides or [])
    if resume is None and recipe is not None and is_collection(recipe):
        if own_parts is not None:
            raise RecipeError("--with belongs to a recipe that names own parts, not to images")
        train_on_images(recipe, changes, minutes, only_plan=plan, save=save)
        return
    if plan or save is not None:
        raise RecipeError(
            "--plan and --save belong to images in the place of a recipe: tessera train photos/ "
            "--plan. What a recipe takes here tells: tessera cost RECIPE --probe"
        )
    changes += [] if minutes is None else [f"training.minutes={minutes}"]
    parts = import_parts(own_parts)
    chosen = _chosen(recipe, changes, resume, parts)
    with distributed.session(timeout_minutes=chosen.run.timeout_minutes):
        with plain_warnings():
            trainer = Trainer(chosen, resume=resume, parts=parts, probe=True)
        if distributed.is_main():
            _describe(trainer, f"{', '.join(parts.names)}, of {own_parts}" if own_parts else None)
        trainer.run()
        main = distributed.is_main()
        if main:
            _conclude(trainer, f"--with {own_parts} " if own_parts else "")
    if trainer.stopped_by is not None:
        raise typer.Exit(128 + trainer.stopped_by)
    if main and chosen.run.report:  # the other processes need not wait for it
        from tessera.reports import write_report

        with plain_warnings():
            path = write_report(
                trainer.run_dir, device=trainer.device, parts=parts, with_module=own_parts
            )
        print(f"the report is {path}")


def _chosen(recipe: str | None, changes: list[str], resume: str | None, parts: Parts) -> Recipe:
    """The recipe of a run that goes on, or of a new one."""
    from tessera.errors import RecipeError
    from tessera.recipes.loading import load_recipe
    from tessera.training import run_folder

    if resume is not None:
        return run_folder.read_recipe(resume, ([recipe] if recipe else []) + changes, parts)
    if recipe is None:
        raise RecipeError(
            "name images or a recipe to train, or a run to resume:\n"
            "  tessera train photos/\n"
            "  tessera train cifar10-small data.path=cifar10.zip\n"
            "  tessera train --resume runs/a\n`tessera recipes` lists the recipes"
        )
    return load_recipe(recipe, changes, parts)


def _describe(trainer: Trainer, own_parts: str | None) -> None:
    """A short table of what is about to happen."""
    from tessera import distributed
    from tessera.cli.tables import print_facts
    from tessera.progress import quantity

    recipe = trainer.recipe
    training, dataset = recipe.training, trainer.dataset
    count = sum(p.numel() for p in trainer.learner.parameters)
    channels, height, width = dataset.shape
    classes = f", {recipe.data.num_classes} classes" if recipe.data.num_classes else ""
    processes = distributed.world()
    where = (
        f"{trainer.device_name}, {processes} processes" if processes > 1 else trainer.device_name
    )
    options: list[str] = [f"{training.precision} ({trainer.precision_reason})"]
    options += ["channels last"] if training.channels_last else []
    options += ["compiled"] if training.compile else []
    options += [training.parallel.upper()] if processes > 1 else []
    micro = f", {training.micro_batch} at a time" if training.micro_batch else ""
    # A network of the user's own has a name of its own.
    network = getattr(recipe.network, "name", "") or recipe.network.kind
    rows = {
        "recipe": recipe.name,
        **({"own parts": own_parts} if own_parts else {}),
        "network": f"{network}, {quantity(count)} parameters",
        "data": f"{recipe.data.path or dataset.name}: {len(dataset):,} images, {width}x{height}, "
        f"{'grey' if channels == 1 else 'colour'}{classes}",
        "device": where,
        "precision": ", ".join(options),
        "batch": f"{training.batch}{micro}{_rate(recipe)}",
        "images": f"{trainer.images_seen:,} of {training.images:,} seen{_limit(recipe)}",
        "run folder": str(trainer.run_dir),
    }
    if trainer.forecast is not None:
        rows |= trainer.forecast.rows()
    print_facts(rows)


def _limit(recipe: Recipe) -> str:
    minutes = recipe.training.minutes
    return "" if minutes is None else f", for {minutes:g} minutes at most"


def _rate(recipe: Recipe) -> str:
    """The learning rate, where it follows from the batch."""
    optimizer = recipe.optimizer
    if optimizer.lr_batch is None:
        return ""
    rate = optimizer.for_batch(recipe.training.batch).lr
    return f", learning rate {rate:g} ({optimizer.lr:g} for {optimizer.lr_batch})"


def _conclude(trainer: Trainer, own: str) -> None:
    """Where things are and what can be done next; `own` is the option that brings own parts."""
    from tessera.training.run_folder import longer

    run = shlex.quote(str(trainer.run_dir))
    if trainer.stopped_by is not None:
        reason = signal.Signals(trainer.stopped_by).name
        print(f"stopped by {reason} after {trainer.images_seen:,} images; saved. To go on:")
        print(f"  {_launcher()}tessera train {own}--resume {run}")
        return
    print(f"trained on {trainer.images_seen:,} images. Next:")
    if trainer.recipe.expert is not None:
        experts = ["..."] * (1 + len(trainer.recipe.snr_splits))
        experts[trainer.recipe.expert] = run
        print(f"  tessera experts {own}NAME {' '.join(experts)}   # with the other experts' runs")
    else:
        print(f"  tessera sample {own}{run} --seeds 0-63 --out samples/")
    print(f"  tessera train {own}--resume {run} {longer(trainer.recipe)}   # to train longer")


def _launcher() -> str:
    """How this process was started, as far as it shows."""
    from tessera import distributed

    if distributed.world() == 1:
        return "python -m " if sys.argv[0].endswith("__main__.py") else ""
    return f"torchrun --nproc_per_node {distributed.world()} -m "

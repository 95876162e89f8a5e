"""Training from images or by a recipe: what `tessera.train` and the command `tessera train` do."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tessera import distributed
from tessera.errors import RecipeError
from tessera.recipes.loading import dump_recipe, load_recipe, parse_recipe
from tessera.recipes.overrides import apply_overrides
from tessera.recipes.parts import NO_PARTS, Parts
from tessera.recipes.schema import Recipe
from tessera.reports import write_report
from tessera.starting.begin import PlannedRun, plan_training, train_images
from tessera.starting.facts import is_collection
from tessera.starting.trained import TrainedRun
from tessera.training.run_folder import read_recipe
from tessera.training.trainer import Trainer

Source = str | os.PathLike[str] | Recipe | PlannedRun
"""What can be trained: a recipe's name or file, images, a recipe, or a plan."""


@dataclass(frozen=True)
class Listener:
    """Who is told how a training goes; on the main process only.

    Attributes:
        say: called with a sentence on each thing that is done.
        planned: called with the plan of a training on images, before anything is converted.
        begun: called with the trainer of a recipe before its first step, in place of a sentence;
            it has a forecast then, which takes up to five seconds.
        ended: called with the same trainer after the last step, before there is a report.
        finished: called with what is returned.
    """

    say: Callable[[str], None] = print
    planned: Callable[[PlannedRun], None] | None = None
    begun: Callable[[Trainer], None] | None = None
    ended: Callable[[Trainer], None] | None = None
    finished: Callable[[TrainedRun], None] | None = None


def train(
    source: Source | None = None,
    *,
    minutes: float | None = None,
    dir: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    parts: Parts = NO_PARTS,
) -> TrainedRun:
    """Train a model on images alone or by a recipe, or go on with a run.

    It does what `tessera train` does, writes the same run folder, and shows a bar meanwhile, in a
    notebook one of HTML. Images are looked at, a plan is chosen for this machine and the minutes,
    they are converted once, and the run ends in a picture of samples and a report. A recipe's run
    ends in a report if it says `run.report: true`.

    Ctrl-C, or a notebook's button that interrupts, ends the run after its step: it is saved, and
    what is returned says so.

    Args:
        source: a folder, an archive or another collection of images; the name of a shipped recipe,
            or a recipe file; a `Recipe`; or a plan of `plan_training`.
        minutes: of training, after which it ends well. Images are trained on for what is proposed
            without; a run that goes on counts those it has had.
        dir: the new run folder; by default the recipe's `run.dir`, or runs/NAME-001.
        resume: the folder of a run to go on with, in place of a source.
        overrides: changes to the recipe, such as `["training.batch=64", "data.xflip=false"]`.
        parts: functions that make the recipe's external parts.

    Raises:
        TesseraError: there is no such recipe, images cannot be used, changes do not fit, the folder
            is taken, or the training failed; the message says what to do.

    Example:
        >>> from tessera import Parts
        >>> from tessera.training.probe import blank_images
        >>> changes = ["training.images=64", "run.preview=null", "sampling.steps=2"]
        >>> blank = Parts(dataset=blank_images)  # of your own: tessera.train("photos", minutes=10)
        >>> run = train("quickstart-digits", dir="runs/b", overrides=changes, parts=blank)
        training in runs/b
        >>> run.images_seen, run.pipeline.sample(range(4)).shape
        (64, (4, 16, 16, 1))
    """
    return run_training(
        source, minutes=minutes, folder=dir, resume=resume, overrides=overrides, parts=parts
    )


def run_training(
    source: Source | None,
    *,
    minutes: float | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    parts: Parts = NO_PARTS,
    with_module: str | None = None,
    ask: Callable[[float], float] | None = None,
    listener: Listener | None = None,
) -> TrainedRun:
    """Train as `train` does, and tell a listener.

    Args:
        source, minutes, resume, overrides, parts: see `train`.
        folder: the new run folder.
        with_module: the module of the parts, for the commands that the report shows.
        ask: turns the minutes that are proposed for images into the user's.

    Raises:
        TesseraError: those of `train`.
    """
    listener = listener or Listener()
    _check(source, minutes, folder, resume, overrides)
    if isinstance(source, PlannedRun) or (source is not None and is_images(source)):
        if parts != NO_PARTS:
            raise RecipeError("own parts belong to a recipe that names them, not to images")
        return _on_images(source, minutes, folder, overrides, ask, listener)
    changes = [*overrides, *([] if minutes is None else [f"training.minutes={minutes}"])]
    recipe = _recipe(source, resume, changes, parts)
    with distributed.session(timeout_minutes=recipe.run.timeout_minutes):
        main = distributed.is_main()
        probe = listener.begun is not None
        where = None if folder is None else os.fspath(folder)
        again = None if resume is None else os.fspath(resume)
        trainer = Trainer(recipe, where, again, parts=parts, probe=probe)
        if main and listener.begun is not None:
            listener.begun(trainer)
        elif main:
            listener.say(f"training in {trainer.run_dir}")
        trainer.run()
        if main and listener.ended is not None:
            listener.ended(trainer)
    report = None
    # The other processes need not wait for it.
    if main and trainer.stopped_by is None and recipe.run.report:
        report = write_report(
            trainer.run_dir, device=trainer.device, parts=parts, with_module=with_module
        )
    done = TrainedRun(
        trainer.run_dir,
        trainer.recipe,
        trainer.images_seen,
        report=report,
        stopped_by=trainer.stopped_by,
        parts=parts,
    )
    if main and listener.finished is not None:
        listener.finished(done)
    return done


def is_images(source: Source) -> bool:
    """Whether it is a collection of images, and not a recipe.

    Raises:
        TesseraError: it is the folder of a model.
    """
    return not isinstance(source, Recipe | PlannedRun) and is_collection(os.fspath(source))


def _check(
    source: Source | None,
    minutes: float | None,
    folder: str | os.PathLike[str] | None,
    resume: str | os.PathLike[str] | None,
    overrides: Sequence[str],
) -> None:
    """Refuse what says two things at once, before anything is looked at."""
    if isinstance(overrides, str):
        raise RecipeError(
            f"overrides={overrides!r} is one text; give a list of them, [{overrides!r}]"
        )
    set_keys = {override.partition("=")[0].strip() for override in overrides}
    if source is None and resume is None:
        raise RecipeError(
            "name images or a recipe to train, or a run to resume: tessera.train('photos'), "
            "tessera.train('cifar10-small', overrides=['data.path=cifar10.zip']) or "
            "tessera.train(resume='runs/a')"
        )
    if resume is not None and (source is not None or folder is not None):
        raise RecipeError(
            "a run that is resumed has its recipe, images and folder; leave out "
            + ("the source" if source is not None else "`dir`")
        )
    if minutes is not None and not minutes > 0:
        raise RecipeError(f"`minutes={minutes}`: give more than 0")
    if minutes is not None and "training.minutes" in set_keys:
        raise RecipeError("`minutes` and training.minutes are one thing; give one of them")
    if folder is not None and "run.dir" in set_keys:
        raise RecipeError(f"{os.fspath(folder)} and run.dir name two run folders; give one of them")
    if isinstance(source, PlannedRun) and (minutes is not None or set_keys):
        raise RecipeError("a plan has its minutes and its recipe; give them to plan_training")


def _on_images(
    source: Source,
    minutes: float | None,
    folder: str | os.PathLike[str] | None,
    overrides: Sequence[str],
    ask: Callable[[float], float] | None,
    listener: Listener,
) -> TrainedRun:
    with distributed.session() as device:
        main = distributed.is_main()
        if isinstance(source, PlannedRun):
            plan = source
        else:
            assert not isinstance(source, Recipe)
            plan = plan_training(source, minutes, overrides, ask=ask, device=device)
        if main and listener.planned is not None:
            listener.planned(plan)
        done = train_images(plan, folder, say=listener.say if main else _nothing)
        if main and listener.finished is not None:
            listener.finished(done)
        return done


def _recipe(
    source: Source | None,
    resume: str | os.PathLike[str] | None,
    changes: list[str],
    parts: Parts,
) -> Recipe:
    """The recipe of a run that goes on, or of a new one."""
    if resume is not None:
        return read_recipe(os.fspath(resume), changes, parts)
    if isinstance(source, Recipe):
        if not changes:
            return source
        return parse_recipe(apply_overrides(dump_recipe(source), changes), source.name, parts)
    assert source is not None
    assert not isinstance(source, PlannedRun)
    return load_recipe(source, changes, parts)


def _nothing(text: str) -> None:
    pass

"""A training from a collection of images, from the first look to the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tessera import distributed
from tessera.errors import TrainingError
from tessera.files import user_path
from tessera.images import grid, save_png
from tessera.pipelines.loading import estimate, load
from tessera.pipelines.samples import facts_html
from tessera.progress import duration
from tessera.recipes.build import build_view
from tessera.recipes.loading import parse_recipe
from tessera.recipes.overrides import merge
from tessera.recipes.schema import Recipe
from tessera.reports import write_report
from tessera.reports.making import STRIPS, affordable, shown_classes
from tessera.starting.cache import converted, measured_here, reference_beside, this_machine
from tessera.starting.choice import Machine, TrainingPlan, choose, refuse_large
from tessera.starting.facts import ImageFacts, look
from tessera.starting.trained import TrainedRun
from tessera.training.forecast import Forecast
from tessera.training.tracking import memory_gb
from tessera.training.trainer import Trainer

SAMPLES = "samples.png"
_ROWS, _COLUMNS = 4, 8  # of the picture of samples


@dataclass(frozen=True)
class PlannedRun:
    """A plan and what it was made of.

    Attributes:
        facts: of the images.
        machine: that trains.
        plan: what is trained.
        forecast: time and memory of the training here.
        sampling_seconds: what the samples and the strips of the report take after it.
    """

    facts: ImageFacts
    machine: Machine
    plan: TrainingPlan
    forecast: Forecast
    sampling_seconds: float

    def rows(self) -> list[tuple[str, str, str]]:
        """The images, what was chosen for them and why, and what it takes: name, value, reason."""
        facts = self.facts
        sides = sorted({size for size, _ in facts.sizes}, key=min)
        sizes = " to ".join(dict.fromkeys(f"{w}x{h}" for w, h in (sides[0], sides[-1])))
        others = f"{facts.ignored:,} other files" if facts.ignored else ""
        left_out = [*facts.skipped[:5]]
        left_out += [f"and {len(facts.skipped) - 5:,} more"] if len(facts.skipped) > 5 else []
        after = f", about {duration(self.sampling_seconds)} of samples"
        after = after if self.sampling_seconds >= 1 else ""
        names = ["left out"] + [""] * (len(left_out) - 1)
        return [
            ("images", f"{facts.count:,} in {facts.path}, {sizes} pixels", others),
            *((name, text, "") for name, text in zip(names, left_out, strict=False)),
            ("machine", self.machine.name, ""),
            *((choice.name, choice.value, choice.why) for choice in self.plan.choices),
            *((name, text, "") for name, text in self.forecast.rows().items()),
            ("beside it", f"converting, a judge, the report{after}", "the first two once"),
        ]

    def _repr_html_(self) -> str:
        rows = ((name, f"{value} ({why})" if why else value) for name, value, why in self.rows())
        return facts_html("plan", rows)


def plan_training(
    images: str | os.PathLike[str],
    minutes: float | None = None,
    overrides: Sequence[str] = (),
    *,
    ask: Callable[[float], float] | None = None,
    device: torch.device | None = None,
) -> PlannedRun:
    """Look at a collection of images and decide what to train; nothing is converted yet.

    Args:
        images: folder, archive or another collection, see `data.sources.open_source`.
        minutes: of training; by default what the smallest network needs here, 60 at most.
        overrides: `key=value`, of any key of the recipe.
        ask: turns the proposed minutes into the user's.
        device: by default the fastest.

    Raises:
        TesseraError: there are no images, most of them cannot be used, or overrides do not fit.

    Example:
        >>> plan_training("photos/", minutes=10).plan.recipe.training.images  # doctest: +SKIP
        27000
    """
    facts, machine = look(images), this_machine()
    refuse_large(facts)
    device = device or distributed.device()
    measure = measured_here(machine, device)
    plan = choose(facts, machine, minutes, measure, overrides, ask)
    forecast = plan.timings.forecast(plan.recipe, build_view(plan.recipe), 0)
    if device.type == "cpu":  # larger networks than the chosen one may have been tried here
        peak = max(forecast.memory_bytes, round(memory_gb(device) * 1e9))
        forecast = replace(forecast, memory_bytes=peak)
    return PlannedRun(facts, machine, plan, forecast, _sampling_seconds(plan, device))


def _sampling_seconds(plan: TrainingPlan, device: torch.device) -> float:
    """What the samples after the training take, from the time of a preview."""
    recipe, preview = plan.recipe, plan.recipe.run.preview
    if preview is None or recipe.expert is not None:
        return 0.0
    each = plan.timings.preview / (preview.rows * preview.columns)
    count = _ROWS * _columns(recipe)
    if recipe.run.report:
        classes = len(shown_classes(recipe.data.num_classes))
        count += affordable(estimate(recipe), device, classes) + STRIPS
    return each * count


def train_images(
    start: PlannedRun,
    out: str | os.PathLike[str] | None = None,
    *,
    say: Callable[[str], None] = print,
) -> TrainedRun:
    """Convert the images, train the plan, sample, score, and write the report.

    Args:
        start: of `plan_training`.
        out: the run folder; by default that of the recipe, or runs/NAME-001.
        say: called with a sentence on each thing that is done.

    Raises:
        TesseraError: the folder is taken, images cannot be read, or the training failed.
    """
    folder = None if out is None else user_path(out)
    if folder is not None and folder.is_dir() and any(folder.iterdir()):
        raise TrainingError(f"{folder} is not empty; name another folder, or leave it out")
    with distributed.main_first():
        path = converted(start.facts, start.plan.recipe, say)
    trainer = Trainer(with_path(start.plan.recipe, path), folder)
    say(f"training in {trainer.run_dir}")
    trainer.run()
    samples = report = None
    if trainer.stopped_by is None and distributed.is_main():
        samples = _sampled(trainer)
        report = _reported(trainer, path, start.plan.classifier_images)
    return TrainedRun(
        trainer.run_dir,
        trainer.recipe,
        trainer.images_seen,
        samples,
        report,
        trainer.stopped_by,
    )


def with_path(recipe: Recipe, path: Path) -> Recipe:
    """The recipe of a plan, for the images at `path`."""
    plain = recipe.model_dump()
    return parse_recipe(merge(plain, {"data": {"path": str(path)}}))


def _sampled(trainer: Trainer) -> Path | None:
    """A picture of samples of the finished model, class by class in columns."""
    if trainer.recipe.expert is not None:  # which makes no images alone
        return None
    pipe = load(trainer.run_dir, device=trainer.device)
    label = "balanced" if trainer.recipe.data.num_classes else None
    columns = _columns(trainer.recipe)
    made = pipe.sample(range(_ROWS * columns), label)
    path = trainer.run_dir / SAMPLES
    save_png(path, grid(made, columns))
    return path


def _columns(recipe: Recipe) -> int:
    count = recipe.data.num_classes
    return count if 3 < count <= 12 else _COLUMNS


def _reported(trainer: Trainer, path: Path, classifier_images: int) -> Path | None:
    """The page, with the scores; and the judge of the samples, made before it."""
    if not trainer.recipe.run.report:
        return None
    reference = reference_beside(path, classifier_images, trainer.device)
    return write_report(trainer.run_dir, device=trainer.device, reference=reference)

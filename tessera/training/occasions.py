"""What a run does from time to time beside its steps: previews, scores, validation, histograms."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera import distributed
from tessera.recipes.parts import Parts
from tessera.recipes.schema import Recipe
from tessera.training.evaluation import Evaluation
from tessera.training.feed import Feed
from tessera.training.histograms import Histograms
from tessera.training.learner import Learner
from tessera.training.preview import Preview
from tessera.training.tracking import Tracker
from tessera.training.validation import Validation, ValidationImages


@dataclass(frozen=True)
class Occasion:
    """Something that is made every so many images, and at the end of the run.

    Attributes:
        every: images between two of it.
        make: called with the learner and the images seen, by all processes.
        settled: only after a good step, of weights that may be kept.
    """

    every: int
    make: Callable[[Learner, int], Any]
    settled: bool = False


class Due:
    """What is to be done after a step, given the images seen before and after it.

    Args:
        over: whether the time of the run is over, so that this was its last step.
    """

    def __init__(self, before: int, after: int, total: int, over: bool = False) -> None:
        self._before, self._after = before, after
        self.finished = after >= total or over

    def __call__(self, every: int) -> bool:
        """Whether a multiple of `every` images has been reached, or the end of the run."""
        return self.finished or self._after // every > self._before // every


def occasions(
    recipe: Recipe,
    feed: Feed,
    validated: ValidationImages | None,
    run_dir: Path,
    trackers: Sequence[Tracker],
    parts: Parts,
) -> list[Occasion]:
    """What the recipe asks for, in the order in which it is made."""
    run, scores, previews = recipe.run, recipe.evaluate, recipe.run.preview
    if recipe.expert is not None:
        _say_that_experts_make_no_images(recipe)
        previews = scores = None
    made: list[Occasion] = []
    about = recipe, feed.dataset.class_names, run_dir, trackers
    if run.histograms_every_images is not None:
        made.append(Occasion(run.histograms_every_images, Histograms(trackers).make))
    if validated is not None:
        validation = Validation(recipe, validated, trackers, parts)
        made.append(Occasion(recipe.validation.every_images, validation.make, settled=True))
    if previews is not None:
        start = feed.start_pictures(previews.rows * previews.columns)
        preview = Preview(*about, start, parts, feed.codec)
        made.append(Occasion(previews.every_images, preview.make))
    if scores is not None:
        start = feed.start_pictures(scores.images)
        evaluation = Evaluation(*about, start, parts, feed.codec)
        made.append(Occasion(scores.every_images, evaluation.make, settled=True))
    return made


def _say_that_experts_make_no_images(recipe: Recipe) -> None:
    asked = [
        name
        for name, section in (("previews", recipe.run.preview), ("scores", recipe.evaluate))
        if section is not None
    ]
    if asked and distributed.is_main():
        print(
            f"note: expert {recipe.expert} knows its own noise levels only and makes no "
            f"images alone, so there will be no {' and no '.join(asked)}; put the experts "
            "together with: tessera experts",
            file=sys.stderr,
        )

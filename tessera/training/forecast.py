"""What a run will take on this machine, from the times of its parts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tessera.data.loader import StepKind, StepPlan
from tessera.data.views import View
from tessera.progress import duration, human
from tessera.recipes.schema import Recipe

DISTURBED = 0.1
"""Share of the processors that others take, beyond which it is said, and steps wait for them."""

_STEPS = 10_000  # of a longer run only some are looked at, in windows all along it
_WINDOWS, _WINDOW = 50, 200


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        seconds: from now to its end, previews, scores and checkpoints included.
        extra_seconds: what these take of it.
        images_per_second: of training, over all devices.
        memory_bytes: peak of a process: of the GPU's memory, or of the processor's, libraries
            included.
        others: share of the processors that other programs took while it was measured; the run is
            as fast as told if they go on like that.
        alone: images per second without them.
    """

    seconds: float
    extra_seconds: float
    images_per_second: float
    memory_bytes: int
    others: float = 0.0
    alone: float | None = None

    def rows(self) -> dict[str, str]:
        """Time and memory for people, as rows of a table."""
        extra = self.extra_seconds
        parts = f", {duration(extra)} of it previews, scores, checkpoints" if extra >= 1 else ""
        rows = {
            "time here": f"about {duration(self.seconds)}{parts}, "
            f"{self.images_per_second:.3g} images/s",
            "memory here": f"about {human(self.memory_bytes, 'B')} at the peak",
        }
        if self.others >= DISTURBED:
            rows["other programs"] = (
                f"took {self.others:.0%} of the processors meanwhile: without them about "
                f"{self.alone or self.images_per_second:.3g} images/s"
            )
        return rows


@dataclass(frozen=True)
class Timings:
    """How long the parts of a run take here, in seconds.

    Attributes:
        steps: a step of each kind.
        preview, scores, checkpoint: one each; 0 where there are none.
        memory_bytes: as of a `Forecast`.
        validation: one; 0 where there is none.
        others: as of a `Forecast`.
        alone: share of a step's time that it takes without other programs.
    """

    steps: Mapping[StepKind, float]
    preview: float
    scores: float
    checkpoint: float
    memory_bytes: int
    validation: float = 0.0
    others: float = 0.0
    alone: float = 1.0

    def forecast(
        self, recipe: Recipe, view: View, images_seen: int, elapsed: float = 0.0
    ) -> Forecast:
        """What is left of the run of `recipe` after `images_seen` images.

        Args:
            elapsed: seconds of steps so far, which count where `training.minutes` are set.
        """
        total, minutes = recipe.training.images, recipe.training.minutes
        per_image = seconds_per_image(course(view, 0, total)[0], self.steps)
        left = max(total - images_seen, 0)
        if left:
            per_image = seconds_per_image(course(view, images_seen, total)[0], self.steps)
        if minutes is not None:
            left = min(left, math.ceil(max(60 * minutes - elapsed, 0) / per_image))
            total = images_seen + left
        run, scores = recipe.run, recipe.evaluate
        events = [(self.checkpoint, run.checkpoint_every_images)]
        if run.preview is not None:
            events.append((self.preview, run.preview.every_images))
        if scores is not None:
            events.append((self.scores, scores.every_images))
        events.append((self.validation, recipe.validation.every_images))
        # Each is made at every multiple of its interval, and once at the end.
        extra = sum(
            seconds * (math.ceil(total / every) - images_seen // every)
            for seconds, every in events
            if left
        )
        seconds = left * per_image + extra
        speed = 1 / per_image
        alone = speed / self.alone
        return Forecast(seconds, extra, speed, self.memory_bytes, self.others, alone)


def course(
    view: View, first: int, total: int
) -> tuple[list[Counter[StepKind]], dict[StepKind, StepPlan]]:
    """The kinds of steps of a run from `first` to `total` images, and a step of each.

    Counted in windows that stand for equal shares of the images; the first one is all of a run that
    is not long.
    """
    plans: dict[StepKind, StepPlan] = {}
    long = total - first > _STEPS * view.plan(first).images
    starts = [first + (total - first) * k // _WINDOWS for k in range(_WINDOWS)] if long else [first]
    windows = []
    for start in starts:
        window = Counter[StepKind]()
        position = start
        while position < total and not (long and window.total() >= _WINDOW):
            plan = view.plan(position)
            kind = plan.kind
            window[kind] += 1
            plans.setdefault(kind, plan)
            position += plan.images
        windows.append(window)
    return windows, plans


def seconds_per_image(
    windows: Sequence[Counter[StepKind]], steps: Mapping[StepKind, float]
) -> float:
    """Mean over a run, given how long a step of each kind takes."""
    rates = [
        sum(count * steps[kind] for kind, count in window.items())
        / sum(count * kind[0] for kind, count in window.items())
        for window in windows
    ]
    return sum(rates) / len(rates)

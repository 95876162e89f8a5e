"""Training by the clock, and scores of what it has made so far."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.errors import TrainingError
from tessera.metrics.evaluate import Score, score_stream
from tessera.metrics.measure import made_images
from tessera.metrics.reference import Reference
from tessera.pipelines.base import Pipeline
from tessera.pipelines.generate import Job
from tessera.pipelines.usage import Usage
from tessera.progress import progress
from tessera.training.preview import ema_pipeline
from tessera.training.trainer import Trainer

NEVER = 10**12
TIMED = (
    f"training.images={NEVER}", "training.compile=false", "optimizer.decay=constant",
    "run.preview=null", "run.tensorboard=false", "evaluate=null",
    f"run.checkpoint_every_images={NEVER}",
)  # fmt: skip
"""Changes of a recipe for training by the clock.

The learning rate is constant, because the number of images that fit into the time is not known
before; nothing is compiled, drawn or saved, because that would count as training.
"""


@dataclass(frozen=True)
class Budget:
    """How long a training goes on: seconds on the clock, or FLOPs."""

    seconds: float | None = None
    flops: float | None = None


@dataclass(frozen=True)
class Spent:
    """How far a training is: seconds of its steps, and the share of its budget, up to 1."""

    seconds: float
    share: float


def train_by_time(trainer: Trainer, seconds: float) -> Iterator[float]:
    """Train for so long; the seconds so far after each step.

    What the caller does between the steps does not count.

    Raises:
        TrainingError: it was stopped by a signal.
    """
    for spent in train_within(trainer, Budget(seconds=seconds)):
        yield spent.seconds


def train_within(trainer: Trainer, budget: Budget, flops_per_image: int = 0) -> Iterator[Spent]:
    """Train until a budget is spent; how far it is after each step.

    What the caller does between the steps does not count.

    Args:
        flops_per_image: of a training image, forward and backward, for a budget of FLOPs.

    Raises:
        TrainingError: it was stopped by a signal.
    """
    spent = Spent(0.0, 0.0)
    if budget.flops is None:
        assert budget.seconds is not None
        total, unit = budget.seconds / 60, "minutes"
    else:
        total, unit = budget.flops / 1e12, "TFLOP"
    with (
        contextlib.closing(trainer.steps(shown=False)) as steps,
        progress(f"training {trainer.recipe.name}", total, unit=unit) as bar,
    ):
        while spent.share < 1:
            _wait(trainer.device)
            begin = perf_counter()
            if next(steps, None) is None:
                raise TrainingError(f"the training of {trainer.recipe.name} was stopped")
            _wait(trainer.device)
            seconds = spent.seconds + perf_counter() - begin
            if budget.flops is None:
                done = seconds / 60
            else:
                done = flops_per_image * trainer.images_seen / 1e12
            spent = Spent(seconds, min(done / total, 1.0))
            bar.update(min(done, total), note=f"{trainer.images_seen:,} images")
            yield spent


def _wait(device: torch.device) -> None:
    """Until an accelerator has done its work, so that the clock measures it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def averaged(trainer: Trainer) -> Pipeline:
    """The model of a training as it is now, with averaged weights."""
    names = trainer.dataset.class_names
    pipe = ema_pipeline(trainer.recipe, trainer.learner, trainer.images_seen, names)
    assert pipe is not None
    return pipe.to(trainer.device)


@dataclass(frozen=True)
class Scored:
    """Samples and what they are worth.

    Attributes:
        score: of all of them; None where there is nothing to score them by.
        first: the first ones, uint8 [N, H, W, C].
        evaluations: of the network for each image.
        seconds: for all images.
    """

    score: Score | None
    first: NDArray[np.uint8]
    evaluations: float
    seconds: float

    @property
    def known(self) -> Score:
        """The score of samples that were scored."""
        assert self.score is not None
        return self.score


def scored(
    pipe: Pipeline, reference: Reference | None, samples: int, batch: int, sampling: dict[str, Any]
) -> Scored:
    """Score samples of seeds 0, 1, ..., of all classes in turn.

    Args:
        samples: number of them.
        batch: made at once.
        sampling: options of `Pipeline.sample_batches`.

    Raises:
        TesseraError: an option that the model cannot have.
    """
    label = "balanced" if pipe.model.num_classes else None
    job = Job(pipe, range(samples), label, batch, sampling)
    first: list[NDArray[np.uint8]] = []
    seconds = 0.0

    def batches() -> Iterator[tuple[Tensor, Tensor | None]]:
        nonlocal seconds
        begin = perf_counter()
        for made in pipe.run(job.plan, range(samples), batch):
            seconds += perf_counter() - begin  # the images are on the CPU by now
            if not first:
                first.append(made.images)
            labels = None if made.labels is None else torch.from_numpy(made.labels)
            yield torch.from_numpy(made.images).permute(0, 3, 1, 2), labels
            begin = perf_counter()

    usage = Usage(job.plan.networks(), pipe.device.type == "cuda")
    with usage.watch():
        if reference is None:
            for _ in batches():
                pass
            result = None
        else:
            result = score_stream(made_images(batches(), samples, "samples"), reference)
    return Scored(result, first[0], usage.evaluations / samples, seconds)

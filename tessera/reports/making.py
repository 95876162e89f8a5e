"""Samples for a report, and how some of them come about."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.errors import TesseraError
from tessera.pipelines.base import Pipeline
from tessera.pipelines.counting import Cost
from tessera.pipelines.mar import MarPipeline
from tessera.pipelines.plan import counting_steps
from tessera.progress import progress
from tessera.sampling.core import SamplerState

SHOWN_CLASSES = 10
FRAMES = 8
STRIPS = 3
# Of all samples together, so that they take about half a minute on two cores; GPUs have more.
_BUDGET = {"cpu": 2.0e12}
_BUDGET_GPU = 4.0e14
_FEWEST, _MOST = 20, 500
_FEW_PIXELS = 128 * 128


@dataclass(frozen=True)
class Made:
    """Samples.

    Attributes:
        images: uint8 [N, H, W, C].
        space: the same in model space [N, C, h, w], on the CPU; uint8 pixels.
        labels: int64 [N], the class that each was asked to be; None without classes.
    """

    images: NDArray[np.uint8]
    space: Tensor
    labels: NDArray[np.int64] | None


@dataclass(frozen=True)
class Frame:
    """A moment of some samples' making.

    Attributes:
        sigma: the noise level; None where tokens are made, without noise.
        share: how far it is, 0 to 1.
        noisy: the state, uint8 [n, H, W, C].
        denoised: the estimate of where it leads; None where there is none.
    """

    sigma: float | None
    share: float
    noisy: NDArray[np.uint8]
    denoised: NDArray[np.uint8] | None


def shown_classes(num_classes: int) -> list[int]:
    """Up to ten classes, spread over all of them.

    Example:
        >>> shown_classes(3), shown_classes(1000)[:3]
        ([0, 1, 2], [0, 100, 200])
    """
    count = min(num_classes, SHOWN_CLASSES)
    return [i * num_classes // count for i in range(count)]


def affordable(cost: Cost | None, device: torch.device, classes: int) -> int:
    """How many samples a report makes by itself: by what one costs, so always the same number.

    Args:
        cost: of the model; None where it cannot be counted.
        classes: that are shown; each gets as many.
    """
    budget = _BUDGET.get(device.type, _BUDGET_GPU)
    count = _FEWEST if cost is None else math.floor(budget / max(cost.sample_flops, 1))
    count = min(max(count, _FEWEST), _MOST)
    return max(count // classes, 2) * classes if classes else count


def make_samples(
    pipe: Pipeline, seed: int, count: int, classes: list[int], options: dict[str, Any]
) -> Made:
    """Samples of the seeds from `seed` on, of the classes in turn.

    Raises:
        TesseraError: options that this model cannot have.
    """
    labels = [classes[i % len(classes)] for i in range(count)] if classes else None
    plan = pipe.plan(range(seed, seed + count), labels, **options)
    _, height, width = pipe.codec.image_shape(plan.shape)
    batch = 64 if height * width <= _FEW_PIXELS else 8
    images, spaces = [], []
    with progress("samples", count, unit="images") as bar:
        step = counting_steps(bar)
        for rows in np.array_split(np.arange(count), math.ceil(count / batch)):
            seeds = [plan.seeds[row] for row in rows]
            for _, state in pipe.states(plan, rows):
                step(seeds, state)
            x = plan.picture(state.x)
            pictures = pipe.to_pixels(x)
            images.append(pictures)
            of_pixels = pipe.recipe.codec.of_pixels
            spaces.append(
                torch.from_numpy(pictures).permute(0, 3, 1, 2)
                if of_pixels
                else x.to("cpu", torch.float32)
            )
    made = None if labels is None else np.array(labels, np.int64)
    return Made(np.concatenate(images), torch.cat(spaces), made)


def make_frames(
    pipe: Pipeline, seed: int, classes: list[int], options: dict[str, Any]
) -> list[Frame]:
    """The course of the first samples, at a few steps from the first to the last.

    Raises:
        TesseraError: options that this model cannot have.
    """
    labels = [classes[i % len(classes)] for i in range(STRIPS)] if classes else None
    plan = pipe.plan(range(seed, seed + STRIPS), labels, **options)
    states = (state for _, state in pipe.states(plan, range(STRIPS)))
    return [frame for state in states if (frame := frame_of(pipe, state)) is not None]


def frame_of(pipe: Pipeline, state: SamplerState, count: int = STRIPS) -> Frame | None:
    """The first samples of a batch as they are at a step; None at most steps."""
    if state.step not in {round(step) for step in np.linspace(1, state.steps, FRAMES)}:
        return None
    tokens = isinstance(pipe, MarPipeline)
    return Frame(
        None if tokens else state.sigma,
        state.step / state.steps,
        pipe.to_pixels(state.unit[:count]),
        None if tokens else pipe.to_pixels(state.denoised[:count]),
    )


def cost_of(pipe: Pipeline, options: dict[str, Any]) -> Cost | None:
    """What the model costs; None where that cannot be counted, as of own parts."""
    counted = {name: value for name, value in options.items() if name != "start_from"}
    try:
        return pipe.cost(**counted)
    except TesseraError:
        return None

"""Stacks of bricks seen from outside: a picture of what each brick makes of a sample."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.diffusion.skipping import BrickSchedule, Range, brick_sizes, cut_bricks
from tessera.errors import TesseraError
from tessera.images import labelled_grid
from tessera.pipelines.base import Pipeline
from tessera.pipelines.diffusion import DiffusionPipeline
from tessera.recipes.schema import LegoConfig
from tessera.sampling.core import SamplerState


def brick_picture(
    pipe: Pipeline, seed: int, label: Any = None, *, rows: int = 5, **options: Any
) -> NDArray[np.uint8]:
    """What each brick makes of a sample at a few noise levels, as a labelled grid.

    A row is a step of the sampler with its noise level, from noise to image; the columns are the
    noisy image and the estimates of the stack cut after each brick.

    Args:
        label: class of the image, as in `Pipeline.sample_batches`.
        rows: of the grid.
        options: of sampling, on the canvas that the model was trained on.

    Returns:
        uint8 [H, W, 3].

    Raises:
        TesseraError: the network is no stack of bricks, or was not trained to be cut.
    """
    network = pipe.recipe.network
    if (
        not isinstance(pipe, DiffusionPipeline)
        or not isinstance(network, LegoConfig)
        or not network.joint
    ):
        raise TesseraError(
            "only a stack of bricks that was trained jointly (network.kind=lego, "
            "network.joint=true) can show each brick's output"
        )
    if len({tuple(sizes) for sizes, _ in brick_sizes(pipe.denoiser)}) > 1:
        raise TesseraError("experts with different bricks have no picture of bricks in common")
    plan = pipe.plan([seed], label, **options)
    if plan.shape != pipe.model.shape:
        raise TesseraError("bricks are shown on the canvas that the model was trained on")
    steps: list[tuple[Tensor | None, SamplerState]] = [
        (labels, state) for labels, state in pipe.states(plan, [0]) if state.sigma > 0
    ]
    if not steps:
        raise TesseraError("one step leaves no noise level in between to show; give more steps")
    cond = plan.conditioning([seed], steps[0][0], steps[0][1].x)
    counts = range(1, len(network.bricks) + 1)
    cuts = [
        cut_bricks(pipe.denoiser, BrickSchedule((Range(0.0, math.inf, count),))) for count in counts
    ]
    shown, noise = [], []
    chosen = np.linspace(0, len(steps) - 1, min(rows, len(steps))).round().astype(int)
    for state in (steps[index][1] for index in chosen):
        sigmas = torch.full((1,), state.sigma)
        with torch.no_grad():
            estimates = [cut(state.x, sigmas, cond).mean for cut in cuts]
        pictures = [pipe.to_pixels(x)[0] for x in (state.unit, *estimates)]
        shown.append(pictures)
        # In words: the font that Pillow carries has no Greek letters.
        noise.append(f"noise {state.sigma:.3g}")
    names = [f"brick {k + 1}: {b.size} px" for k, b in enumerate(network.bricks)]
    return labelled_grid(shown, noise, ["noisy image", *names], gap=6, least=112)

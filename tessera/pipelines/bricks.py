"""Stacks of bricks seen from outside: what skipping saved, and a picture of each brick's output."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.cost import forward_flops
from tessera.diffusion.skipping import BrickSchedule, Range, cut_bricks
from tessera.errors import TesseraError
from tessera.images import to_pil
from tessera.pipelines.canvas import OPTIONS as CANVAS_OPTIONS
from tessera.pipelines.pipeline import Pipeline
from tessera.recipes.schema import LegoConfig
from tessera.sampling.core import SamplerState


@dataclass(frozen=True)
class Savings:
    """What running fewer bricks saved of the network's work.

    Attributes:
        flops: share of the FLOPs that all bricks at all steps would have cost.
        seconds: share of the time, from the median time of a call of each kind in the same run;
            None where no call ran all bricks, so that there is nothing to compare with.
    """

    flops: float
    seconds: float | None


# Number of the network, its canvas, and how many bricks ran (None: all).
_Kind = tuple[int, tuple[int, int], int | None]


class Usage:
    """Calls of networks by canvas and number of bricks: images and seconds of each."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe
        self._calls: dict[_Kind, list[tuple[int, float]]]
        self._calls = defaultdict(list)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Note every call during the block."""
        started: list[Any] = []
        timed: list[tuple[_Kind, int, Any, Any]] = []
        on_gpu = self._pipe.device.type == "cuda"

        def now() -> Any:
            if not on_gpu:
                return time.perf_counter()
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            return event

        def before(_module: nn.Module, _inputs: tuple[Any, ...], _options: dict[str, Any]) -> None:
            started.append(now())

        networks = self._pipe.networks()

        def after(
            module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], _output: Any
        ) -> None:
            x: Tensor = inputs[0]
            kind = (networks.index(module), (x.shape[2], x.shape[3]), options.get("bricks"))
            timed.append((kind, len(x), started.pop(), now()))

        handles = []
        for network in networks:
            handles.append(network.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(network.register_forward_hook(after, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if on_gpu:
                torch.cuda.synchronize()
            for kind, images, start, end in timed:
                seconds = start.elapsed_time(end) / 1000 if on_gpu else end - start
                self._calls[kind].append((images, seconds))

    def savings(self) -> Savings | None:
        """What was saved; None if all calls ran all bricks."""
        if all(bricks is None for *_, bricks in self._calls):
            return None
        recipes = self._pipe.recipes

        @functools.cache
        def flops(network: int, size: tuple[int, int], bricks: int | None) -> int:
            return forward_flops(recipes[network], size, bricks)

        spent = full = seconds = full_seconds = 0.0
        comparable = True
        for (network, size, bricks), calls in self._calls.items():
            images = sum(n for n, _ in calls)
            spent += images * flops(network, size, bricks)
            full += images * flops(network, size, None)
            whole = self._calls.get((network, size, None))
            comparable &= whole is not None
            if whole is not None:
                seconds += images * _per_image(calls)
                full_seconds += images * _per_image(whole)
        return Savings(1 - spent / full, 1 - seconds / full_seconds if comparable else None)


def _per_image(calls: list[tuple[int, float]]) -> float:
    """Median seconds per image; the first call of a run, which warms up, does not count much."""
    return statistics.median(seconds / images for images, seconds in calls)


def joint_bricks(pipe: Pipeline) -> LegoConfig:
    """The stack of bricks of a pipeline, each of which has an output of its own.

    Raises:
        TesseraError: the network is no stack of bricks, or was not trained to be cut.
    """
    network = pipe.recipe.network
    if not isinstance(network, LegoConfig) or not network.joint:
        raise TesseraError(
            "only a stack of bricks that was trained jointly (network.kind=lego, "
            "network.joint=true) can show each brick's output (`show_bricks`)"
        )
    return network


def brick_picture(
    pipe: Pipeline, seed: int, label: Any = None, *, levels: int = 5, **options: Any
) -> NDArray[np.uint8]:
    """What each brick makes of a sample at a few noise levels, as a labelled grid.

    A row is a step of the sampler with its noise level, from noise to image; the columns are the
    noisy image and the estimates of the stack cut after each brick.

    Args:
        label: class of the image, as in `Pipeline.sample_batches`.
        levels: number of rows.
        options: of the sampler and of guidance; a canvas is always as trained.

    Returns:
        uint8 [H, W, 3].

    Raises:
        TesseraError: the network is no stack of bricks, or was not trained to be cut.
    """
    network = joint_bricks(pipe)
    options = {k: v for k, v in options.items() if k not in CANVAS_OPTIONS}
    states: list[tuple[float, Tensor]] = []

    def keep(_seeds: Any, state: SamplerState) -> None:
        if state.sigma > 0:
            states.append((state.sigma, state.x))

    labels = next(iter(pipe.sample_batches([seed], label, on_step=keep, **options))).labels
    if not states:
        raise TesseraError("one step leaves no noise level in between to show; give more steps")
    cond = Conditioning(
        None if labels is None else torch.from_numpy(labels).to(pipe.device, torch.int64)
    )
    counts = range(1, len(network.bricks) + 1)
    cuts = [
        cut_bricks(pipe.denoiser, BrickSchedule((Range(0.0, math.inf, count),))) for count in counts
    ]
    rows = []
    chosen = np.linspace(0, len(states) - 1, min(levels, len(states))).round().astype(int)
    for sigma, x in (states[index] for index in chosen):
        sigmas = torch.full((1,), sigma)
        with torch.no_grad():
            estimates = [cut(x, sigmas, cond).mean for cut in cuts]
        # Scaled to the spread of images, so that noise does not drown what is there.
        noisy = x / (1 + sigma**2) ** 0.5
        # In words: the font that Pillow carries has no Greek letters.
        rows.append((f"noise {sigma:.3g}", [pipe.to_pixels(v)[0] for v in (noisy, *estimates)]))
    names = [f"brick {k + 1}: {b.size} px" for k, b in enumerate(network.bricks)]
    return _table(["noisy image", *names], rows)


def _table(
    columns: list[str], rows: list[tuple[str, list[NDArray[np.uint8]]]]
) -> NDArray[np.uint8]:
    """Pictures in a grid with a name above each column and before each row."""
    height, width = rows[0][1][0].shape[:2]
    scale = max(1, -(-112 // width))
    height, width, gap, top, left = height * scale, width * scale, 6, 24, 84
    sheet = Image.new(
        "RGB", (left + len(columns) * (width + gap), top + len(rows) * (height + gap)), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for index, name in enumerate(columns):
        draw.text((left + index * (width + gap), 4), name, "black", font)
    for line, (name, pictures) in enumerate(rows):
        y = top + line * (height + gap)
        draw.text((6, y + height // 2 - 8), name, "black", font)
        for index, picture in enumerate(pictures):
            enlarged = to_pil(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged.convert("RGB"), (left + index * (width + gap), y))
    return np.asarray(sheet)

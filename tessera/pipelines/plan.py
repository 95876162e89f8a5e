"""What makes the images of one call, and what comes out: the seam between pipelines of any kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tessera.progress import Bar
from tessera.sampling.core import NoiseSource, Report, SamplerState
from tessera.sampling.seeds import SeedNoise


@dataclass(frozen=True)
class SampledBatch:
    """Finished images of one batch.

    Attributes:
        seeds: one per image.
        labels: int64 [n] class indices; None for models without classes.
        images: uint8 [n, H, W, C].
    """

    seeds: list[int]
    labels: NDArray[np.int64] | None
    images: NDArray[np.uint8]


OnStep = Callable[[Sequence[int], SamplerState], None]
"""Called after every sampler step with the batch's seeds and the sampler's state."""


def counting_steps(bar: Bar, on_step: OnStep | None = None) -> OnStep:
    """Moves a bar of images by the share of each step, then calls `on_step`."""

    def step(seeds: Sequence[int], state: SamplerState) -> None:
        bar.advance(len(seeds) / state.steps)
        if on_step is not None:
            on_step(seeds, state)

    return step


class Plan(Protocol):
    """What makes the images of one call, checked and ready to run.

    Attributes:
        seeds: one for each image.
        classes: int64, of all images; None where each seed draws its own.
        shape: (C, H, W) of a sample in model space.
        facts: what was chosen, as plain JSON values; with the model's own, all that decides what
            the image of a seed looks like.
    """

    @property
    def seeds(self) -> Sequence[int]: ...

    @property
    def classes(self) -> NDArray[np.int64] | None: ...

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def facts(self) -> dict[str, Any]: ...

    def networks(self) -> list[nn.Module]:
        """All networks that run, parts of a network that run alone included."""
        ...

    def helpers(self) -> list[nn.Module]:
        """Other modules that run, by the way; they count as no evaluations."""
        ...

    def noise(self, source: SeedNoise) -> NoiseSource:
        """The source that the sampler draws from."""
        ...

    def start(self, seeds: Sequence[int], noise: NoiseSource) -> Any:
        """What the sampler begins with, drawn before the class of an image."""
        ...

    def states(
        self, seeds: Sequence[int], start: Any, labels: Tensor | None, noise: NoiseSource
    ) -> Iterator[SamplerState]:
        """The steps of the sampler; the last state's `x` becomes the picture."""
        ...

    def picture(self, x: Tensor) -> Tensor:
        """The part of a state's `x` that is shown, in model space."""
        ...

    def report(self) -> Report:
        """What refinements say about all samples of the plan so far; waits for the device."""
        ...

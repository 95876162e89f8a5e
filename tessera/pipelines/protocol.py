"""What every kind of pipeline plans before it makes images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tessera.sampling.core import NoiseSource, SamplerState
from tessera.sampling.seeds import SeedNoise


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

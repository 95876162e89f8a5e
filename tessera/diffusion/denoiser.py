"""The contract of samplers, objectives and wrappers: z at noise level σ to an estimate of x."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from tessera.conditioning import Conditioning


@dataclass(frozen=True)
class Posterior:
    """What a denoiser says about the clean image x given z = A(σ) x + σ n.

    Attributes:
        mean: float32 [B, C, H, W], estimate of x in model space.
        log_variance: float32 [B, C, H, W], log variance of the denoiser's reverse step, for
            networks that learn it; None for all others.
        stages: estimates of x by earlier parts of the network (a stack's bricks), in order and
            without the last, which is `mean`; empty for networks of one part.
    """

    mean: Tensor
    log_variance: Tensor | None = None
    stages: tuple[Tensor, ...] = ()


class Denoiser(nn.Module):
    """Estimates the clean image: (z [B, C, H, W], σ [B], `Conditioning`) to `Posterior`.

    Wrappers (guidance, experts, skipping) are denoisers themselves, so they nest.

    Attributes:
        shape: (C, H, W) of x in model space, as trained.
        num_classes: number of classes that the network knows; 0 if it knows none.
        sigma_min, sigma_max: noise levels that the denoiser supports.
    """

    shape: tuple[int, int, int]
    num_classes: int = 0
    sigma_min: float = 0.0
    sigma_max: float = math.inf

    @abstractmethod
    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        """Estimate x from z [B, C, H, W] at noise levels σ [B]; computed in float32.

        σ may be on the CPU wherever z is: samplers pass it there, so that wrappers which decide by
        it need no synchronisation with the device.
        """

    def for_step(self, sigma: float) -> Denoiser:
        """The denoiser of a sampler's step that begins at noise level σ.

        Samplers ask once a step, so that wrappers which change with the noise level do not change
        between the two evaluations of a second-order step. Itself by default.
        """
        return self

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest supported noise level; keeps dtype and shape. The identity by default."""
        return sigma

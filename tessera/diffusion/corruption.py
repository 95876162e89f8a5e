"""How clean images become noisy ones: z = A(σ) x + σ n."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tessera.randomness import Draws


class Corruption(Protocol):
    """What an objective does to clean images before a denoiser sees them."""

    def __call__(self, x: Tensor, sigma: Tensor, draws: Draws) -> Tensor:
        """z [B, C, H, W] from x like it at noise levels σ [B]; draws "noise"."""
        ...


@dataclass(frozen=True)
class GaussianCorruption:
    """A(σ) = identity, n white: z = x + σ n."""

    def __call__(self, x: Tensor, sigma: Tensor, draws: Draws) -> Tensor:
        """Corrupt x [B, C, H, W] at noise levels σ [B]; draws "noise"."""
        return x + sigma[:, None, None, None] * draws.normal("noise", *x.shape[1:])


GAUSSIAN = GaussianCorruption()
"""The corruption of all methods but relay diffusion's later stages."""

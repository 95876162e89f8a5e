"""The contract of samplers, objectives and wrappers: z at noise level σ to an estimate of x."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
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

    @property
    def estimates(self) -> tuple[Tensor, ...]:
        """All estimates of x, in order; the last one is `mean`."""
        return (*self.stages, self.mean)


def joined(parts: Sequence[Posterior], rows: Sequence[Tensor]) -> Posterior:
    """The posterior of a batch from those of its parts.

    Args:
        parts: what different denoisers say; what not all of them know is left out.
        rows: for each part the numbers of its images in the batch, int64.
    """
    order = torch.cat([*rows]).argsort().to(parts[0].mean.device)

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([*tensors])[order]

    variances = [part.log_variance for part in parts if part.log_variance is not None]
    stages = [part.stages for part in parts]
    same = len({len(each) for each in stages}) == 1
    return Posterior(
        join([part.mean for part in parts]),
        join(variances) if len(variances) == len(parts) else None,
        tuple(map(join, zip(*stages, strict=True))) if same else (),
    )


class Denoiser(nn.Module):
    """Estimates the clean image: (z [B, C, H, W], σ [B], `Conditioning`) to `Posterior`.

    Wrappers (guidance, experts, skipping) are denoisers themselves, so they nest; see `Wrapper`.

    Attributes:
        shape: (C, H, W) of x in model space, as trained.
        num_classes: number of classes that the network knows; 0 if it knows none.
        sigma_min, sigma_max: noise levels that the denoiser supports.
        guided: guidance acts on its estimates, which may leave the range of images by it.
    """

    shape: tuple[int, int, int]
    num_classes: int = 0
    sigma_min: float = 0.0
    sigma_max: float = math.inf
    guided: bool = False

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

    @property
    def levels(self) -> Tensor | None:
        """Of denoisers that know some noise levels only: all, float64 [N] on the CPU, rising.

        None for denoisers of a continuous range.
        """
        return None

    def for_levels(self, levels: Tensor) -> Denoiser:
        """The denoiser of a reverse process that visits these noise levels only, rising.

        Its `log_variance` is that of the steps between them; itself where none is learned.
        """
        return self

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest supported noise level; keeps dtype and shape. The identity by default."""
        return sigma


class Wrapper(Denoiser):
    """A denoiser around another one, of which everything holds that a subclass does not change.

    A subclass changes `forward`, and says in `around` how it is put around a part of the inner one.

    Args:
        denoiser: the inner one.
    """

    denoiser: Denoiser

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.shape, self.num_classes = denoiser.shape, denoiser.num_classes
        self.sigma_min, self.sigma_max = denoiser.sigma_min, denoiser.sigma_max
        self.guided = denoiser.guided

    @abstractmethod
    def around(self, denoiser: Denoiser) -> Denoiser:
        """The same wrapper around `denoiser`, which is made from the inner one."""

    def for_step(self, sigma: float) -> Denoiser:
        return self._around(self.denoiser.for_step(sigma))

    @property
    def levels(self) -> Tensor | None:
        return self.denoiser.levels

    def for_levels(self, levels: Tensor) -> Denoiser:
        return self._around(self.denoiser.for_levels(levels))

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self.denoiser.round_sigma(sigma)

    def _around(self, denoiser: Denoiser) -> Denoiser:
        return self if denoiser is self.denoiser else self.around(denoiser)

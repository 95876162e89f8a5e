"""What a denoiser is trained on: noise levels, their weights, and the weighted squared error."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.corruption import GAUSSIAN, Corruption
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.schedules import vp_sigma, vp_time
from tessera.errors import TesseraError
from tessera.randomness import Draws

EVERYWHERE = (0.0, math.inf)

Reduction = Literal["sum", "mean"]
"""How an objective's loss of an image comes from those of its pixels; views weight it by that."""

Objective = Callable[[Any, Tensor, Conditioning, Draws], dict[str, Tensor]]
"""What training minimises: (model, x [B, C, H, W], conditioning, draws) to terms [B] per image.

"loss" is minimised; "quartile", int64, if it is there, says to which quarter of the noise levels an
image belongs. Its attribute `reduction`, "sum" if there is none, is explained at `Reduction`; parts
of images that it can train on begin and end at multiples of its `alignment`, 1 if there is none.
"""


def within(range_: tuple[float, float], low: float, high: float) -> tuple[float, float]:
    """The common part of two ranges of noise levels.

    Raises:
        TesseraError: there is none.
    """
    common = max(range_[0], low), min(range_[1], high)
    if not common[0] < common[1]:
        raise TesseraError(
            f"the expert owns noise levels {range_[0]:g} to {range_[1]:g}, of which the objective "
            f"draws none ({low:g} to {high:g}). Choose other snr_splits"
        )
    return common


@dataclass(frozen=True, kw_only=True)
class DenoisingObjective(ABC):
    """Denoising score matching: w(σ) |D(x + σ n; σ) - x|², with σ drawn per image.

    Of a denoiser that gives several estimates (the bricks of a jointly trained stack), the loss is
    the mean over all of them.

    Args:
        label_dropout: share of images trained without their class, for guidance.
        sigma_range: draw noise levels low <= σ < high only, as one of several experts.
        corruption: what makes z of x.
    """

    reduction: ClassVar[Reduction] = "sum"
    label_dropout: float = 0.0
    sigma_range: tuple[float, float] = EVERYWHERE
    corruption: Corruption = GAUSSIAN

    @abstractmethod
    def sigma(self, draws: Draws) -> Tensor:
        """Noise levels [B]; draws "sigma"."""

    @abstractmethod
    def weight(self, sigma: Tensor) -> Tensor:
        """Weight of the squared error at noise levels σ, shaped like σ."""

    @abstractmethod
    def share_below(self, sigma: Tensor) -> Tensor:
        """The share of the noise levels drawn that are lower than σ, shaped like σ."""

    def elementwise(
        self, denoiser: Denoiser, x: Tensor, cond: Conditioning, draws: Draws, sigma: Tensor
    ) -> Tensor:
        """The weighted squared error of each pixel at noise levels σ [B], float32 [B, C, H, W]."""
        if self.label_dropout > 0:
            cond = cond.drop_labels(draws.uniform("label_dropout") < self.label_dropout)
        z = self.corruption(x, sigma, draws)
        posterior = denoiser(z, sigma, cond)
        error = torch.stack([(d - x).square() for d in posterior.estimates]).mean(dim=0)
        return self.weight(sigma)[:, None, None, None] * error

    def __call__(
        self, denoiser: Denoiser, x: Tensor, cond: Conditioning, draws: Draws
    ) -> dict[str, Tensor]:
        """Loss terms of clean images x [B, C, H, W], each [B].

        "loss" is the sum over channels and pixels; its mean over the batch is optimised.
        "quartile", 0 to 3 from the cleanest, is that of the noise level among those drawn. Draws
        "sigma", "noise", and "label_dropout" if there is any.
        """
        sigma = self.sigma(draws)
        error = self.elementwise(denoiser, x, cond, draws, sigma)
        quartile = (4 * self.share_below(sigma)).long().clamp(0, 3)
        return {"loss": error.sum(dim=(1, 2, 3)), "quartile": quartile}


@dataclass(frozen=True, kw_only=True)
class EdmObjective(DenoisingObjective):
    """EDM (Karras et al. 2022, table 1): log-normal σ, weight (σ² + σ_d²) / (σ σ_d)².

    Args:
        p_mean, p_std: mean and deviation of ln σ.
        sigma_data: standard deviation σ_d of the data.
    """

    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_data: float = 0.5

    def sigma(self, draws: Draws) -> Tensor:
        if self.sigma_range == EVERYWHERE:
            return torch.exp(draws.normal("sigma") * self.p_std + self.p_mean)
        low, high = self._ends()
        share = low + (high - low) * draws.uniform("sigma").to(torch.float64)
        log_sigma: Tensor = torch.special.ndtri(share) * self.p_std + self.p_mean
        return log_sigma.exp().clamp(*self.sigma_range).to(torch.float32)

    def share_below(self, sigma: Tensor) -> Tensor:
        low, high = self._ends()
        share: Tensor = torch.special.ndtr((sigma.log() - self.p_mean) / self.p_std)
        return (share - low) / (high - low)

    def _ends(self) -> tuple[float, float]:
        """Share of all levels below the lowest and below the highest of `sigma_range`."""
        low, high = (self._below(sigma) for sigma in self.sigma_range)
        return low, high

    def _below(self, sigma: float) -> float:
        if sigma in EVERYWHERE:
            return float(sigma > 0)
        return 0.5 * math.erfc((self.p_mean - math.log(sigma)) / self.p_std / math.sqrt(2))

    def weight(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


@dataclass(frozen=True, kw_only=True)
class VpObjective(DenoisingObjective):
    """Variance preserving (Song et al. 2021): uniform t in (ε_t, 1], weight 1 / σ².

    Args:
        beta_d, beta_min: of the schedule σ(t).
        epsilon_t: smallest time trained on.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5

    def sigma(self, draws: Draws) -> Tensor:
        first, last = self._times()
        t = last + draws.uniform("sigma") * (first - last)
        return vp_sigma(t, self.beta_d, self.beta_min)

    def share_below(self, sigma: Tensor) -> Tensor:
        first, last = self._times()
        return (vp_time(sigma, self.beta_d, self.beta_min) - first) / (last - first)

    def _times(self) -> tuple[float, float]:
        """First and last time that is drawn."""
        first, last = self.epsilon_t, 1.0
        if self.sigma_range != EVERYWHERE:
            ends = torch.tensor([first, last], dtype=torch.float64, device="cpu")
            low, high = within(
                self.sigma_range, *vp_sigma(ends, self.beta_d, self.beta_min).tolist()
            )
            levels = torch.tensor([low, high], dtype=torch.float64, device="cpu")
            first, last = vp_time(levels, self.beta_d, self.beta_min).tolist()
        return first, last

    def weight(self, sigma: Tensor) -> Tensor:
        return sigma.square().reciprocal()


@dataclass(frozen=True, kw_only=True)
class VeObjective(DenoisingObjective):
    """Variance exploding (Song et al. 2021): log-uniform σ, weight 1 / σ².

    Args:
        sigma_min, sigma_max: range of the noise levels.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def sigma(self, draws: Draws) -> Tensor:
        low, high = within(self.sigma_range, self.sigma_min, self.sigma_max)
        sigma: Tensor = low * (high / low) ** draws.uniform("sigma")
        return sigma

    def share_below(self, sigma: Tensor) -> Tensor:
        low, high = within(self.sigma_range, self.sigma_min, self.sigma_max)
        return (sigma / low).log() / math.log(high / low)

    def weight(self, sigma: Tensor) -> Tensor:
        return sigma.square().reciprocal()

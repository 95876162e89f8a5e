"""What a denoiser is trained on: noise levels, their weights, and the weighted squared error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.corruption import GaussianCorruption
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.schedules import vp_sigma
from tessera.randomness import Draws


@dataclass(frozen=True, kw_only=True)
class DenoisingObjective(ABC):
    """Denoising score matching: w(σ) |D(x + σ n; σ) - x|², with σ drawn per image.

    Of a denoiser that gives several estimates (the bricks of a jointly trained stack), the loss is
    the mean over all of them.

    Args:
        label_dropout: share of images trained without their class, for guidance.
    """

    label_dropout: float = 0.0

    @abstractmethod
    def sigma(self, draws: Draws) -> Tensor:
        """Noise levels [B]; draws "sigma"."""

    @abstractmethod
    def weight(self, sigma: Tensor) -> Tensor:
        """Weight of the squared error at noise levels σ, shaped like σ."""

    def elementwise(
        self, denoiser: Denoiser, x: Tensor, cond: Conditioning, draws: Draws
    ) -> Tensor:
        """The weighted squared error of each pixel, float32 [B, C, H, W]."""
        if self.label_dropout > 0:
            cond = cond.drop_labels(draws.uniform("label_dropout") < self.label_dropout)
        sigma = self.sigma(draws)
        z = GaussianCorruption()(x, sigma, draws)
        posterior = denoiser(z, sigma, cond)
        estimates = (*posterior.stages, posterior.mean)
        error = torch.stack([(d - x).square() for d in estimates]).mean(dim=0)
        return self.weight(sigma)[:, None, None, None] * error

    def __call__(
        self, denoiser: Denoiser, x: Tensor, cond: Conditioning, draws: Draws
    ) -> dict[str, Tensor]:
        """Loss terms of clean images x [B, C, H, W], each [B].

        "loss" is the sum over channels and pixels; its mean over the batch is optimised. Draws
        "sigma", "noise", and "label_dropout" if there is any.
        """
        return {"loss": self.elementwise(denoiser, x, cond, draws).sum(dim=(1, 2, 3))}


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
        return torch.exp(draws.normal("sigma") * self.p_std + self.p_mean)

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
        t = 1 + draws.uniform("sigma") * (self.epsilon_t - 1)
        return vp_sigma(t, self.beta_d, self.beta_min)

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
        sigma: Tensor = self.sigma_min * (self.sigma_max / self.sigma_min) ** draws.uniform("sigma")
        return sigma

    def weight(self, sigma: Tensor) -> Tensor:
        return sigma.square().reciprocal()

"""Experts: several denoisers, each of which owns an interval of the signal-to-noise ratio."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import (
    Denoiser,
    EnergyNetwork,
    Posterior,
    Valued,
    by_owner,
)
from tessera.errors import TesseraError


def check_thresholds(thresholds: Sequence[float]) -> None:
    """Refuse thresholds that do not fall.

    Raises:
        TesseraError: a threshold is not positive, or not below the one before it.
    """
    values = [math.inf, *thresholds]
    if any(not 0 < b < a for a, b in itertools.pairwise(values)):
        raise TesseraError(
            f"SNR thresholds {', '.join(f'{t:g}' for t in thresholds)}: they must be positive and "
            "fall from expert to expert, like 4,0.25"
        )


def sigma_range(thresholds: Sequence[float], expert: int) -> tuple[float, float]:
    """The noise levels low <= σ < high of an expert; expert 0 owns the cleanest ones.

    Expert k owns s_k >= SNR > s_(k+1) with SNR = 1 / σ² and thresholds s_1 > s_2 > ...

    Raises:
        TesseraError: there is no such expert, or the thresholds do not fall.
    """
    check_thresholds(thresholds)
    if not 0 <= expert <= len(thresholds):
        raise TesseraError(
            f"there is no expert {expert}: {len(thresholds)} thresholds make experts 0 to "
            f"{len(thresholds)}, from low noise to high"
        )
    bounds = [0.0, *(threshold**-0.5 for threshold in thresholds), math.inf]
    return bounds[expert], bounds[expert + 1]


class Experts(Denoiser):
    """Each noise level is handled by the expert that owns it; costs one evaluation.

    Args:
        denoisers: from the cleanest interval to the noisiest.
        thresholds: of the SNR, falling; one fewer than there are experts.

    Raises:
        TesseraError: numbers that do not match, thresholds that do not fall, or experts for
            different images.
    """

    def __init__(self, denoisers: Sequence[Denoiser], thresholds: Sequence[float]) -> None:
        super().__init__()
        check_thresholds(thresholds)
        if len(denoisers) != len(thresholds) + 1:
            raise TesseraError(
                f"{len(thresholds)} SNR thresholds need {len(thresholds) + 1} experts, not "
                f"{len(denoisers)}"
            )
        first = denoisers[0]
        for other in denoisers[1:]:
            if (other.shape, other.num_classes) != (first.shape, first.num_classes):
                raise TesseraError(
                    f"experts must make the same images: one has shape {first.shape} and "
                    f"{first.num_classes} classes, another {other.shape} and {other.num_classes}"
                )
        self.experts = nn.ModuleList(denoisers)
        self.thresholds = tuple(thresholds)
        self.bounds = [threshold**-0.5 for threshold in thresholds]
        self.shape = first.shape
        self.num_classes = first.num_classes
        self.sigma_min = denoisers[0].sigma_min
        self.sigma_max = denoisers[-1].sigma_max
        self.guided = any(denoiser.guided for denoiser in denoisers)

    def owned(self) -> list[tuple[Denoiser, tuple[float, float]]]:
        """Each expert with its noise levels low <= σ < high."""
        bands = itertools.pairwise([0.0, *self.bounds, math.inf])
        return list(zip(self.denoisers(), bands, strict=True))

    def owner(self, sigma: Tensor) -> Tensor:
        """Number of the expert at noise levels σ; int64, shaped like σ, where σ is."""
        bounds = torch.tensor(self.bounds, dtype=sigma.dtype, device=sigma.device)
        return torch.bucketize(sigma, bounds, right=True)

    @property
    def levels(self) -> Tensor | None:
        own = [expert.levels for expert in self.denoisers()]
        if any(levels is None for levels in own):
            return None
        parts = [
            levels[self.owner(levels) == index]
            for index, levels in enumerate(own)
            if levels is not None
        ]
        return torch.cat(parts)

    def for_levels(self, levels: Tensor) -> Experts:
        return Experts([e.for_levels(levels) for e in self.denoisers()], self.thresholds)

    def for_step(self, sigma: float) -> Denoiser:
        return Experts([e.for_step(sigma) for e in self.denoisers()], self.thresholds)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        rounded, owner = sigma.clone(), self.owner(sigma)
        for index, expert in enumerate(self.denoisers()):
            rounded = torch.where(owner == index, expert.round_sigma(sigma), rounded)
        return rounded

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        """As every denoiser; free of synchronisation where `sigma` is on the CPU."""
        return by_owner(self.owner(sigma.reshape(-1)), z, sigma, cond, self._estimate)

    def time(self, sigma: Tensor) -> Tensor:
        return self.denoisers()[0].time(sigma)

    def value(self, z: Tensor, sigma: Tensor, cond: Conditioning, *, gradient: bool) -> Valued:
        """Of each image that of the expert of its noise level."""
        owner = self.owner(sigma)
        energy, mean = z.new_zeros(len(z)), torch.zeros_like(z) if gradient else None
        for expert in sorted(set(owner.tolist())):
            rows = (owner == expert).nonzero()[:, 0]
            here = rows.to(z.device)
            own = self.denoisers()[expert].value(
                z[here], sigma[rows], cond[here], gradient=gradient
            )
            energy = energy.index_copy(0, here, own.energy)
            if mean is not None and own.mean is not None:
                mean = mean.index_copy(0, here, own.mean)
        return Valued(energy, mean)

    def check_energy(self) -> None:
        for expert in self.denoisers():
            expert.check_energy()

    def energy_network(self, sigma: float = 0.0) -> EnergyNetwork:
        level = torch.tensor(sigma, dtype=torch.float64)
        return self.denoisers()[int(self.owner(level))].energy_network(sigma)

    def _estimate(self, expert: int, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        posterior: Posterior = self.experts[expert](z, sigma, cond)
        return posterior

    def denoisers(self) -> list[Denoiser]:
        """The experts, from the cleanest interval to the noisiest."""
        return [expert for expert in self.experts if isinstance(expert, Denoiser)]

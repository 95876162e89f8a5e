"""Where the steps of samplers begin: noise levels, falling, without the final 0.

Each function takes the denoiser first, because only levels that it supports are visited.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from tessera.diffusion import schedules
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.discrete import Process, spaced_steps
from tessera.errors import TesseraError
from tessera.sampling.core import noise_range, round_sigmas


def edm_levels(
    denoiser: Denoiser,
    *,
    steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> list[float]:
    """From σ_max to σ_min, evenly spaced in σ^(1/ρ) (EDM, equation 5).

    Args:
        steps: number of levels; one step goes from σ_max to 0.
        sigma_min, sigma_max: ends, cut to what the denoiser supports.
        rho: larger values take shorter steps near σ_min.

    Raises:
        TesseraError: no noise levels lie between the ends.
    """
    low, high = noise_range(denoiser, sigma_min, sigma_max)
    return round_sigmas(denoiser, schedules.edm_steps(steps, low, high, rho))


def process_levels(
    denoiser: Denoiser, *, steps: str = "", noise_schedule: str | None = None
) -> list[float]:
    """Those of a discrete process: the denoiser's own, or a named one's that it supports.

    Args:
        steps: "" for all of the process, or a spacing: "250", "90,60,60,20,20", "ddim50"; see
            `spaced_steps`.
        noise_schedule: the process of denoisers that know a continuous range of noise levels, 1000
            steps of "linear", "cosine", ...; None for the denoiser's own.

    Raises:
        TesseraError: a spacing that the process does not have, or a continuous denoiser without
            `noise_schedule`.
    """
    levels = denoiser.levels
    if levels is None:
        if noise_schedule is None:
            raise TesseraError(
                "this model knows a continuous range of noise levels, and samplers of discrete "
                "processes need to be told which ones to visit: give `noise_schedule=linear` "
                "or another, or use `sampler=edm`"
            )
        levels = Process.named(noise_schedule).sigmas
        levels = levels[(levels >= denoiser.sigma_min) & (levels <= denoiser.sigma_max)]
    kept: list[float] = levels[spaced_steps(len(levels), steps)].flip(0).tolist()
    return kept


def listed_levels(denoiser: Denoiser, *, sigmas: Sequence[float]) -> list[float]:
    """The given noise levels, or those nearest to them that the denoiser supports.

    Raises:
        TesseraError: they do not fall, or the denoiser does not tell some of them apart.
    """
    kept = round_sigmas(denoiser, torch.tensor(sigmas, dtype=torch.float64))
    if not kept or kept[-1] <= 0 or any(a <= b for a, b in itertools.pairwise(kept)):
        shown = ", ".join(f"{sigma:g}" for sigma in sigmas)
        raise TesseraError(
            f"noise levels {shown}: they must be positive and fall from step to step, at levels "
            "that the model supports"
        )
    return kept

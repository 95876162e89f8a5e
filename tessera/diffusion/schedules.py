"""Noise levels over time: σ(t), its inverse and derivative, and the discretisations of samplers.

Functions keep the dtype of their argument; steps are float64 (EDM, table 1 and section D).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def vp_sigma(t: Tensor, beta_d: float = 19.9, beta_min: float = 0.1) -> Tensor:
    """Variance preserving: σ(t) = √(exp(½ β_d t² + β_min t) - 1), t in [0, 1]."""
    return torch.expm1(0.5 * beta_d * t**2 + beta_min * t).sqrt()


def vp_time(sigma: Tensor, beta_d: float = 19.9, beta_min: float = 0.1) -> Tensor:
    """The inverse of `vp_sigma`."""
    return ((beta_min**2 + 2 * beta_d * torch.log1p(sigma**2)).sqrt() - beta_min) / beta_d


def vp_sigma_derivative(t: Tensor, beta_d: float = 19.9, beta_min: float = 0.1) -> Tensor:
    """dσ/dt of `vp_sigma`: ½ (β_min + β_d t) (σ + 1/σ)."""
    sigma = vp_sigma(t, beta_d, beta_min)
    return 0.5 * (beta_min + beta_d * t) * (sigma + 1 / sigma)


def ve_sigma(t: Tensor) -> Tensor:
    """Variance exploding: σ(t) = √t."""
    return t.sqrt()


def ve_time(sigma: Tensor) -> Tensor:
    """The inverse of `ve_sigma`."""
    return sigma**2


def ve_sigma_derivative(t: Tensor) -> Tensor:
    """dσ/dt of `ve_sigma`."""
    return 0.5 / t.sqrt()


@lru_cache
def iddpm_table(
    timesteps: int = 1000,
    c_1: float = 0.001,
    c_2: float = 0.008,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The noise levels u_0 > u_1 > ... > u_M = 0 of improved DDPM's cosine schedule.

    ᾱ is float32 whatever the dtype of the recursion: its rounding moves the smallest levels by up
    to 5e-4, and the released networks know the rounded ones (float32; its sampler uses float64).

    Args:
        timesteps: M; the table has M + 1 entries, on the CPU.
        c_1: lower limit of ᾱ_{j-1} / ᾱ_j.
        c_2: offset of the cosine.
        dtype: of the recursion and of the table.
    """
    j = torch.arange(timesteps + 1, device="cpu", dtype=torch.float32)
    alpha_bar = (0.5 * math.pi * j / timesteps / (c_2 + 1)).sin() ** 2
    ratio = (alpha_bar[:-1] / alpha_bar[1:]).clamp(min=c_1)
    table = torch.zeros(timesteps + 1, dtype=dtype, device="cpu")
    for step in range(timesteps, 0, -1):
        table[step - 1] = ((table[step] ** 2 + 1) / ratio[step - 1] - 1).sqrt()
    return table


def _ramp(steps: int) -> Tensor:
    """`steps` numbers from 0 to 1; the single one of one step is 0."""
    return torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)


def edm_steps(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """Noise levels from σ_max down to σ_min, evenly spaced in σ^(1/ρ) (EDM, equation 5).

    float64 [steps]; a single step is σ_max alone.
    """
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas: Tensor = (first + _ramp(steps) * (last - first)) ** rho
    return sigmas


def vp_steps(steps: int, beta_d: float, beta_min: float, epsilon_s: float = 1e-3) -> Tensor:
    """Noise levels at times evenly spaced from 1 to ε_s; float64 [steps]."""
    return vp_sigma(1 + _ramp(steps) * (epsilon_s - 1), beta_d, beta_min)


def ve_steps(steps: int, sigma_min: float = 0.02, sigma_max: float = 100.0) -> Tensor:
    """Noise levels from σ_max to σ_min in geometric progression; float64 [steps]."""
    return sigma_max * (sigma_min / sigma_max) ** _ramp(steps)


def iddpm_steps(
    steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 81.0,
    timesteps: int = 1000,
    c_1: float = 0.001,
    c_2: float = 0.008,
) -> Tensor:
    """Entries of `iddpm_table` within the range, evenly spaced by index; float64 [steps]."""
    table = iddpm_table(timesteps, c_1, c_2)
    table = table[(table >= sigma_min) & (table <= sigma_max)]
    return table[(_ramp(steps) * (len(table) - 1)).round().long()]


def vp_betas(sigma_min: float, sigma_max: float, epsilon_s: float = 1e-3) -> tuple[float, float]:
    """The (β_d, β_min) whose σ(t) runs from σ_min at ε_s to σ_max at 1."""
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
    return beta_d, high - 0.5 * beta_d

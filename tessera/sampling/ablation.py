"""EDM's generalised sampler: any time steps, schedule σ(t), scaling s(t) and second-order method.

Karras et al. 2022, table 1 and algorithm 3; reproduces the samplers of score_sde (VP, VE) and
improved DDPM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion import schedules
from tessera.diffusion.denoiser import Denoiser
from tessera.sampling.core import (
    NoiseSource,
    Refine,
    Sampler,
    SamplerState,
    churned,
    denoise,
    noise_range,
    round_sigmas,
    state_dtype,
)

Discretization = Literal["edm", "vp", "ve", "iddpm"]
Schedule = Literal["linear", "vp", "ve"]
Scaling = Literal["none", "vp"]


@torch.no_grad()
def sample_ablation(
    denoiser: Denoiser,
    latents: Tensor,
    cond: Conditioning,
    noise: NoiseSource,
    levels: Sequence[float],
    *,
    solver: Literal["heun", "euler"] = "heun",
    discretization: Discretization = "edm",
    schedule: Schedule = "linear",
    scaling: Scaling = "none",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    epsilon_s: float = 1e-3,
    alpha: float = 1.0,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    refine: Refine | None = None,
) -> Iterator[SamplerState]:
    """From unit normal `latents` [B, C, H, W] to samples, by the ODE of any σ(t) and s(t).

    The states that are yielded are x / s, at noise level σ like those of every sampler.

    Args:
        levels: noise levels at which the steps begin, falling.
        solver: "heun" stands for the second-order method that `alpha` selects.
        discretization: which noise levels the ODE's σ(t) runs over by default.
        schedule: σ(t) of the ODE: t, VP's or √t.
        scaling: s(t) of the ODE: 1, or VP's 1 / √(1 + σ²).
        sigma_min, sigma_max: the range of VP's σ(t), cut to what the denoiser supports; by default
            that of the discretisation.
        epsilon_s: VP's last time.
        alpha: where the second evaluation is made, as a share of the step: 1 is Heun's method,
            1/2 the midpoint method.
        s_churn, s_min, s_max, s_noise: as in `sample_edm`.
        refine: improves x after each step.
    """
    low, high = _range(denoiser, discretization, sigma_min, sigma_max, epsilon_s)
    curve = _curve(schedule, *schedules.vp_betas(low, high, epsilon_s))
    scale = _scale(scaling)
    steps, t = len(levels), [*map(curve.time, levels), 0.0]
    sigmas = [curve.sigma(time) for time in t[:-1]]
    t_hat = [*map(curve.time, churned(denoiser, sigmas, s_churn, s_min, s_max))]
    # Without churn a step starts where the last one ended, also in the last digit.
    sigmas_hat = [curve.sigma(time) for time in t_hat]

    def slope(model: Denoiser, x: Tensor, time: float) -> tuple[Tensor, Tensor]:
        """dx/dt at `time` (equation 4) and the denoiser's estimate."""
        sigma, s = curve.sigma(time), scale.value(curve.sigma(time))
        growth = curve.derivative(time) / sigma
        shrink = scale.derivative(sigma) * curve.derivative(time) / s
        denoised = denoise(model, x / s, sigma, cond)
        return (growth + shrink) * x - growth * s * denoised, denoised

    x = latents.to(state_dtype(latents.device)) * (sigmas[0] * scale.value(sigmas[0]))
    for i in range(steps):
        # Add noise to go from t_i up to t̂_i.
        s_hat = scale.value(sigmas_hat[i])
        x = x * (s_hat / scale.value(sigmas[i]))
        if s_churn > 0:
            epsilon = noise.normal(tuple(x.shape[1:]), x.dtype)
            added = math.sqrt(max(sigmas_hat[i] ** 2 - sigmas[i] ** 2, 0.0))
            x = x + added * s_hat * s_noise * epsilon

        # Euler step from t̂_i to t_{i+1}, or to a share α of it where a correction follows.
        h = t[i + 1] - t_hat[i]
        model = denoiser.for_step(sigmas[i])
        d, denoised = slope(model, x, t_hat[i])
        if solver == "euler" or i == steps - 1:
            x = x + h * d
        else:
            d_prime, denoised = slope(model, x + alpha * h * d, t_hat[i] + alpha * h)
            x = x + h * ((1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * d_prime)
        sigma = curve.sigma(t[i + 1])
        s = scale.value(sigma)
        if refine is not None:
            x = refine(model, x / s, sigma, cond, noise) * s
        yield SamplerState(i + 1, steps, sigma, x / s if s != 1 else x, denoised)


def ablation_levels(
    denoiser: Denoiser,
    *,
    steps: int = 18,
    discretization: Discretization = "edm",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    epsilon_s: float = 1e-3,
    c_1: float = 0.001,
    c_2: float = 0.008,
    timesteps: int = 1000,
) -> list[float]:
    """The noise levels of a method, falling.

    Args:
        steps: number of levels; one step goes from σ_max to 0.
        discretization: where they are: EDM's, VP's, VE's or improved DDPM's noise levels.
        sigma_min, sigma_max: ends, cut to what the denoiser supports; by default those of the
            discretisation.
        rho: EDM's exponent of the steps.
        epsilon_s: VP's last time.
        c_1, c_2, timesteps: of improved DDPM's table of noise levels.

    Raises:
        TesseraError: no noise levels lie between the ends.
    """
    low, high = _range(denoiser, discretization, sigma_min, sigma_max, epsilon_s)
    if discretization == "vp":
        levels = schedules.vp_steps(steps, *schedules.vp_betas(low, high, epsilon_s), epsilon_s)
    elif discretization == "ve":
        levels = schedules.ve_steps(steps, low, high)
    elif discretization == "iddpm":
        levels = schedules.iddpm_steps(steps, low, high, timesteps, c_1, c_2)
    else:
        levels = schedules.edm_steps(steps, low, high, rho)
    return round_sigmas(denoiser, levels)


def ablation_sampler(
    *,
    steps: int = 18,
    discretization: Discretization = "edm",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    epsilon_s: float = 1e-3,
    c_1: float = 0.001,
    c_2: float = 0.008,
    timesteps: int = 1000,
    **options: Any,
) -> Sampler:
    """The generalised solver at the noise levels of a method.

    Args:
        steps, rho, c_1, c_2, timesteps: see `ablation_levels`.
        discretization, sigma_min, sigma_max, epsilon_s: of the levels and of the solver.
        options: further ones of `sample_ablation`.
    """
    shared: dict[str, Any] = {
        "discretization": discretization,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
        "epsilon_s": epsilon_s,
    }
    levels = partial(
        ablation_levels, steps=steps, rho=rho, c_1=c_1, c_2=c_2, timesteps=timesteps, **shared
    )
    return Sampler(levels, partial(sample_ablation, **shared, **options))


@dataclass(frozen=True)
class _Curve:
    """σ(t), its inverse and its derivative, on Python numbers."""

    sigma: Callable[[float], float]
    time: Callable[[float], float]
    derivative: Callable[[float], float]


@dataclass(frozen=True)
class _Scale:
    """s as a function of σ, and ds/dσ."""

    value: Callable[[float], float]
    derivative: Callable[[float], float]


def _curve(schedule: Schedule, beta_d: float, beta_min: float) -> _Curve:
    if schedule == "vp":
        return _Curve(
            _scalar(lambda t: schedules.vp_sigma(t, beta_d, beta_min)),
            _scalar(lambda sigma: schedules.vp_time(sigma, beta_d, beta_min)),
            _scalar(lambda t: schedules.vp_sigma_derivative(t, beta_d, beta_min)),
        )
    if schedule == "ve":
        return _Curve(
            _scalar(schedules.ve_sigma),
            _scalar(schedules.ve_time),
            _scalar(schedules.ve_sigma_derivative),
        )
    return _Curve(lambda t: t, lambda sigma: sigma, lambda t: 1.0)


def _scale(scaling: Scaling) -> _Scale:
    if scaling == "vp":
        return _Scale(
            lambda sigma: (1 + sigma**2) ** -0.5, lambda sigma: -sigma * (1 + sigma**2) ** -1.5
        )
    return _Scale(lambda sigma: 1.0, lambda sigma: 0.0)


def _scalar(function: Callable[[Tensor], Tensor]) -> Callable[[float], float]:
    return lambda value: function(torch.tensor(value, dtype=torch.float64)).item()


def _range(
    denoiser: Denoiser,
    discretization: Discretization,
    sigma_min: float | None,
    sigma_max: float | None,
    epsilon_s: float,
) -> tuple[float, float]:
    """Ends of the noise levels: those given, or the method's, as far as the denoiser knows them."""
    if discretization == "vp":
        times = torch.tensor([epsilon_s, 1.0], dtype=torch.float64)
        low, high = schedules.vp_sigma(times).tolist()
    else:
        low, high = {"ve": (0.02, 100.0), "iddpm": (0.002, 81.0), "edm": (0.002, 80.0)}[
            discretization
        ]
    return noise_range(
        denoiser,
        low if sigma_min is None else sigma_min,
        high if sigma_max is None else sigma_max,
    )

"""The sampler of EDM: Heun's second-order method with optional churn.

Karras, Aittala, Aila & Laine 2022, "Elucidating the design space of diffusion-based generative
models", algorithms 1 (deterministic) and 2 (stochastic).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.schedules import edm_steps
from tessera.sampling.core import (
    NoiseSource,
    Refine,
    SamplerState,
    churned,
    denoise,
    noise_range,
    round_sigmas,
    state_dtype,
)


@torch.no_grad()
def sample_edm(
    denoiser: Denoiser,
    latents: Tensor,
    cond: Conditioning,
    noise: NoiseSource,
    *,
    steps: int = 18,
    solver: Literal["heun", "euler"] = "heun",
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    refine: Refine | None = None,
) -> Iterator[SamplerState]:
    """From unit normal `latents` [B, C, H, W] to samples; 2 steps - 1 calls of the denoiser.

    With `s_churn` > 0, noise is drawn at every step, also outside [s_min, s_max], so that a seed's
    image does not jump when the window moves past a step; with 0, none is needed and none drawn.

    Args:
        steps: number of steps; one step goes from σ_max to 0.
        solver: "euler" leaves out the second-order correction (one call a step).
        sigma_min, sigma_max: ends of the noise levels, cut to what the denoiser supports.
        rho: larger values take shorter steps near σ_min.
        s_churn, s_min, s_max, s_noise: amount of added noise, the range of σ in which it is added,
            and its scale.
        refine: improves x after each step.

    Raises:
        TesseraError: no noise levels lie between the ends.
    """
    sigma_min, sigma_max = noise_range(denoiser, sigma_min, sigma_max)
    t = [*round_sigmas(denoiser, edm_steps(steps, sigma_min, sigma_max, rho)), 0.0]
    t_hat = churned(denoiser, t[:-1], s_churn, s_min, s_max)

    x = latents.to(state_dtype(latents.device)) * t[0]
    for i in range(steps):
        # Add noise to go from t_i up to t̂_i.
        if s_churn > 0:
            epsilon = noise.normal(tuple(x.shape[1:]), x.dtype)
            x = x + math.sqrt(max(t_hat[i] ** 2 - t[i] ** 2, 0.0)) * s_noise * epsilon

        # Euler step from t̂_i to t_{i+1}.
        model = denoiser.for_step(t[i])
        h = t[i + 1] - t_hat[i]
        denoised = denoise(model, x, t_hat[i], cond)
        d = (x - denoised) / t_hat[i]
        x_next = x + h * d

        # Second-order correction.
        if solver == "heun" and t[i + 1] > 0:
            denoised = denoise(model, x_next, t[i + 1], cond)
            x_next = x + h * (d + (x_next - denoised) / t[i + 1]) / 2

        x = x_next if refine is None else refine(x_next, t[i + 1], cond)
        yield SamplerState(i + 1, steps, t[i + 1], x, denoised)

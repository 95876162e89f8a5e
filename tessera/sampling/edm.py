"""The sampler of EDM: Heun's second-order method with optional churn.

Karras, Aittala, Aila & Laine 2022, "Elucidating the design space of diffusion-based generative
models", algorithms 1 (deterministic) and 2 (stochastic).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser
from tessera.errors import TesseraError
from tessera.sampling.core import (
    NoiseSource,
    Refine,
    Sampler,
    SamplerState,
    churned,
    denoise,
    state_dtype,
)
from tessera.sampling.levels import edm_levels


@torch.no_grad()
def sample_edm(
    denoiser: Denoiser,
    latents: Tensor,
    cond: Conditioning,
    noise: NoiseSource,
    levels: Sequence[float],
    *,
    solver: Literal["heun", "euler"] = "heun",
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    sde_scale: float = 0.0,
    reuse_noise: bool = False,
    refine: Refine | None = None,
) -> Iterator[SamplerState]:
    """From unit normal `latents` [B, C, H, W] to samples; 2 steps - 1 calls of the denoiser.

    With `s_churn` > 0, noise is drawn at every step, also outside [s_min, s_max], so that a seed's
    image does not jump when the window moves past a step; with 0, none is needed and none drawn.

    With `sde_scale` > 0, a step to noise level σ' goes to √(σ'² - g²) and adds new noise g =
    `sde_scale` σ', drawn for each step but the last, and for each correction (Teng et al. 2023).

    Args:
        levels: noise levels at which the steps begin, falling.
        solver: "euler" leaves out the second-order correction (one call a step).
        s_churn, s_min, s_max, s_noise: amount of added noise, the range of σ in which it is added,
            and its scale.
        sde_scale: the share of each step's noise that is new.
        reuse_noise: a correction adds the noise of its step, in place of noise of its own.
        refine: improves x after each step.

    Raises:
        TesseraError: `sde_scale` is not in [0, 1].
    """
    if not 0 <= sde_scale <= 1:
        raise TesseraError(f"`sde_scale={sde_scale:g}`: it is a share of the noise, from 0 to 1")
    steps, t = len(levels), [*levels, 0.0]
    t_hat = churned(denoiser, t[:-1], s_churn, s_min, s_max)

    shape, dtype = tuple(latents.shape[1:]), state_dtype(latents.device)
    x = latents.to(dtype) * t[0]
    for i in range(steps):
        # Add noise to go from t_i up to t̂_i.
        if s_churn > 0:
            epsilon = noise.normal(shape, dtype)
            x = x + math.sqrt(max(t_hat[i] ** 2 - t[i] ** 2, 0.0)) * s_noise * epsilon

        # Euler step from t̂_i to t_{i+1}, a part of whose noise is new.
        model = denoiser.for_step(t[i])
        added = sde_scale * t[i + 1]
        h = math.sqrt(1 - sde_scale**2) * t[i + 1] - t_hat[i]
        denoised = denoise(model, x, t_hat[i], cond)
        d = (x - denoised) / t_hat[i]
        fresh = added * noise.normal(shape, dtype) if added > 0 else 0.0
        x_next = x + h * d + fresh

        # Second-order correction.
        if solver == "heun" and t[i + 1] > 0:
            denoised = denoise(model, x_next, t[i + 1], cond)
            if added > 0 and not reuse_noise:
                fresh = added * noise.normal(shape, dtype)
            x_next = x + h * (d + (x_next - denoised) / t[i + 1]) / 2 + fresh

        x = x_next if refine is None else refine(model, x_next, t[i + 1], cond, noise)
        yield SamplerState(i + 1, steps, t[i + 1], x, denoised)


def edm_sampler(
    *,
    steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    **options: Any,
) -> Sampler:
    """EDM's solver at EDM's noise levels.

    Args:
        steps, sigma_min, sigma_max, rho: see `edm_levels`.
        options: those of `sample_edm`.
    """
    levels = partial(edm_levels, steps=steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    return Sampler(levels, partial(sample_edm, **options))

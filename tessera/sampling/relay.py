"""The samplers of relay diffusion (Teng et al. 2023).

A later stage starts from the enlarged image of the stage before, and sharpens while it denoises.
With z = A(σ) x + σ n, an estimate x̂ of the clean image gives the mean at the next noise level,

    A(σ') x̂ + γ (z - A(σ) x̂),   γ = √(1 - η²) σ' / σ

and new noise η σ' n is added. A(σ), diagonal in the block DCT, is that of `Blur`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.blur import Blur, scale_frequencies, with_block_noise
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


def relay_levels(
    denoiser: Denoiser,
    *,
    steps: int = 18,
    sigma_min: float = 0.008,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    sigma_start: float = 0.9,
) -> list[float]:
    """The noise levels of a later stage: those of EDM's `steps` that lie below `sigma_start`.

    Args:
        steps: number of levels from σ_max to σ_min, of which the highest ones are left out.
        sigma_min, sigma_max: ends of the noise levels, cut to what the denoiser supports.
        rho: larger values take shorter steps near σ_min.
        sigma_start: how much noise the enlarged image may get; the original's truncation_sigma.

    Raises:
        TesseraError: no level is left.
    """
    levels = edm_levels(denoiser, steps=steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    kept = [level for level in levels if level < sigma_start]
    if not kept:
        raise TesseraError(
            f"none of the {steps} noise levels from {sigma_max:g} to {sigma_min:g} lies below "
            f"`sigma_start={sigma_start:g}`. Take more `steps`, or a higher `sigma_start`"
        )
    return kept


@torch.no_grad()
def sample_relay(
    denoiser: Denoiser,
    latents: Tensor,
    cond: Conditioning,
    noise: NoiseSource,
    levels: Sequence[float],
    *,
    blur: Blur = Blur(),
    s_block: float = 0.15,
    s_noise: float = 0.2,
    correction: Literal["directions", "estimates", "none"] = "directions",
    reuse_noise: bool = False,
    unit_variance: bool = False,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    churn_noise: float = 1.0,
    refine: Refine | None = None,
) -> Iterator[SamplerState]:
    """From enlarged images `latents` [B, C, H, W] to sharp ones; 2 len(levels) - 1 evaluations.

    The last step is the denoiser's estimate. Noise is drawn for the start, for each step (if
    `s_noise` > 0) and for each correction; with `s_block` > 0 again for the block noise.

    Args:
        levels: noise levels at which steps begin, falling, see `relay_levels`.
        blur: A(σ); the original's CelebA-HQ setting assumes less than was trained.
        s_block: strength b of the block noise.
        s_noise: η, the share of each step's noise that is new; 0 is deterministic after the start.
        correction: what is averaged with a second evaluation at the end of the step. "directions"
            (z - x̂) / σ, as the released samplers do, which is Heun's method without blur and of
            first order with it; "estimates" x̂, of second order with any blur; "none".
        reuse_noise: a correction adds the noise of its step; the released samplers draw anew, and
            their settings are tuned to that.
        unit_variance: divide all noise by √(1 + b²), for models that were trained so.
        s_churn, s_min, s_max, churn_noise: EDM's added noise, the range of σ in which it is added,
            and its scale; the original's CelebA-HQ sampler has it, switched off.
        refine: improves x after each step.

    Raises:
        TesseraError: `s_noise` is not in [0, 1], or the images cannot be cut into blocks.
    """
    if not 0 <= s_noise <= 1:
        raise TesseraError(f"`s_noise={s_noise:g}`: it is a share of the noise, from 0 to 1")
    shape, dtype = tuple(latents.shape[1:]), state_dtype(latents.device)
    draw = partial(_draw, noise, shape, dtype, blur.block, s_block, unit_variance)
    t, t_hat = list(levels), churned(denoiser, levels, s_churn, s_min, s_max)
    alpha, alpha_hat = (
        blur.factors(torch.tensor(sigmas, dtype=torch.float64)).to(latents.device, dtype)
        for sigmas in (t, t_hat)
    )
    x = latents.to(dtype) + draw(t[0])
    for i in range(len(t)):
        # Add noise to go from t_i up to t̂_i.
        if s_churn > 0:
            added = math.sqrt(max(t_hat[i] ** 2 - t[i] ** 2, 0.0)) * churn_noise
            x = x + added * noise.normal(shape, dtype)
        model = denoiser.for_step(t[i])
        x_next = denoised = denoise(model, x, t_hat[i], cond)
        after = t[i + 1] if i + 1 < len(t) else 0.0
        if after > 0:
            # Step from t̂_i to t_{i+1}: A(σ') x̂ + γ (z - A(σ) x̂).
            keep = math.sqrt(1 - s_noise**2) * after / t_hat[i]
            change = alpha[i + 1] - keep * alpha_hat[i]
            fresh = draw(s_noise * after) if s_noise > 0 else 0.0
            x_next = keep * x + scale_frequencies(denoised, change) + fresh

            # Correction: x̂ by both ends of the step.
            if correction != "none":
                first, denoised = denoised, denoise(model, x_next, after, cond)
                estimate = (first + denoised) / 2
                if correction == "directions":
                    directions = (x - first) / t_hat[i] + (x_next - denoised) / after
                    estimate = x - t_hat[i] * directions / 2
                if s_noise > 0 and not reuse_noise:
                    fresh = draw(s_noise * after)
                x_next = keep * x + scale_frequencies(estimate, change) + fresh

        x = x_next if refine is None else refine(model, x_next, after, cond, noise)
        yield SamplerState(i + 1, len(t), after, x, denoised)


def _draw(
    noise: NoiseSource,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    block: int,
    s_block: float,
    unit_variance: bool,
    scale: float,
) -> Tensor:
    """New noise, block noise included, times `scale`."""
    white = noise.normal(shape, dtype)
    if s_block > 0:
        base = noise.normal(shape, dtype)
        white = with_block_noise(white, base, block, s_block, unit_variance)
    return scale * white


def relay_sampler(
    *,
    steps: int = 18,
    sigma_min: float = 0.008,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    sigma_start: float = 0.9,
    **options: Any,
) -> Sampler:
    """The solver of a later stage at its noise levels.

    Args:
        steps, sigma_min, sigma_max, rho, sigma_start: see `relay_levels`.
        options: those of `sample_relay`.
    """
    levels = partial(
        relay_levels,
        steps=steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho, sigma_start=sigma_start,
    )  # fmt: skip
    return Sampler(levels, partial(sample_relay, **options))

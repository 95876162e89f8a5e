"""The samplers of discrete processes: DDPM's ancestral steps, and DDIM with its inverse.

Ho, Jain & Abbeel 2020; Nichol & Dhariwal 2021 (learned variances, fewer steps); Song, Meng & Ermon
2021. Written at z = x_t / √ᾱ_t = x + σ n, where a step from σ to ρ < σ is

    ancestral: z' = x̂ + (ρ / σ)² (z - x̂) + √(variance (1 + ρ²)) n
    DDIM:      z' = x̂ + √(ρ² - u²) (z - x̂) / σ + u n,   u = η ρ √(1 - (ρ / σ)²)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.discrete import Process, spaced_steps
from tessera.errors import TesseraError
from tessera.sampling.core import (
    NoiseSource,
    Refine,
    SamplerState,
    denoise,
    evaluate,
    state_dtype,
)

Clip = Literal["auto", "none", "static", "dynamic"]
"""What is done to the estimate of the image at every step.

static: cut to [-1, 1]; dynamic: cut to the given quantile of its absolute values and scaled to
[-1, 1] if that is above 1; auto: dynamic with guidance, static without.
"""


@torch.no_grad()
def sample_ddpm(
    denoiser: Denoiser,
    latents: Tensor,
    cond: Conditioning,
    noise: NoiseSource,
    *,
    steps: str = "",
    variance: Literal["learned", "large", "small"] = "learned",
    clip: Clip = "auto",
    quantile: float = 0.995,
    noise_schedule: str | None = None,
    refine: Refine | None = None,
) -> Iterator[SamplerState]:
    """Ancestral sampling; one call of the denoiser and one draw of noise a step, but for the last.

    Args:
        steps: "" for all of the process, or a spacing: "250", "90,60,60,20,20", "ddim50"; see
            `spaced_steps`.
        variance: of the steps: as the network says (large where it does not), β, or β̃.
        clip, quantile: see `Clip`.
        noise_schedule: the process of denoisers that know a continuous range of noise levels, 1000
            steps of "linear", "cosine", ...; None for the denoiser's own.
        refine: improves x after each step.

    Raises:
        TesseraError: a spacing that the process does not have, or a continuous denoiser without
            `noise_schedule`.
    """
    process, denoiser = visited(denoiser, steps, noise_schedule)
    fixed = process.posterior_log_variance if variance == "small" else process.large_log_variance
    levels = process.sigmas.tolist()
    z = _start(latents, levels)
    for index in reversed(range(len(levels))):
        sigma, rho = levels[index], levels[index - 1] if index else 0.0
        posterior = evaluate(denoiser.for_step(sigma), z, sigma, cond)
        x0 = clipped(posterior.mean.to(z.dtype), clip, quantile, denoiser)
        z = x0 + (rho / sigma) ** 2 * (z - x0)
        if index:
            draw = noise.normal(tuple(z.shape[1:]), z.dtype)
            learned = posterior.log_variance if variance == "learned" else None
            if learned is None:
                z = z + math.sqrt(math.exp(fixed[index]) * (1 + rho**2)) * draw
            else:
                z = z + (0.5 * learned.to(z.dtype)).exp() * math.sqrt(1 + rho**2) * draw
        z = z if refine is None else refine(z, rho, cond)
        yield SamplerState(len(levels) - index, len(levels), rho, z, x0)


@torch.no_grad()
def sample_ddim(
    denoiser: Denoiser,
    latents: Tensor,
    cond: Conditioning,
    noise: NoiseSource,
    *,
    steps: str = "",
    eta: float = 0.0,
    clip: Clip = "auto",
    quantile: float = 0.995,
    noise_schedule: str | None = None,
    refine: Refine | None = None,
) -> Iterator[SamplerState]:
    """DDIM; one call of the denoiser a step. Noise is drawn if `eta` is above 0.

    Args:
        eta: amount of noise: 0 is deterministic, 1 as much as β̃ (with the same variance as DDPM).
        steps, clip, quantile, noise_schedule, refine: see `sample_ddpm`.
    """
    process, denoiser = visited(denoiser, steps, noise_schedule)
    levels = process.sigmas.tolist()
    z = _start(latents, levels)
    for index in reversed(range(len(levels))):
        sigma, rho = levels[index], levels[index - 1] if index else 0.0
        mean = denoise(denoiser.for_step(sigma), z, sigma, cond)
        x0 = clipped(mean, clip, quantile, denoiser)
        u = eta * rho * math.sqrt(1 - (rho / sigma) ** 2)
        z = x0 + math.sqrt(max(rho**2 - u**2, 0.0)) * (z - x0) / sigma
        if index and eta > 0:
            z = z + u * noise.normal(tuple(z.shape[1:]), z.dtype)
        z = z if refine is None else refine(z, rho, cond)
        yield SamplerState(len(levels) - index, len(levels), rho, z, x0)


@torch.no_grad()
def encode_ddim(
    denoiser: Denoiser,
    images: Tensor,
    cond: Conditioning,
    *,
    steps: str = "",
    clip: Clip = "auto",
    quantile: float = 0.995,
    noise_schedule: str | None = None,
) -> Iterator[SamplerState]:
    """DDIM backwards, from images [B, C, H, W] in model space to the latents that give them.

    The last state's x are the latents of `sample_ddim` with eta 0 (its σ is infinite); the others
    are z at their noise level. `denoised` is the estimate that the step was made with.
    """
    process, denoiser = visited(denoiser, steps, noise_schedule)
    levels = process.sigmas.tolist()
    z = images.to(state_dtype(images.device)) * math.sqrt(1 + levels[0] ** 2)
    for index, sigma in enumerate(levels):
        mean = denoise(denoiser.for_step(sigma), z, sigma, cond)
        x0 = clipped(mean, clip, quantile, denoiser)
        direction = (z - x0) / sigma
        final = index + 1 == len(levels)
        rho = math.inf if final else levels[index + 1]
        z = direction if final else x0 + rho * direction
        yield SamplerState(index + 1, len(levels), rho, z, x0)


def visited(
    denoiser: Denoiser, steps: str = "", noise_schedule: str | None = None
) -> tuple[Process, Denoiser]:
    """The process that a sampler walks down, and the denoiser for it.

    Raises:
        TesseraError: see `sample_ddpm`.
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
    kept = levels[spaced_steps(len(levels), steps)]
    return Process.of_sigmas(kept), denoiser.for_levels(kept)


def clipped(x0: Tensor, clip: Clip, quantile: float, denoiser: Denoiser | None = None) -> Tensor:
    """The estimate x0 [B, C, H, W] after clipping, see `Clip`."""
    if clip == "auto":
        clip = "dynamic" if denoiser is not None and denoiser.guided else "static"
    if clip == "none":
        return x0
    if clip == "static":
        return x0.clamp(-1, 1)
    values = x0.abs().flatten(1)
    rank = round(quantile * (values.shape[1] - 1)) + 1
    limit = values.kthvalue(rank, dim=1).values.clamp(min=1)[:, None, None, None]
    return x0.clamp(-limit, limit) / limit


def _start(latents: Tensor, levels: list[float]) -> Tensor:
    """z of the first step: x_T is unit normal, and z = x_T / √ᾱ_T."""
    return latents.to(state_dtype(latents.device)) * math.sqrt(1 + levels[-1] ** 2)

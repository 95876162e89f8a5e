"""The samplers of discrete processes: DDPM's ancestral steps, and DDIM with its inverse.

Ho, Jain & Abbeel 2020; Nichol & Dhariwal 2021 (learned variances, fewer steps); Song, Meng & Ermon
2021. Written at z = x_t / √ᾱ_t = x + σ n, where a step from σ to ρ < σ is

    ancestral: z' = x̂ + (ρ / σ)² (z - x̂) + √(variance (1 + ρ²)) n
    DDIM:      z' = x̂ + √(ρ² - u²) (z - x̂) / σ + u n,   u = η ρ √(1 - (ρ / σ)²)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.discrete import Process
from tessera.sampling.core import (
    NoiseSource,
    Refine,
    Sampler,
    SamplerState,
    denoise,
    evaluate,
    state_dtype,
)
from tessera.sampling.levels import process_levels

Clip = Literal["auto", "none", "static", "dynamic"]
"""What is done to the estimate of the image at every step.

static: cut to [-1, 1]; dynamic: cut to the given quantile of its absolute values and scaled to
[-1, 1] if that is above 1; auto: dynamic with guidance, static without.
"""


def sample_ddpm(
    denoiser: Denoiser,
    latents: Tensor,
    cond: Conditioning,
    noise: NoiseSource,
    levels: Sequence[float],
    *,
    variance: Literal["learned", "large", "small"] = "learned",
    clip: Clip = "auto",
    quantile: float = 0.995,
    refine: Refine | None = None,
) -> Iterator[SamplerState]:
    """Ancestral sampling; one call of the denoiser and one draw of noise a step, but for the last.

    Args:
        levels: noise levels at which the steps begin, falling.
        variance: of the steps: as the network says (large where it does not), β, or β̃.
        clip, quantile: see `Clip`.
        refine: improves x after each step.
    """
    process, model = visited(denoiser, levels)
    fixed = process.posterior_log_variance if variance == "small" else process.large_log_variance

    def move(z: Tensor, x0: Tensor, step: _Step) -> Tensor:
        z = x0 + (step.rho / step.sigma) ** 2 * (z - x0)
        if step.rho == 0:
            return z
        draw = noise.normal(tuple(z.shape[1:]), z.dtype)
        learned = step.log_variance if variance == "learned" else None
        if learned is None:
            return z + math.sqrt(math.exp(fixed[step.number]) * (1 + step.rho**2)) * draw
        return z + (0.5 * learned.to(z.dtype)).exp() * math.sqrt(1 + step.rho**2) * draw

    return _walk(model, latents, cond, noise, levels, move, clip, quantile, refine)


def sample_ddim(
    denoiser: Denoiser,
    latents: Tensor,
    cond: Conditioning,
    noise: NoiseSource,
    levels: Sequence[float],
    *,
    eta: float = 0.0,
    clip: Clip = "auto",
    quantile: float = 0.995,
    refine: Refine | None = None,
) -> Iterator[SamplerState]:
    """DDIM; one call of the denoiser a step. Noise is drawn if `eta` is above 0.

    Args:
        levels: noise levels at which the steps begin, falling.
        eta: amount of noise: 0 is deterministic, 1 as much as β̃ (with the same variance as DDPM).
        clip, quantile, refine: see `sample_ddpm`.
    """
    _, model = visited(denoiser, levels)

    def move(z: Tensor, x0: Tensor, step: _Step) -> Tensor:
        u = eta * step.rho * math.sqrt(1 - (step.rho / step.sigma) ** 2)
        z = x0 + math.sqrt(max(step.rho**2 - u**2, 0.0)) * (z - x0) / step.sigma
        if step.rho > 0 and eta > 0:
            z = z + u * noise.normal(tuple(z.shape[1:]), z.dtype)
        return z

    return _walk(model, latents, cond, noise, levels, move, clip, quantile, refine)


class _Step(NamedTuple):
    """A step of a discrete process.

    Attributes:
        number: of the step, from the cleanest.
        sigma, rho: noise levels before and after it.
        log_variance: [B, C, H, W] of the network, where it is learned.
    """

    number: int
    sigma: float
    rho: float
    log_variance: Tensor | None


@torch.no_grad()
def _walk(
    denoiser: Denoiser,
    latents: Tensor,
    cond: Conditioning,
    noise: NoiseSource,
    levels: Sequence[float],
    move: Callable[[Tensor, Tensor, _Step], Tensor],
    clip: Clip,
    quantile: float,
    refine: Refine | None,
) -> Iterator[SamplerState]:
    """Down the levels by steps (z, clipped estimate of x, step) to the next z."""
    # x_T is unit normal, and z = x_T / √ᾱ_T.
    z = latents.to(state_dtype(latents.device)) * math.sqrt(1 + levels[0] ** 2)
    steps = len(levels)
    for done, (sigma, rho) in enumerate(itertools.pairwise([*levels, 0.0]), 1):
        model = denoiser.for_step(sigma)
        posterior = evaluate(model, z, sigma, cond)
        x0 = clipped(posterior.mean.to(z.dtype), clip, quantile, denoiser)
        z = move(z, x0, _Step(steps - done, sigma, rho, posterior.log_variance))
        z = z if refine is None else refine(model, z, rho, cond, noise)
        yield SamplerState(done, steps, rho, z, x0)


@torch.no_grad()
def encode_ddim(
    denoiser: Denoiser,
    images: Tensor,
    cond: Conditioning,
    levels: Sequence[float],
    *,
    clip: Clip = "auto",
    quantile: float = 0.995,
) -> Iterator[SamplerState]:
    """DDIM backwards, from images [B, C, H, W] in model space to the latents that give them.

    The last state's x are the latents of `sample_ddim` with eta 0 (its σ is infinite); the others
    are z at their noise level. `denoised` is the estimate that the step was made with.

    Args:
        levels: those of the way down, falling.
        clip, quantile: see `sample_ddpm`.
    """
    _, model = visited(denoiser, levels)
    rising = [*reversed(levels), math.inf]
    z = images.to(state_dtype(images.device)) * math.sqrt(1 + rising[0] ** 2)
    for done, (sigma, rho) in enumerate(itertools.pairwise(rising), 1):
        mean = denoise(model.for_step(sigma), z, sigma, cond)
        x0 = clipped(mean, clip, quantile, model)
        direction = (z - x0) / sigma
        z = direction if rho == math.inf else x0 + rho * direction
        yield SamplerState(done, len(levels), rho, z, x0)


def visited(denoiser: Denoiser, levels: Sequence[float]) -> tuple[Process, Denoiser]:
    """The process that visits these noise levels, falling, and the denoiser for it."""
    rising = torch.tensor(levels, dtype=torch.float64, device="cpu").flip(0)
    return Process.of_sigmas(rising), denoiser.for_levels(rising)


def ddpm_sampler(*, steps: str = "", noise_schedule: str | None = None, **options: Any) -> Sampler:
    """Ancestral sampling along a discrete process.

    Args:
        steps, noise_schedule: see `process_levels`.
        options: those of `sample_ddpm`.
    """
    levels = partial(process_levels, steps=steps, noise_schedule=noise_schedule)
    return Sampler(levels, partial(sample_ddpm, **options))


def ddim_sampler(*, steps: str = "", noise_schedule: str | None = None, **options: Any) -> Sampler:
    """DDIM along a discrete process.

    Args:
        steps, noise_schedule: see `process_levels`.
        options: those of `sample_ddim`.
    """
    levels = partial(process_levels, steps=steps, noise_schedule=noise_schedule)
    return Sampler(levels, partial(sample_ddim, **options))


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

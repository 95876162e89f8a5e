"""What samplers share: their state, their source of noise, and the call of the denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser, Posterior
from tessera.errors import TesseraError


class NoiseSource(Protocol):
    """Random numbers of a batch of B images, used up in the order of the calls."""

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers [B, *shape]."""
        ...

    def integers(self, high: int) -> Tensor:
        """Uniform int64 numbers in 0..high-1, [B]."""
        ...


@dataclass
class SamplerState:
    """Where a sampler stands after a step.

    Attributes:
        step: steps done, 1..steps.
        steps: steps in all.
        sigma: noise level of x; 0 after the last step.
        x: float64 [B, C, H, W], z = x_clean + σ n; the sample after the last step.
        denoised: [B, C, H, W], the denoiser's latest estimate of the clean image.
    """

    step: int
    steps: int
    sigma: float
    x: Tensor
    denoised: Tensor

    @property
    def unit(self) -> Tensor:
        """x scaled to the spread of images, so that noise does not drown what is there."""
        return self.x / math.sqrt(1 + self.sigma**2)


class Refine(Protocol):
    """Hook after each step: x at noise level σ to a better x at the same σ (e.g. MCMC).

    The denoiser is that of the step, with all its wrappers; after the last step σ is 0. A hook may
    have two methods more: `check(denoiser)` raises where the denoiser is none that it works with,
    before anything is made; `report()` gives numbers about all that it has refined so far, each as
    (sum, count), of which the mean is shown.
    """

    def __call__(
        self, denoiser: Denoiser, x: Tensor, sigma: float, cond: Conditioning, noise: NoiseSource
    ) -> Tensor: ...


Report = dict[str, tuple[float, float]]
"""Numbers by name, each the mean of what `count` samples, steps or the like added up: (sum, count).
"""


class Solver(Protocol):
    """From noise to a sample along given noise levels, once its options are bound.

    `latents` [B, C, H, W] are unit normal noise, or the image to start from where a method starts
    from one; `levels` are the noise levels at which the steps begin, falling, without the final 0.
    The state is yielded after every step; the last one holds the sample.
    """

    def __call__(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        cond: Conditioning,
        noise: NoiseSource,
        levels: Sequence[float],
    ) -> Iterator[SamplerState]: ...


Levels = Callable[[Denoiser], list[float]]
"""Where the steps of a sampler begin, for a denoiser: noise levels, falling, without the final 0.

Only levels that the denoiser supports.
"""


@dataclass(frozen=True)
class Sampler:
    """Noise levels and a solver that walks down them; any levels go with any solver.

    Attributes:
        levels: where the steps begin, of the denoiser at hand.
        solver: makes the steps.
        refine: the hook after each step that is bound in the solver, if there is one.

    Example:
        >>> from tessera.sampling.edm import sample_edm
        >>> Sampler(lambda denoiser: [80.0, 10.0, 1.0], sample_edm).levels(Denoiser())
        [80.0, 10.0, 1.0]
    """

    levels: Levels
    solver: Solver
    refine: Refine | None = None

    def check(self, denoiser: Denoiser) -> None:
        """Say what cannot be, before anything is made.

        Args:
            denoiser: with all its wrappers.

        Raises:
            TesseraError: the denoiser has no such noise levels, or is none to be refined so.
        """
        self.levels(denoiser)
        check = getattr(self.refine, "check", None)
        if check is not None:
            check(denoiser)

    def report(self) -> Report:
        """What the refinement says about all samples so far; see `Refine`."""
        report = getattr(self.refine, "report", None)
        found: Report = {} if report is None else report()
        return found

    def __call__(
        self, denoiser: Denoiser, latents: Tensor, cond: Conditioning, noise: NoiseSource
    ) -> Iterator[SamplerState]:
        """From `latents` to samples; see `Solver`."""
        return self.solver(denoiser, latents, cond, noise, self.levels(denoiser))


def means(*reports: Report) -> dict[str, float]:
    """The mean of each number over everything that was reported."""
    names = dict.fromkeys(name for report in reports for name in report)
    pairs = {n: [report[n] for report in reports if n in report] for n in names}
    totals = {n: (sum(t for t, _ in p), sum(count for _, count in p)) for n, p in pairs.items()}
    return {name: total / count for name, (total, count) in totals.items() if count}


def enlarged(images: Tensor, block: int) -> Tensor:
    """Every pixel of images [..., h, w] as a block of s x s pixels: [..., s h, s w]."""
    return images.repeat_interleave(block, dim=-2).repeat_interleave(block, dim=-1)


def state_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that know no float64 (Apple's)."""
    return torch.float32 if device.type == "mps" else torch.float64


def evaluate(denoiser: Denoiser, z: Tensor, sigma: float, cond: Conditioning) -> Posterior:
    """What the denoiser says at one noise level for the whole batch.

    σ is handed over on the CPU: a wrapper that decides by it (guidance in an interval, experts)
    then needs no synchronisation with the device.
    """
    sigmas = torch.full((len(z),), sigma, dtype=torch.float64)
    posterior: Posterior = denoiser(z, sigmas, cond)
    return posterior


def denoise(denoiser: Denoiser, z: Tensor, sigma: float, cond: Conditioning) -> Tensor:
    """The denoiser's estimate of x at one noise level for the whole batch, in z's dtype."""
    return evaluate(denoiser, z, sigma, cond).mean.to(z.dtype)


def noise_range(denoiser: Denoiser, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """σ_min and σ_max cut to what the denoiser supports.

    Raises:
        TesseraError: nothing is left between them.
    """
    low, high = max(sigma_min, denoiser.sigma_min), min(sigma_max, denoiser.sigma_max)
    if low >= high:
        raise TesseraError(
            f"no noise levels lie between `sigma_min={sigma_min:g}` and `sigma_max={sigma_max:g}`: "
            f"the first must be the lower one, and the model knows {denoiser.sigma_min:.3g} to "
            f"{denoiser.sigma_max:.3g}"
        )
    return low, high


def churned(
    denoiser: Denoiser, sigmas: Sequence[float], s_churn: float, s_min: float, s_max: float
) -> list[float]:
    """The noise levels t̂ that steps from `sigmas` start at, once noise was added.

    Karras et al. 2022, algorithm 2, lines 4 and 5: raised by γ = min(s_churn / steps, √2 - 1)
    within [s_min, s_max].
    """
    gamma = min(s_churn / len(sigmas), math.sqrt(2) - 1)
    return round_sigmas(denoiser, [s * (1 + gamma * (s_min <= s <= s_max)) for s in sigmas])


def round_sigmas(denoiser: Denoiser, sigmas: Tensor | Sequence[float]) -> list[float]:
    """The noise levels that the denoiser supports nearest to `sigmas`, as Python numbers."""
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    rounded: list[float] = denoiser.round_sigma(levels).tolist()
    return rounded

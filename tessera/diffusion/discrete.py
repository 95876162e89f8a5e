"""Discrete-time variance-preserving diffusion (DDPM, improved DDPM, PDM) as ordinary denoisers.

A process has N noise levels, from the cleanest to the noisiest; x_t = √ᾱ_t x + √(1 - ᾱ_t) n. Here
everything happens at z = x_t / √ᾱ_t = x + σ n with σ = √((1 - ᾱ) / ᾱ), so that all samplers,
guidance and objectives apply. Tables are float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from tessera.diffusion.preconditioning import Coefficients, Preconditioned
from tessera.errors import TesseraError

Prediction = Literal["x0", "eps", "v"]


def noise_betas(schedule: str, timesteps: int) -> Tensor:
    """β_t of a named schedule, float64 [T].

    Args:
        schedule: "linear", from 1e-4 to 0.02 at T = 1000 and scaled for others; "linearX" with the
            end X, like "linear0.025"; "cosine" (Nichol & Dhariwal 2021).
        timesteps: T.

    Raises:
        TesseraError: an unknown schedule, or so few steps that β would reach 1.
    """
    if schedule == "cosine":
        u = torch.arange(timesteps + 1, dtype=torch.float64, device="cpu") / timesteps
        alpha_bar = ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    try:
        if not schedule.startswith("linear"):
            raise ValueError
        end = float(schedule.removeprefix("linear") or 0.02)
    except ValueError:
        raise TesseraError(
            f"there is no noise schedule {schedule!r}. Choose linear, cosine, or linear with an "
            "end value, like linear0.025"
        ) from None
    scale = 1000 / timesteps
    if not 0 < scale * end < 1:
        raise TesseraError(
            f"noise schedule {schedule} with {timesteps} steps: its last step would remove all of "
            f"the image. Use more than {math.floor(1000 * end)} steps, or the cosine schedule"
        )
    return torch.linspace(scale * 1e-4, scale * end, timesteps, dtype=torch.float64, device="cpu")


def spaced_steps(timesteps: int, spacing: str) -> list[int]:
    """The steps of a process of T steps that a spacing keeps, rising.

    Args:
        spacing: "" for all; "a,b,..." splits the process into equal sections and takes so many
            steps of each, evenly with both ends; "ddimN" takes every k-th from 0, N in all.

    Raises:
        TesseraError: no such spacing exists for this T.
    """
    if not spacing:
        return list(range(timesteps))
    mistake = TesseraError(
        f"steps {spacing!r} of a process of {timesteps} steps: give a number, a list like "
        "90,60,60,20,20 (one number for each equal part of the process), or ddimN with an N that "
        "some whole stride gives exactly"
    )
    if spacing.startswith("ddim"):
        wanted = spacing.removeprefix("ddim")
        for stride in range(1, timesteps + 1):
            if wanted.isdigit() and len(range(0, timesteps, stride)) == int(wanted):
                return list(range(0, timesteps, stride))
        raise mistake
    try:
        counts = [int(part) for part in spacing.split(",")]
    except ValueError:
        raise mistake from None
    small, extra = divmod(timesteps, len(counts))
    kept: list[int] = []
    first = 0
    for index, count in enumerate(counts):
        size = small + (index < extra)
        if not 1 <= count <= size:
            raise mistake
        # An accumulated float rounded to even, as the released code does it.
        stride_, at = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):
            kept.append(first + round(at))
            at += stride_
        first += size
    return kept


class Process:
    """The N steps of a diffusion process, from clean to noisy; float64 [N] on the CPU.

    Everything is computed at once: processes are kept, and tensors made later might belong to a
    mode without data.

    Attributes:
        alpha_bar: ᾱ, the share of the image's variance that is left.
        betas: β, the variance of the noise that a step adds.
        sigmas: noise level of z.
        snr: signal-to-noise ratio ᾱ / (1 - ᾱ) = 1 / σ².
        posterior_variance: β̃, the variance of q(x_{t-1} | x_t, x); 0 at the first step.
        posterior_log_variance: log β̃, with the second entry in place of the first, -∞.
        large_log_variance: log β, but log β̃ of the second step at the first.
        mean_coefficients: (c_1, c_2) with E q(x_{t-1} | x_t, x) = c_1 x + c_2 x_t.
    """

    def __init__(self, alpha_bar: Tensor, betas: Tensor) -> None:
        before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        rest = 1 - alpha_bar
        self.alpha_bar, self.betas = alpha_bar, betas
        self.sigmas = (rest / alpha_bar).sqrt()
        self.snr = alpha_bar / rest
        self.posterior_variance = betas * (1 - before) / rest
        first = self.posterior_variance[1:2] if len(betas) > 1 else betas
        self.posterior_log_variance = torch.cat([first, self.posterior_variance[1:]]).log()
        self.large_log_variance = torch.cat([first, betas[1:]]).log()
        self.mean_coefficients = (
            betas * before.sqrt() / rest,
            (1 - before) * (1 - betas).sqrt() / rest,
        )

    @classmethod
    def named(cls, schedule: str, timesteps: int = 1000, spacing: str = "") -> Process:
        """A named schedule, see `noise_betas`, or those of its steps that a spacing keeps."""
        whole = _named(schedule, timesteps)
        return whole.at(spaced_steps(timesteps, spacing)) if spacing else whole

    @classmethod
    def of_sigmas(cls, sigmas: Tensor) -> Process:
        """The process with these noise levels σ, rising."""
        variance = sigmas.to("cpu", torch.float64) ** 2
        before = torch.cat([variance.new_zeros(1), variance[:-1]])
        return cls(1 / (1 + variance), (variance - before) / (1 + variance))

    def at(self, steps: Sequence[int]) -> Process:
        """The process that visits these steps only."""
        alpha_bar = self.alpha_bar[list(steps)]
        before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        betas = 1 - alpha_bar / before
        return Process((1 - betas).cumprod(0), betas)

    def __len__(self) -> int:
        return len(self.alpha_bar)


@lru_cache
def _named(schedule: str, timesteps: int) -> Process:
    betas = noise_betas(schedule, timesteps)
    return Process((1 - betas).cumprod(0), betas)


@dataclass(frozen=True)
class Discrete:
    """Preconditioning of networks that know the T steps of a process.

    Args:
        schedule: see `noise_betas`.
        timesteps: T.
        spacing: train and sample on these steps only, see `spaced_steps`.
        prediction: what the network predicts: the image, the noise, or v = √ᾱ n - √(1 - ᾱ) x.
        rescale_timesteps: tell the network 1000 t / T instead of t.
        visited: the steps that a reverse process visits; None: those of `spacing`.
    """

    schedule: str = "linear"
    timesteps: int = 1000
    spacing: str = ""
    prediction: Prediction = "x0"
    rescale_timesteps: bool = False
    visited: tuple[int, ...] | None = None

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of the supported steps in the process of T steps."""
        return self.visited or tuple(spaced_steps(self.timesteps, self.spacing))

    @property
    def process(self) -> Process:
        """The process of the supported steps."""
        return _process(self)

    @property
    def levels(self) -> Tensor:
        """The supported noise levels, rising."""
        return self.process.sigmas

    @property
    def sigma_min(self) -> float:
        return float(_tables(self, torch.device("cpu")).sigmas[0])

    @property
    def sigma_max(self) -> float:
        return float(_tables(self, torch.device("cpu")).sigmas[-1])

    def index(self, sigma: Tensor) -> Tensor:
        """Number of the nearest supported level, from the cleanest; int64, shaped like σ."""
        between = _tables(self, sigma.device).between
        return torch.bucketize(sigma.to(torch.float32), between)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        one = torch.ones_like(sigma)
        alpha_bar = 1 / (1 + sigma**2)
        skip, out = {
            "x0": (torch.zeros_like(sigma), one),
            "eps": (one, -sigma),
            "v": (alpha_bar, -sigma * alpha_bar.sqrt()),
        }[self.prediction]
        noise = _tables(self, sigma.device).labels[self.index(sigma)]
        return Coefficients(skip, out, alpha_bar.sqrt(), noise)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self.process.sigmas.to(sigma.device)[self.index(sigma)].to(sigma.dtype)

    def log_variance(self, fraction: Tensor, sigma: Tensor) -> Tensor:
        """Between log β at fraction 0 and log β̃ at 1; fraction [B, C, H, W], σ [B] or [1]."""
        tables = _tables(self, sigma.device)
        low, high = tables.log_variances[:, self.index(sigma), None, None, None]
        return torch.lerp(high, low, fraction)

    def visit(self, levels: Tensor) -> Discrete:
        """The preconditioning of a process that visits the supported levels nearest to these."""
        own = self.steps
        indices = self.index(levels.to("cpu")).tolist()
        return replace(self, visited=tuple(own[index] for index in indices))


class _Tables(NamedTuple):
    """What is looked up by level; `between` are the middles of neighbouring levels, [N - 1]."""

    sigmas: Tensor
    between: Tensor
    labels: Tensor
    log_variances: Tensor


@lru_cache
def _process(preconditioning: Discrete) -> Process:
    c = preconditioning
    whole = Process.named(c.schedule, c.timesteps)
    return whole if len(c.steps) == c.timesteps else whole.at(c.steps)


@lru_cache
def _tables(preconditioning: Discrete, device: torch.device) -> _Tables:
    """float32, kept for each device, because a copy from the host would make every call wait."""
    c, process = preconditioning, preconditioning.process
    labels = torch.tensor(c.steps, dtype=torch.float64, device="cpu")
    if c.rescale_timesteps:
        labels = labels * (1000.0 / c.timesteps)
    log_variances = torch.stack([process.posterior_log_variance, process.betas.log()])
    between = (process.sigmas[1:] + process.sigmas[:-1]) / 2
    tables = process.sigmas, between, labels, log_variances
    return _Tables(*(t.to(device, torch.float32) for t in tables))


class DiscreteDenoiser(Preconditioned):
    """A network of a discrete process; `log_variance` is that of a step to the next cleaner level.

    Args:
        network: with C output channels, or 2 C of which the second half is in [0, 1], the place of
            the log variance between its bounds.
        preconditioning: the process and what the network predicts.
        shape, num_classes: see `Preconditioned`.
    """

    preconditioning: Discrete

    def __init__(
        self,
        network: nn.Module,
        preconditioning: Discrete,
        shape: tuple[int, int, int],
        num_classes: int = 0,
    ) -> None:
        super().__init__(network, preconditioning, shape, num_classes)

    @property
    def levels(self) -> Tensor:
        return self.preconditioning.levels

    def time(self, sigma: Tensor) -> Tensor:
        scaling = self.preconditioning
        steps = torch.tensor(scaling.steps, dtype=torch.float64, device=sigma.device)
        return steps[scaling.index(sigma)] / scaling.timesteps

    def for_levels(self, levels: Tensor) -> DiscreteDenoiser:
        preconditioning = self.preconditioning.visit(levels)
        return DiscreteDenoiser(self.network, preconditioning, self.shape, self.num_classes)

    def _log_variance(self, raw: Tensor, sigma: Tensor) -> Tensor | None:
        channels = self.shape[0]
        if raw.shape[1] < 2 * channels:
            return None
        fraction = raw[:, channels : 2 * channels].to(torch.float32)
        return self.preconditioning.log_variance(fraction, sigma)

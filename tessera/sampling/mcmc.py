"""Refinement of samples by descent on the energy of their denoiser, with accept and reject.

A hook between the steps of any sampler: after a step to noise level ρ, some steps of gradient
descent on the energy at ρ, of which an image keeps those that do not raise it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.energy import Clamp, adaptive_steps, descend
from tessera.errors import TesseraError
from tessera.sampling.core import NoiseSource, Report


@dataclass
class Tally:
    """Steps tried and accepted, of all images so far; kept on the device."""

    tried: int = 0
    accepted: int | Tensor = 0

    def add(self, accepted: Tensor, steps: int) -> None:
        """Count a descent of `steps` steps, of which each image took `accepted`, int64 [B]."""
        self.tried += steps * len(accepted)
        self.accepted = self.accepted + accepted.sum()

    @property
    def rate(self) -> float:
        """Share of the steps that were accepted; NaN before any. Waits for the device."""
        return float(self.accepted) / self.tried if self.tried else math.nan


@dataclass(frozen=True)
class Refinement:
    """Improves samples between the steps of a sampler; a `Refine`, for energy denoisers.

    With n steps a refinement costs n evaluations of the denoiser and one of the energy alone. It
    works through guidance, whose energy is mixed as its estimates are, and through experts.

    Args:
        step_size: α of x_t - α (noise), at x_t = z / √(1 + σ²); None for the model's own.
        steps: of descent; None: from 5 without noise to 10 from half of the process on.
        clamp: see `diffusion.energy.Clamp`.
        reject: an image does not take a step that would raise its energy.
        level: the noise level of energies: "state", the level that samples have, and none after the
            last step; or "step", that of the step just made, also after the last one, as in the
            released code, for models that know discrete levels.
        tally: counts the steps accepted, of everything that this hook refines.

    Example:
        >>> refine = Refinement(step_size=0.1)
        >>> refine.tally.rate
        nan
    """

    step_size: float | None = None
    steps: int | None = None
    clamp: Clamp = "none"
    reject: bool = True
    level: Literal["state", "step"] = "state"
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        if self.step_size is not None and self.step_size <= 0:
            raise TesseraError(f"step_size={self.step_size:g}: a step size must be positive")
        if self.steps is not None and self.steps < 0:
            raise TesseraError(f"steps={self.steps}: give a number of steps, or none at all")

    def check(self, denoiser: Denoiser) -> None:
        """Refuse a denoiser without an energy.

        Raises:
            TesseraError: it has none, or not the levels that `level` needs.
        """
        denoiser.check_energy()
        if self.level == "step":
            _known_levels(denoiser)

    def report(self) -> Report:
        """The share of steps that were accepted, "acceptance_rate"; waits for the device."""
        return {"acceptance_rate": (float(self.tally.accepted), self.tally.tried)}

    @torch.no_grad()
    def __call__(
        self, denoiser: Denoiser, x: Tensor, sigma: float, cond: Conditioning, noise: NoiseSource
    ) -> Tensor:
        """x [B, C, H, W] at noise level σ, refined; see `Refine`.

        Raises:
            TesseraError: the model has no energy, or not the levels that `level` needs.
        """
        level = sigma if self.level == "state" else _level_before(denoiser, sigma)
        if level == 0 or self.steps == 0:
            return x
        levels = torch.full((len(x),), level, dtype=torch.float64)
        steps = self.steps
        if steps is None:
            steps = int(adaptive_steps(denoiser.time(levels[:1]), 5))
        step_size: float | Tensor | None = self.step_size
        if step_size is None:
            step_size = denoiser.energy_network(sigma).step_size
        # The network sees the state's x_t, whatever level it is told.
        factor = math.sqrt((1 + level**2) / (1 + sigma**2))
        path = descend(
            denoiser,
            x * factor,
            levels,
            cond,
            step_size=step_size,
            steps=steps,
            clamp=self.clamp,
            reject=self.reject,
            # Where costs are counted, nothing is known of energies: no step is left out.
            stop_early=self.reject and x.device.type != "meta",
        )
        self.tally.add(path.accepted, steps)
        return path.z / factor


def _level_before(denoiser: Denoiser, sigma: float) -> float:
    """The noise level at which the step to σ began, of those that the denoiser visits.

    Raises:
        TesseraError: it knows a continuous range.
    """
    levels = _known_levels(denoiser)
    above = levels[levels > sigma * (1 + 1e-6)]
    return float(above[0] if len(above) else levels[-1])


def _known_levels(denoiser: Denoiser) -> Tensor:
    levels = denoiser.levels
    if levels is None:
        raise TesseraError(
            "level=step needs a model that knows discrete noise levels, and this one knows a "
            "continuous range. Use level=state"
        )
    return levels

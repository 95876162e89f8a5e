"""Fewer bricks where they are not needed: a prefix of the stack at each noise level.

Zheng et al. 2024, section 3.3: at high noise local detail is not yet decided, at low noise global
structure is settled; the brick for it, always the last one, can be left out. Only prefixes of the
stack are denoisers, because every brick was trained to see the output of the one before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser, Posterior, Wrapper, joined
from tessera.diffusion.experts import Experts
from tessera.diffusion.preconditioning import Preconditioned
from tessera.errors import TesseraError


@dataclass(frozen=True)
class Range:
    """Noise levels low <= σ < high where only the first `bricks` bricks run."""

    low: float
    high: float
    bricks: int


@dataclass(frozen=True)
class BrickSchedule:
    """How many bricks run at a noise level: those of the first range that holds it, else all."""

    ranges: tuple[Range, ...] = ()

    def bricks(self, sigma: float) -> int | None:
        """The number of bricks at σ; None for all."""
        return next((r.bricks for r in self.ranges if r.low <= sigma < r.high), None)

    def within(self, low: float, high: float) -> BrickSchedule:
        """What it says about the noise levels low <= σ < high, and nothing about others."""
        parts = [Range(max(r.low, low), min(r.high, high), r.bricks) for r in self.ranges]
        return BrickSchedule(tuple(part for part in parts if part.low < part.high))

    def __str__(self) -> str:
        return ",".join(f"{r.low:g}-{r.high:g}:{r.bricks}" for r in self.ranges)


def parse_schedule(text: str) -> BrickSchedule:
    """Ranges of σ from "0-0.5:2,20-inf:1": two bricks below 0.5, one from 20 on, else all.

    Raises:
        TesseraError: a part is not of that form, or runs backwards.
    """
    ranges = []
    for part in text.split(","):
        try:
            levels, bricks = part.split(":")
            # Not at the minus of 1e-5.
            low, high = map(float, re.split(r"(?<![eE])-", levels))
            ranges.append(Range(low, high, int(bricks)))
        except ValueError:
            raise TesseraError(
                f"`bricks={text}`: {part.strip()!r} is no range of noise levels with a number of "
                "bricks. Write LOW-HIGH:BRICKS, like 0-0.5:2,20-inf:1"
            ) from None
        if not 0 <= low < high:
            raise TesseraError(
                f"`bricks={text}`: {part.strip()!r} must begin at the lower noise level"
            )
    return BrickSchedule(tuple(ranges))


def last_brick_schedule(
    sizes: Sequence[int], ratio: float, step_sigmas: Sequence[float]
) -> BrickSchedule:
    """Leave out the last brick in a share of a sampler's steps.

    A last brick that is the largest (PG, U) is left out in the last steps, where noise is low; one
    that is the smallest (PR) in the first steps, where it is high.

    Args:
        sizes: of the bricks, first to last.
        ratio: share of the steps, 0 to 1 (the paper's t_break).
        step_sigmas: noise levels at which the steps begin, falling.

    Raises:
        TesseraError: a stack of one brick, or one whose last brick is neither the largest nor the
            smallest.
    """
    if not 0 <= ratio <= 1:
        raise TesseraError(f"`skip={ratio:g}`: give the share of the steps, from 0 to 1")
    skipped = round(ratio * len(step_sigmas))
    if skipped == 0:
        return BrickSchedule()
    if len(sizes) < 2 or min(sizes) == max(sizes) or sizes[-1] not in (min(sizes), max(sizes)):
        raise TesseraError(
            f"bricks of {', '.join(map(str, sizes))} pixels have no last brick that is the largest "
            "or the smallest of several, so there is no rule for when to skip it. Give the noise "
            "levels yourself, as in `bricks=0-0.5:1`"
        )
    prefix = len(sizes) - 1
    if skipped == len(step_sigmas):
        return BrickSchedule((Range(0.0, math.inf, prefix),))
    if sizes[-1] == max(sizes):
        first = len(step_sigmas) - skipped
        return BrickSchedule((Range(0.0, _between(step_sigmas, first), prefix),))
    return BrickSchedule((Range(_between(step_sigmas, skipped), math.inf, prefix),))


def _between(sigmas: Sequence[float], index: int) -> float:
    """A noise level between those of the steps `index` - 1 and `index`."""
    return math.sqrt(sigmas[index - 1] * sigmas[index])


class Skipping(Wrapper):
    """A stack of bricks cut short at some noise levels; what is skipped is not computed.

    Wrap it in guidance, not the other way round; both evaluations of guidance then skip.

    Args:
        denoiser: a stack that was trained with every brick's output.
        schedule: bricks by noise level.

    Raises:
        TesseraError: the network is no stack of bricks, was trained with its last output only, or
            has not as many bricks as the schedule names.
    """

    def __init__(self, denoiser: Preconditioned, schedule: BrickSchedule) -> None:
        super().__init__(denoiser)
        check = getattr(denoiser.network, "check_prefix", None)
        if check is None:
            raise TesseraError(
                "only networks made of bricks (network.kind=lego) can skip any; this one has a "
                "single part"
            )
        for part in schedule.ranges:
            check(part.bricks)
        self.schedule = schedule

    def around(self, denoiser: Denoiser) -> Skipping:
        assert isinstance(denoiser, Preconditioned)
        return Skipping(denoiser, self.schedule)

    def for_step(self, sigma: float) -> Denoiser:
        denoiser, bricks = self.denoiser.for_step(sigma), self.schedule.bricks(sigma)
        if bricks is None:
            return denoiser
        assert isinstance(denoiser, Preconditioned)
        return Skipping(denoiser, BrickSchedule((Range(0.0, math.inf, bricks),)))

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        """As every denoiser; images at different noise levels run as many bricks as theirs need."""
        levels = sigma.reshape(-1).expand(len(z))
        wanted = [self.schedule.bricks(level) for level in levels.tolist()]
        if len(set(wanted)) == 1:
            posterior: Posterior = self.denoiser(z, sigma, cond, bricks=wanted[0])
            return posterior
        counts = [*dict.fromkeys(wanted)]
        rows = [torch.tensor([i for i, w in enumerate(wanted) if w == n]) for n in counts]
        pairs = zip(counts, rows, strict=True)
        return joined([self._part(*pair, z, levels, cond) for pair in pairs], rows)

    def _part(
        self, bricks: int | None, rows: Tensor, z: Tensor, levels: Tensor, cond: Conditioning
    ) -> Posterior:
        here = rows.to(z.device)
        part: Posterior = self.denoiser(
            z[here], levels[rows.to(levels.device)], cond[here], bricks=bricks
        )
        return part


def cut_bricks(denoiser: nn.Module, schedule: BrickSchedule) -> Denoiser:
    """A model's denoiser, running as many bricks as the schedule says; of experts each its own.

    An expert of whose noise levels the schedule says nothing stays as it is.

    Raises:
        TesseraError: see `Skipping`.
    """
    if isinstance(denoiser, Experts):
        cuts = [(expert, schedule.within(*band)) for expert, band in denoiser.owned()]
        parts = [cut_bricks(expert, own) if own.ranges else expert for expert, own in cuts]
        return Experts(parts, denoiser.thresholds)
    if not isinstance(denoiser, Preconditioned):
        raise TesseraError("only a denoiser around one network can skip bricks of it")
    return Skipping(denoiser, schedule)

"""Fewer bricks where they are not needed: a prefix of the stack at each noise level.

Zheng et al. 2024, section 3.3: at high noise local detail is not yet decided, at low noise global
structure is settled; the brick for it, always the last one, can be left out. Only prefixes of the
stack are denoisers, because every brick was trained to see the output of the one before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser, Posterior, Wrapper, joined
from tessera.diffusion.experts import Experts
from tessera.diffusion.preconditioning import Preconditioned
from tessera.errors import TesseraError
from tessera.networks.lego import BrickSpec


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
        denoiser: the whole stack.
        prefixes: the denoisers of its first so many bricks, one for each number in `schedule`.
        schedule: bricks by noise level.

    Example:
        >>> skipping = cut_bricks(denoiser, parse_schedule("0-0.5:1"))  # doctest: +SKIP
    """

    def __init__(
        self, denoiser: Denoiser, prefixes: Mapping[int, Denoiser], schedule: BrickSchedule
    ) -> None:
        super().__init__(denoiser)
        self.prefixes = nn.ModuleDict({str(bricks): d for bricks, d in prefixes.items()})
        self.schedule = schedule

    def around(self, denoiser: Denoiser) -> Skipping:
        return Skipping(denoiser, self._prefixes(), self.schedule)

    def for_levels(self, levels: Tensor) -> Denoiser:
        prefixes = {bricks: d.for_levels(levels) for bricks, d in self._prefixes().items()}
        return Skipping(self.denoiser.for_levels(levels), prefixes, self.schedule)

    def for_step(self, sigma: float) -> Denoiser:
        return self._of(self.schedule.bricks(sigma)).for_step(sigma)

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        """As every denoiser; images at different noise levels run as many bricks as theirs need."""
        levels = sigma.reshape(-1).expand(len(z))
        wanted = [self.schedule.bricks(level) for level in levels.tolist()]
        if len(set(wanted)) == 1:
            posterior: Posterior = self._of(wanted[0])(z, sigma, cond)
            return posterior
        counts = [*dict.fromkeys(wanted)]
        rows = [torch.tensor([i for i, w in enumerate(wanted) if w == n]) for n in counts]
        parts = [
            self._of(count)(z[here], levels[row.to(levels.device)], cond[here])
            for count, row in zip(counts, rows, strict=True)
            for here in (row.to(z.device),)
        ]
        return joined(parts, rows)

    def _of(self, bricks: int | None) -> Denoiser:
        """The denoiser that runs so many bricks; None: all."""
        return self.denoiser if bricks is None else self._prefixes()[bricks]

    def _prefixes(self) -> dict[int, Denoiser]:
        return {int(n): d for n, d in self.prefixes.items() if isinstance(d, Denoiser)}


def brick_sizes(denoiser: Denoiser) -> list[tuple[list[int], tuple[float, float]]]:
    """Sizes of the bricks of a stack, first to last, and the noise levels low <= σ < high it owns.

    Several of them where the stacks are experts.

    Raises:
        TesseraError: a network is not made of bricks.
    """
    if isinstance(denoiser, Experts):
        return [
            (sizes, (max(low, own[0]), min(high, own[1])))
            for expert, own in denoiser.owned()
            for sizes, (low, high) in brick_sizes(expert)
        ]
    specs: Sequence[BrickSpec] | None = getattr(denoiser.networks()[0], "specs", None)
    if specs is None:
        raise TesseraError(
            "one of the experts is not made of bricks. Say at which noise levels to skip any, as "
            "in bricks='0-0.5:1'"
        )
    return [([spec.size for spec in specs], (0.0, math.inf))]


def skipping_schedule(denoiser: Denoiser, ratio: float, levels: Sequence[float]) -> BrickSchedule:
    """`last_brick_schedule` of a stack, or of each stack of experts at its own noise levels."""
    ranges: list[Range] = []
    for sizes, band in brick_sizes(denoiser):
        for part in last_brick_schedule(sizes, ratio, levels).within(*band).ranges:
            if ranges and (ranges[-1].high, ranges[-1].bricks) == (part.low, part.bricks):
                part = replace(part, low=ranges.pop().low)
            ranges.append(part)
    return BrickSchedule(tuple(ranges))


def cut_bricks(denoiser: Denoiser, schedule: BrickSchedule) -> Denoiser:
    """A model's denoiser, running as many bricks as the schedule says; of experts each its own.

    An expert of whose noise levels the schedule says nothing stays as it is.

    Raises:
        TesseraError: the network is no stack of bricks, was trained with its last output only, or
            has not as many bricks as the schedule names.
    """
    if isinstance(denoiser, Experts):
        cuts = [(expert, schedule.within(*band)) for expert, band in denoiser.owned()]
        parts = [cut_bricks(expert, own) if own.ranges else expert for expert, own in cuts]
        return Experts(parts, denoiser.thresholds)
    prefix = getattr(getattr(denoiser, "network", None), "prefix", None)
    if not isinstance(denoiser, Preconditioned) or prefix is None:
        raise TesseraError(
            "only networks made of bricks (network.kind=lego) can skip any; this one has a single "
            "part"
        )
    counts = dict.fromkeys(part.bricks for part in schedule.ranges)
    prefixes = {bricks: denoiser.around(prefix(bricks)) for bricks in counts}
    return Skipping(denoiser, prefixes, schedule)

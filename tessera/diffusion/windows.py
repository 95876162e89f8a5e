"""Pictures larger than a denoiser was trained for, from overlapping windows of its own size."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser, Posterior, Wrapper
from tessera.errors import TesseraError


class Windows(Wrapper):
    """Denoises a canvas window by window and blends the estimates where windows overlap.

    As every evaluation of a sampler is blended, neighbouring windows settle on one picture, and
    nothing is cut where they meet. Each window has the coordinates that the denoiser was trained
    with. A pixel's weight falls linearly to the edge of a window. Learned variances are blended as
    the estimates are, by their logarithms.

    Args:
        denoiser: of windows; may itself be guided or skip bricks.
        size: (height, width) of the canvas, at least those of a window.
        overlap: share of a window that the next one sees, too, at the least.
        batch: most windows that are denoised at once.

    Raises:
        TesseraError: a canvas smaller than a window, or an overlap that is no share.
    """

    weight: Tensor

    def __init__(
        self, denoiser: Denoiser, size: tuple[int, int], overlap: float = 0.5, batch: int = 64
    ) -> None:
        super().__init__(denoiser)
        channels, *window = denoiser.shape
        if size[0] < window[0] or size[1] < window[1]:
            raise TesseraError(
                f"windows of {window[0]}x{window[1]} do not fit into a canvas of "
                f"{size[0]}x{size[1]} (height x width)"
            )
        if not 0 <= overlap < 1:
            raise TesseraError(f"`overlap={overlap:g}`: give a share from 0 to less than 1")
        self.overlap, self.batch = overlap, batch
        self.shape = (channels, *size)
        down, across = (_starts(*sides, overlap) for sides in zip(size, window, strict=True))
        self.corners = [(y, x) for y in down for x in across]
        rows, columns = map(_tent, window)
        self.register_buffer("weight", rows[:, None] * columns, persistent=False)

    def around(self, denoiser: Denoiser) -> Windows:
        return Windows(denoiser, self.shape[1:], self.overlap, self.batch)

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        """As every denoiser, on z [B, C, H, W] of the canvas's size."""
        _, height, width = self.denoiser.shape
        weight = self.weight.to(z.device)
        levels = sigma.reshape(-1).expand(len(z))
        cond = replace(cond, coords=None)
        totals: list[Tensor] = []
        mass = torch.zeros(z.shape[-2:], dtype=torch.float32, device=z.device)
        learned = False
        group = max(1, self.batch // len(z))
        for first in range(0, len(self.corners), group):
            corners = self.corners[first : first + group]
            count = len(corners)
            parts = torch.cat([z[:, :, y : y + height, x : x + width] for y, x in corners])
            repeated = cond.map(partial(_repeat, count=count))
            posterior: Posterior = self.denoiser(parts, levels.repeat(count), repeated)
            variance = posterior.log_variance
            learned = variance is not None
            maps = [*posterior.estimates, *([] if variance is None else [variance])]
            totals = totals or [torch.zeros(z.shape, device=z.device) for _ in maps]
            for total, values in zip(totals, maps, strict=True):
                for (y, x), part in zip(corners, values.chunk(count), strict=True):
                    total[:, :, y : y + height, x : x + width] += weight * part
            for y, x in corners:
                mass[y : y + height, x : x + width] += weight
        blended = [total / mass for total in totals]
        log_variance = blended.pop() if learned else None
        *stages, mean = blended
        return Posterior(mean, log_variance, tuple(stages))


def _repeat(batch: Tensor, count: int) -> Tensor:
    """The batch [B, ...] so many times over, [count B, ...]."""
    return batch.repeat(count, *[1] * (batch.ndim - 1))


def _starts(side: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along an axis: evenly, from edge to edge, with at least the overlap."""
    stride = max(1, math.floor(window * (1 - overlap)))
    count = math.ceil((side - window) / stride) + 1
    return [round(i * (side - window) / max(count - 1, 1)) for i in range(count)]


def _tent(side: int) -> Tensor:
    """Weights that fall linearly from the middle to 1 / side at the edges, [side]."""
    index = torch.arange(side, dtype=torch.float32)
    return torch.minimum(index + 0.5, side - index - 0.5) * (2 / side)

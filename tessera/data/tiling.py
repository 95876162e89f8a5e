"""Large canvases in overlapping tiles, whose results are blended so that no seam is seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.errors import DataError


@dataclass(frozen=True)
class Tiling:
    """How an autoencoder cuts canvases.

    Attributes:
        tile: side of a tile, pixels of the image.
        overlap: the least that neighbours share, pixels.
        above: canvases of more pixels than this are cut.

    Example:
        >>> Tiling(tile=512, overlap=128, above=512**2).cuts(512, 2048)
        True
    """

    tile: int = 512
    overlap: int = 128
    above: int = 1024**2

    def cuts(self, height: int, width: int) -> bool:
        """Whether a canvas of so many pixels is cut."""
        return height * width > self.above and max(height, width) > self.tile

    def cells(self, downsample: int) -> tuple[int, int]:
        """Tile and overlap in latent pixels.

        Raises:
            DataError: they are no multiples of `downsample`, or the overlap does not fit the tile.
        """
        for name, size in (("a tile", self.tile), ("an overlap", self.overlap)):
            if size <= 0 or size % downsample:
                raise DataError(
                    f"{name} of {size} pixels: give a positive multiple of {downsample}, because "
                    "each latent pixel stands for so many of the image"
                )
        if 2 * self.overlap > self.tile:
            raise DataError(
                f"an overlap of {self.overlap} pixels is more than half a tile of {self.tile}; "
                "make the tiles larger or the overlap smaller"
            )
        return self.tile // downsample, self.overlap // downsample


def blend_tiles(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: int,
    overlap: int,
    *,
    shrink: int = 1,
    grow: int = 1,
) -> Tensor:
    """`function` of x [B, C, H, W], computed in tiles: float32 [B, C', H grow / shrink, ...].

    All tiles have the same size and are spread evenly. diffusers' own tiling starts each a step
    after the last one, so that the final one may be a strip of a few pixels, for whose group norms
    and attention there is nothing to go by; it also blends up to the very border of a tile, which
    the padding of the convolutions has spoiled. Here that border counts for nothing.

    Args:
        function: of a tile [B, C, h, w] to [B, C', h grow / shrink, w grow / shrink].
        tile, overlap: cells, which are `shrink` numbers of x and `grow` of the result.
    """
    ways = [_Axis(x.shape[dim] // shrink, tile, overlap, grow, x.device) for dim in (2, 3)]
    total: Tensor | None = None
    for top, rows in ways[0]:
        for left, columns in ways[1]:
            part = function(
                x[
                    :,
                    :,
                    top * shrink : (top + ways[0].tile) * shrink,
                    left * shrink : (left + ways[1].tile) * shrink,
                ]
            ).to(torch.float32)
            if total is None:
                total = part.new_zeros(*part.shape[:2], *(way.cells * grow for way in ways))
            height, width = part.shape[2:]
            place = total[:, :, top * grow :, left * grow :][:, :, :height, :width]
            place += part * rows[:, None] * columns
    assert total is not None
    return total


class _Axis:
    """The tiles along one side of a canvas: where each begins, and the weights of its results."""

    def __init__(
        self, cells: int, tile: int, overlap: int, grow: int, device: torch.device
    ) -> None:
        self.cells, self.tile = cells, min(tile, cells)
        count = 1 if cells <= tile else math.ceil((cells - overlap) / (tile - overlap))
        room = cells - self.tile
        self._starts = [round(i * room / max(count - 1, 1)) for i in range(count)]
        size, border = self.tile * grow, overlap * grow // 4
        ramp = (torch.arange(size, device=device) + 0.5 - border) / max(overlap * grow / 2, 1)
        up = ramp.clamp(0, 1)
        weights = torch.zeros(count, cells * grow, device=device)
        for row, start in zip(weights, self._starts, strict=True):
            own = torch.ones(size, device=device)
            # At the borders of the canvas there is no neighbour.
            own *= up if start > 0 else 1
            own *= up.flip(0) if start < room else 1
            row[start * grow :][:size] = own
        weights /= weights.sum(0)
        self._weights = [
            row[start * grow :][:size] for row, start in zip(weights, self._starts, strict=True)
        ]

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return iter(zip(self._starts, self._weights, strict=True))

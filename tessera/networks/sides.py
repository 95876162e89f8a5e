"""Which heights and widths networks take; plain arithmetic, which recipes are checked by, too."""

from __future__ import annotations

from collections.abc import Iterable


def tiled(side: int, bricks: Iterable[tuple[int, int]]) -> bool:
    """Whether bricks of (size, patch) pixels tile a canvas of this height or width.

    A canvas smaller than a brick is one small patch to it.
    """
    return side > 0 and all(side % (patch if side < size else size) == 0 for size, patch in bricks)


def halved(side: int, levels: int, patch: int = 1) -> bool:
    """Whether a U-Net of so many levels, on patches of `patch` pixels, takes this side."""
    return side > 0 and side % (patch << max(levels - 1, 0)) == 0

"""The published sizes of MAR, apart from the network, which needs PyTorch."""

from __future__ import annotations

from typing import NamedTuple


class MarSize(NamedTuple):
    """Of encoder and decoder, which are alike, and of the head."""

    width: int
    depth: int
    heads: int
    head_width: int
    head_depth: int


MAR_SIZES = {
    "base": MarSize(768, 12, 12, 1024, 6),
    "large": MarSize(1024, 16, 16, 1280, 8),
    "huge": MarSize(1280, 20, 16, 1536, 12),
}
"""The heads are those of the released models."""

"""The published sizes of diffusion transformers, apart from the networks, which need PyTorch."""

from __future__ import annotations

from typing import NamedTuple


class Preset(NamedTuple):
    """Depth, width and heads of a published size."""

    depth: int
    width: int
    heads: int


SIZES = {
    "S": Preset(12, 384, 6),
    "B": Preset(12, 768, 12),
    "L": Preset(24, 1024, 16),
    "XL": Preset(28, 1152, 16),
}
"""Every size exists with tokens of 1, 2, 4 and 8 pixels: DiT-XL/2 is "XL" with `patch=2`."""

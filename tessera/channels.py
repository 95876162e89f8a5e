"""Which channels images may have, importable without PyTorch."""

from __future__ import annotations

MAX_CHANNELS = 64
"""Of an image; grey and RGB images are files of pictures, others arrays of NumPy."""


def is_picture(channels: int) -> bool:
    """Whether images of so many channels are grey or RGB."""
    return channels in (1, 3)

"""Limits that several parts of the library share, importable without PyTorch."""

from __future__ import annotations

MAX_CHANNELS = 64
"""Of images."""

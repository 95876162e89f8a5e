"""Means and log-variances of a VAE's posteriors: of blocks of latents, and over a whole set."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


def pool_moments(moments: Tensor, factor: int) -> Tensor:
    """The posterior of means of blocks of latents, whose numbers are independent given the image.

    Args:
        moments: means and log-variances [B, 2 C, h, w]; -inf for what has no variance.
        factor: side of a block; it divides h and w.

    Returns:
        float32 [B, 2 C, h / factor, w / factor].

    Example:
        >>> pool_moments(torch.zeros(1, 2, 4, 4), 2)[0, :, 0, 0]  # a variance of 1 / 4
        tensor([ 0.0000, -1.3863])
    """
    moments = moments.to(torch.float32)
    if factor == 1:
        return moments
    mean, log_variance = moments.chunk(2, dim=1)
    variance = F.avg_pool2d(log_variance.clamp(max=20).exp(), factor) / factor**2
    return torch.cat([F.avg_pool2d(mean, factor), variance.log()], dim=1)


class ChannelStatistics:
    """Mean and standard deviation of each channel of samples of posteriors.

    Args:
        channels: of the latents, C.
        shift: what is taken from the latents before they are counted.
    """

    def __init__(self, channels: int, shift: float = 0.0) -> None:
        self._channels, self._shift, self._count = channels, shift, 0
        self._total, self._squares = np.zeros(channels), np.zeros(channels)

    def add(self, rows: NDArray[Any]) -> None:
        """Count means and log-variances [n, 2 C, h, w], or samples [n, C, h, w]."""
        mean = rows[:, : self._channels].astype(np.float64) - self._shift
        self._count += mean[:, 0].size
        self._total += mean.sum(axis=(0, 2, 3))
        self._squares += (mean**2).sum(axis=(0, 2, 3))
        if rows.shape[1] > self._channels:
            log_variance = rows[:, self._channels :].astype(np.float64)
            self._squares += np.exp(log_variance).sum(axis=(0, 2, 3))

    def result(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation, [C] each."""
        mean = self._total / self._count
        return mean, np.sqrt(np.maximum(self._squares / self._count - mean**2, 0))

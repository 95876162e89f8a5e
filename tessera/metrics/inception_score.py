"""Inception Score (Salimans et al. 2016), accumulated batch by batch for any rule of splitting."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.errors import DataError


def consecutive_splits(n: int, size: int = 5000) -> NDArray[np.int64]:
    """ADM's and RDM's rule: the split [N] of each image; the last split may be short."""
    return np.arange(n) // size


def equal_splits(n: int, count: int = 10, shuffle_seed: int | None = None) -> NDArray[np.int64]:
    """torch-fidelity's rule: the split [N] of each image, `count` equal parts.

    Args:
        n: number of images.
        count: of parts.
        shuffle_seed: images are put into parts in the order of a legacy Mersenne twister with this
            seed; None for the order that they come in.

    Raises:
        DataError: there are fewer images than parts.
    """
    if n < count:
        raise DataError(f"an Inception Score over {count} splits needs {count} images, got {n}")
    bounds = np.array([part * n // count for part in range(count + 1)])
    parts = np.repeat(np.arange(count), np.diff(bounds))
    if shuffle_seed is None:
        return parts
    splits = np.empty(n, np.int64)
    splits[np.random.RandomState(shuffle_seed).permutation(n)] = parts
    return splits


@dataclass
class SplitScore:
    """Sums that the score of each split needs; those of several processes can be merged.

    Attributes:
        splits: int64 [N], the split of each image.
        counts: float64 [S], images so far.
        probabilities: float64 [S, K], sums of softmax probabilities.
        negative_entropy: float64 [S], sums of Σ_k p_k ln p_k.
    """

    splits: NDArray[np.int64]
    counts: Tensor
    probabilities: Tensor
    negative_entropy: Tensor

    @classmethod
    def empty(cls, splits: NDArray[np.int64], classes: int) -> SplitScore:
        """Sums of no images yet."""
        count = int(splits.max()) + 1
        zeros = torch.zeros(count, classes, dtype=torch.float64)
        return cls(splits, zeros[:, 0].clone(), zeros, zeros[:, 0].clone())

    def update(self, rows: NDArray[np.int64], logits: Tensor) -> None:
        """Add the images that are numbers `rows` [B] of all, logits [B, K]."""
        logarithms = logits.to(torch.float64).log_softmax(dim=1).cpu()
        values = logarithms.exp()
        splits = torch.from_numpy(self.splits[rows])
        self.counts.index_add_(0, splits, torch.ones(len(rows), dtype=torch.float64))
        self.probabilities.index_add_(0, splits, values)
        self.negative_entropy.index_add_(0, splits, (values * logarithms).sum(dim=1))

    def merge(self, other: SplitScore) -> None:
        """Add the images behind `other`."""
        self.counts += other.counts
        self.probabilities += other.probabilities
        self.negative_entropy += other.negative_entropy

    def score(self) -> tuple[float, float]:
        """exp(mean KL(p(y|x) || p(y))) of each split: mean and standard deviation over splits."""
        mean = self.probabilities / self.counts[:, None]
        marginal = torch.special.xlogy(mean, mean).sum(dim=1)
        scores = (self.negative_entropy / self.counts - marginal).exp()
        return float(scores.mean()), float(scores.std(correction=0))

"""Kernel Inception Distance (Bińkowski et al. 2018), on the subsets that torch-fidelity draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.errors import DataError
from tessera.progress import progress

_ROWS = 256  # of a kernel matrix at once, so that it stays in the processor's cache
SEED = 2020

Kernel = Callable[[Tensor, Tensor], Tensor]


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """(x·y / D + 1)³ for x [N, D], y [M, D]."""
    one = x.new_ones(())
    return torch.addmm(one, x, y.T, alpha=1 / x.shape[1]).pow_(3)


def gaussian(sigma: float) -> Kernel:
    """exp(-|x - y|² / 2σ²)."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squares = x.square().sum(1)[:, None] + y.square().sum(1)
        return torch.addmm(squares, x, y.T, alpha=-2).div_(-2 * sigma**2).exp_()

    return kernel


def subsets(
    n_samples: int, n_reference: int, count: int = 100, size: int = 1000, seed: int = SEED
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows of samples and of reference images, `count` times `size` without replacement.

    They come from one legacy Mersenne twister, as in torch-fidelity: the same seed, the same rows.
    """
    random = np.random.RandomState(seed)
    for _ in range(count):
        yield (
            random.choice(n_samples, size, replace=False),
            random.choice(n_reference, size, replace=False),
        )


def kernel_distance(
    samples: Tensor,
    reference: Tensor,
    *,
    count: int = 100,
    size: int = 1000,
    seed: int = SEED,
    kernel: Kernel = polynomial,
) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the squared maximum mean discrepancy.

    Args:
        samples, reference: features [N, D] and [M, D].
        count, size: number of subsets, and rows in each.
        seed: of the subsets.
        kernel: of two sets of features.

    The estimate is unbiased up to the diagonal of the mixed term, which the field keeps; around
    zero it may be negative.

    Raises:
        DataError: a set has fewer than `size` rows.
    """
    fewest = min(len(samples), len(reference))
    if fewest < size:
        raise DataError(
            f"KID compares subsets of {size:,} images, but there are only {fewest:,}; "
            "give more images"
        )
    values = []
    with progress("KID", count, unit="subsets") as bar:
        for rows, others in subsets(len(samples), len(reference), count, size, seed):
            x = samples[torch.from_numpy(rows).to(samples.device)]
            y = reference[torch.from_numpy(others).to(reference.device)]
            within = _sum_of_pairs(x, kernel) + _sum_of_pairs(y, kernel)
            across = _sum_of_products(x, y, kernel)
            values.append(within / (size * (size - 1)) - 2 * across / size**2)
            bar.advance()
    result = torch.stack(values)
    return float(result.mean()), float(result.std(correction=0))


def _sum_of_pairs(x: Tensor, kernel: Kernel) -> Tensor:
    """Sum of k(x_i, x_j) over i ≠ j, float64; the kernel is symmetric, so half of it is enough."""
    total = x.new_zeros((), dtype=torch.float64)
    for start in range(0, len(x), _ROWS):
        rows = x[start : start + _ROWS]
        values = kernel(rows, x[start:])
        square = values[:, : len(rows)]
        total += square.sum(dtype=torch.float64) - square.diagonal().sum(dtype=torch.float64)
        total += 2 * values[:, len(rows) :].sum(dtype=torch.float64)
    return total


def _sum_of_products(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """Sum of k(x_i, y_j) over all i and j, float64."""
    total = x.new_zeros((), dtype=torch.float64)
    for start in range(0, len(x), _ROWS):
        total += kernel(x[start : start + _ROWS], y).sum(dtype=torch.float64)
    return total

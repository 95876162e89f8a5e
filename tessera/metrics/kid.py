"""Kernel Inception Distance (Bińkowski et al. 2018), on the subsets that torch-fidelity draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.errors import DataError
from tessera.progress import progress

_ROWS = 512  # of a kernel matrix at once, so that it stays in the processor's cache
SEED = 2020
SIZE = 1000  # images in a subset

Kernel = Callable[[Tensor, Tensor], Tensor]
"""A symmetric kernel of every row of [N, D] with every row of [M, D], [N, M]."""


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x·y / D + 1)³ of features [N, D] and [M, D]: [N, M]."""
    return torch.addmm(x.new_ones(()), x, y.T, alpha=1 / x.shape[1]).pow_(3)


def subsets(
    n_samples: int, n_reference: int, count: int = 100, size: int = SIZE, seed: int = SEED
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
    size: int = SIZE,
    seed: int = SEED,
    kernel: Kernel = cubic_kernel,
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
    if samples.is_cuda:  # where products of float32 may be rounded to TensorFloat32
        samples, reference = samples.double(), reference.double()
    values = []
    with progress("KID", count, unit="subsets") as bar:
        for rows, others in subsets(len(samples), len(reference), count, size, seed):
            x = samples[torch.from_numpy(rows).to(samples.device)]
            y = reference[torch.from_numpy(others).to(reference.device)]
            within = _sum_of_pairs(x, kernel) + _sum_of_pairs(y, kernel)
            across = _sum_of_products(x, y, kernel)
            values.append(within / (size * (size - 1)) - 2 * across / size**2)
            bar.advance()
    found = torch.stack(values)
    return float(found.mean()), float(found.std(correction=0))


def _sum_of_pairs(x: Tensor, kernel: Kernel) -> Tensor:
    """Sum of k(x_i, x_j) over i ≠ j, float64; the kernel is symmetric, so half of it is enough."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), _ROWS):
        values = kernel(x[start : start + _ROWS], x[start:])
        square = values[:, : len(values)]
        square.fill_diagonal_(0)
        # Rows first: sums of float64 are slow, and short sums of float32 exact enough.
        total += 2 * values.sum(dim=1).sum(dtype=torch.float64)
        total -= square.sum(dim=1).sum(dtype=torch.float64)
    return total


def _sum_of_products(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """Sum of k(x_i, y_j) over all i and j, float64."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in torch.split(x, _ROWS):
        total += kernel(rows, y).sum(dim=1).sum(dtype=torch.float64)
    return total

"""Kernel Inception Distance (Bińkowski et al. 2018), on the subsets that torch-fidelity draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

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
    drawn = list(subsets(len(samples), len(reference), count, size, seed))
    # Subsets of small sets share most of their pairs: then each pair is computed once for all.
    if max(len(samples), len(reference)) ** 2 < count * size**2:
        within, across = _sums_over_whole_sets(samples, reference, drawn, kernel)
    else:
        within, across = _sums_over_subsets(samples, reference, drawn, kernel)
    values = within / (size * (size - 1)) - 2 * across / size**2
    return float(values.mean()), float(values.std(correction=0))


_Subsets = Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]


def _sums_over_subsets(
    samples: Tensor, reference: Tensor, drawn: _Subsets, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """Sums of the kernel within both sets and across, float64 [S] each, subset after subset."""
    within, across = [], []
    with progress("KID", len(drawn), unit="subsets") as bar:
        for rows, others in drawn:
            x = samples[torch.from_numpy(rows).to(samples.device)]
            y = reference[torch.from_numpy(others).to(reference.device)]
            within.append(_sum_of_pairs(x, kernel) + _sum_of_pairs(y, kernel))
            across.append(_sum_of_products(x, y, kernel))
            bar.advance()
    return torch.stack(within), torch.stack(across)


def _sums_over_whole_sets(
    samples: Tensor, reference: Tensor, drawn: _Subsets, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """The same from the kernel of all rows, of which each subset is a sum by membership."""
    x_in = samples.new_zeros(len(drawn), len(samples))
    y_in = reference.new_zeros(len(drawn), len(reference))
    for index, (ours, theirs) in enumerate(drawn):
        x_in[index, torch.from_numpy(ours).to(x_in.device)] = 1
        y_in[index, torch.from_numpy(theirs).to(y_in.device)] = 1
    within = samples.new_zeros(len(drawn), dtype=torch.float64)
    across = torch.zeros_like(within)
    with progress("KID", 2 * len(samples) + len(reference), unit="rows") as bar:
        for features, member in ((samples, x_in), (reference, y_in)):
            for start in range(0, len(features), _ROWS):
                rows = slice(start, min(start + _ROWS, len(features)))
                values = kernel(features[rows], features[start:])
                # Pairs of this block count once, those to its right stand for both orders.
                height = rows.stop - start
                values[:, :height].fill_diagonal_(0)
                values[:, height:] *= 2
                within += _by_membership(member[:, rows], values, member[:, start:])
                bar.advance(height)
        for start in range(0, len(samples), _ROWS):
            rows = slice(start, min(start + _ROWS, len(samples)))
            across += _by_membership(x_in[:, rows], kernel(samples[rows], reference), y_in)
            bar.advance(rows.stop - start)
    return within, across


def _by_membership(left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """Σ_ij left[s, i] values[i, j] right[s, j] for each subset s, float64 [S]."""
    return ((left @ values) * right).sum(dim=1, dtype=torch.float64)


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

"""Kernel Inception Distance (Bińkowski et al. 2018), on the subsets that torch-fidelity draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.errors import DataError
from tessera.metrics.kernels import Kernel, Operand, Polynomial
from tessera.progress import progress

_ROWS = 512  # of a kernel matrix at once, so that it stays in the processor's cache
SEED = 2020
SIZE = 1000  # images in a subset


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
    kernel: Kernel | None = None,
) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the squared maximum mean discrepancy.

    Args:
        samples, reference: features [N, D] and [M, D].
        count, size: number of subsets, and rows in each.
        seed: of the subsets.
        kernel: of two sets of features; by default (x·y / D + 1)³.

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
    kernel = kernel or Polynomial(reference.mean(dim=0, dtype=torch.float64))
    drawn = list(subsets(len(samples), len(reference), count, size, seed))
    x_in, y_in = (
        _membership(samples, [x for x, _ in drawn]),
        _membership(reference, [y for _, y in drawn]),
    )
    within, across = kernel.exact(samples, reference, x_in, y_in)
    x, y = kernel.operand(samples), kernel.operand(reference)
    # Subsets of small sets share most of their pairs: then each pair is computed once for all.
    if max(len(x), len(y)) ** 2 <= count * size**2:
        pairs_within, pairs_across = _sums_over_whole_sets(x, y, x_in, y_in, kernel)
    else:
        pairs_within, pairs_across = _sums_over_subsets(x, y, drawn, kernel)
    within, across = within + pairs_within, across + pairs_across
    values = within / (size * (size - 1)) - 2 * across / size**2
    return float(values.mean()), float(values.std(correction=0))


_Subsets = Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]


def _membership(features: Tensor, rows: Sequence[NDArray[np.int64]]) -> Tensor:
    """1 for the rows in each subset and else 0, float32 [S, N]."""
    result = torch.zeros(len(rows), len(features), device=features.device)
    numbers = torch.from_numpy(np.stack(rows)).to(features.device)
    return result.scatter_(1, numbers, 1)


def _sums_over_subsets(
    samples: Operand, reference: Operand, drawn: _Subsets, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """Sums of the kernel within both sets and across, float64 [S] each, subset after subset."""
    within, across = [], []
    with progress("KID", len(drawn), unit="subsets") as bar:
        for rows, others in drawn:
            x = samples[torch.from_numpy(rows).to(samples.extra.device)]
            y = reference[torch.from_numpy(others).to(samples.extra.device)]
            within.append(_sum_of_pairs(x, kernel) + _sum_of_pairs(y, kernel))
            across.append(_sum_of_products(x, y, kernel))
            bar.advance()
    return torch.stack(within), torch.stack(across)


def _sums_over_whole_sets(
    samples: Operand, reference: Operand, x_in: Tensor, y_in: Tensor, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """The same from the kernel of all rows, of which each subset is a sum by membership."""
    within = torch.zeros(len(x_in), dtype=torch.float64, device=x_in.device)
    across = torch.zeros_like(within)
    with progress("KID", 2 * len(samples) + len(reference), unit="rows") as bar:
        for side, member in ((samples, x_in), (reference, y_in)):
            for rows in _blocks(side):
                values = kernel.pairs(side[rows], side[rows.start :])
                # Pairs of this block count once, those to its right stand for both orders.
                height = len(values)
                values[:, :height].fill_diagonal_(0)
                values[:, height:] *= 2
                within += _by_membership(member[:, rows], values, member[:, rows.start :])
                bar.advance(height)
        for rows in _blocks(samples):
            values = kernel.pairs(samples[rows], reference)
            across += _by_membership(x_in[:, rows], values, y_in)
            bar.advance(len(values))
    return within, across


def _blocks(side: Operand) -> list[slice]:
    return [slice(start, start + _ROWS) for start in range(0, len(side), _ROWS)]


def _by_membership(left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """Σ_ij left[s, i] values[i, j] right[s, j] for each subset s, float64 [S]."""
    values = values.to(torch.float32)
    return ((left @ values) * right).sum(dim=1, dtype=torch.float64)


def _sum_of_pairs(x: Operand, kernel: Kernel) -> Tensor:
    """Sum of k(x_i, x_j) over i ≠ j, float64; the kernel is symmetric, so half of it is enough."""
    total = torch.zeros((), dtype=torch.float64, device=x.extra.device)
    for rows in _blocks(x):
        values = kernel.pairs(x[rows], x[rows.start :])
        square = values[:, : len(values)]
        square.fill_diagonal_(0)
        # Rows first: sums of float64 are slow, and short sums of float32 exact enough.
        total += 2 * values.sum(dim=1).sum(dtype=torch.float64)
        total -= square.sum(dim=1).sum(dtype=torch.float64)
    return total


def _sum_of_products(x: Operand, y: Operand, kernel: Kernel) -> Tensor:
    """Sum of k(x_i, y_j) over all i and j, float64."""
    total = torch.zeros((), dtype=torch.float64, device=x.extra.device)
    for rows in _blocks(x):
        total += kernel.pairs(x[rows], y).sum(dim=1).sum(dtype=torch.float64)
    return total

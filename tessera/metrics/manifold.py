"""Precision and recall by nearest neighbours (Kynkäänniemi et al. 2019), without N x N matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.errors import DataError
from tessera.progress import progress

_BLOCK = {"cpu": 1024}  # rows and columns of distances at once
_BLOCK_GPU = 8192


@dataclass(frozen=True)
class PrecisionRecall:
    """Result of `precision_recall`.

    Attributes:
        precision: share of samples within the manifold of the reference images.
        recall: share of reference images within the manifold of the samples.
    """

    precision: float
    recall: float

    @property
    def f_score(self) -> float:
        """Harmonic mean of the two."""
        return 2 * self.precision * self.recall / max(1e-5, self.precision + self.recall)


def precision_recall(
    samples: Tensor, reference: Tensor, *, k: int = 3, round_radii: bool = False
) -> PrecisionRecall:
    """Improved precision and recall of features [N, D] and [M, D], in their own precision.

    A manifold is the union of balls around the features of a set, each reaching to the k-th
    nearest other feature of that set; a point on the boundary is inside.

    Args:
        samples, reference: features of generated and of real images.
        k: neighbours.
        round_radii: round the squared radii of float64 features to float32, as RDM's tool does.

    Raises:
        DataError: a set has no more than `k` rows, or rows of another length than the other.
    """
    if samples.shape[1] != reference.shape[1]:
        raise DataError(
            f"samples have {samples.shape[1]} features, the reference has {reference.shape[1]}"
        )
    # Distances do not change with the origin, but far from it their rounding grows.
    origin = reference.mean(dim=0)
    samples, reference = samples - origin, reference - origin.to(samples)
    own = squared_radii(samples, k)
    real = squared_radii(reference, k)
    if round_radii:
        own, real = own.float().to(own.dtype), real.float().to(real.dtype)
    found, covered = _covered(samples, reference, own, real)
    return PrecisionRecall(float(found.double().mean()), float(covered.double().mean()))


def squared_radii(features: Tensor, k: int = 3) -> Tensor:
    """Squared distance of each row of [N, D] to its k-th nearest other row, [N].

    Raises:
        DataError: there are no more than `k` rows.
    """
    n = len(features)
    if n <= k:
        raise DataError(f"precision and recall need more than {k} images in each set, got {n}")
    blocks, norms = _blocks(features), features.square().sum(dim=1)
    nearest = features.new_full((n, k), torch.inf)
    with progress("neighbours", len(blocks) * (len(blocks) + 1) // 2, unit="blocks") as bar:
        for i, rows in enumerate(blocks):
            for columns in blocks[i:]:
                distances = _distances(features, features, norms, norms, rows, columns)
                if rows == columns:
                    distances.fill_diagonal_(torch.inf)
                else:
                    # The distances are symmetric: each block serves its columns, too.
                    _keep_smallest(nearest[columns], distances.T)
                _keep_smallest(nearest[rows], distances)
                bar.advance()
    return nearest.amax(dim=1).clamp(min=0)


def _covered(
    samples: Tensor, reference: Tensor, own: Tensor, real: Tensor
) -> tuple[Tensor, Tensor]:
    """Which samples lie within a ball of the reference [N], and the other way round [M], bool."""
    found = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    covered = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    norms, others = samples.square().sum(dim=1), reference.square().sum(dim=1)
    row_blocks, column_blocks = _blocks(samples), _blocks(reference)
    total = len(row_blocks) * len(column_blocks)
    with progress("precision, recall", total, unit="blocks") as bar:
        for rows in row_blocks:
            for columns in column_blocks:
                distances = _distances(samples, reference, norms, others, rows, columns)
                distances.clamp_(min=0)
                found[rows] |= (distances - real[columns]).amin(dim=1) <= 0
                covered[columns] |= (distances - own[rows][:, None]).amin(dim=0) <= 0
                bar.advance()
    return found, covered


def _blocks(features: Tensor) -> list[slice]:
    size = _BLOCK.get(features.device.type, _BLOCK_GPU)
    return [slice(start, start + size) for start in range(0, len(features), size)]


def _distances(
    a: Tensor, b: Tensor, norms_a: Tensor, norms_b: Tensor, rows: slice, columns: slice
) -> Tensor:
    """|a_i - b_j|² for a block of rows and columns."""
    # The sum of norms goes in as the bias of the product: one pass over the block, not three.
    bias = norms_a[rows][:, None] + norms_b[columns]
    return torch.addmm(bias, a[rows], b[columns].T, alpha=-2)


def _keep_smallest(nearest: Tensor, distances: Tensor) -> None:
    """Put the k smallest of each row of `nearest` [B, k] and `distances` [B, M] into `nearest`."""
    k = nearest.shape[1]
    # Few rows have anything to gain once some blocks have been seen.
    better = (distances.amin(dim=1) < nearest.amax(dim=1)).nonzero().squeeze(1)
    if len(better) == 0:
        return
    candidates = distances[better]
    if candidates.shape[1] > k:
        candidates = candidates.topk(k, dim=1, largest=False, sorted=False).values
    both = torch.cat([nearest[better], candidates], dim=1)
    nearest[better] = both.topk(k, dim=1, largest=False, sorted=False).values

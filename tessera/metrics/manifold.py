"""Precision and recall by nearest neighbours (Kynkäänniemi et al. 2019), without N x N matrices.

Distances are exact to float64. Bounds from products of low precision say which of them count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.errors import DataError
from tessera.metrics.screening import Screen
from tessera.precision import fast_dtype
from tessera.progress import progress

_BLOCK = {"cpu": 1024}  # rows and columns of distances at once
_BLOCK_GPU = 8192
_CANDIDATES = 8  # kept for each row beside its k nearest
_AT_ONCE = 1 << 24  # numbers in the rows of distances that are done over in full


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
    """Improved precision and recall of features [N, D] and [M, D], float32 or float64.

    A manifold is the union of balls around the features of a set, each reaching to the k-th
    nearest other feature of that set; a point on the boundary is inside.

    Args:
        samples, reference: features of generated and of real images.
        k: neighbours.
        round_radii: round the squared radii to float32, as RDM's tool does.

    Raises:
        DataError: a set has no more than `k` rows, or rows of another length than the other.
    """
    if samples.shape[1] != reference.shape[1]:
        raise DataError(
            f"samples have {samples.shape[1]} features, the reference has {reference.shape[1]}"
        )
    origin = reference.mean(dim=0, dtype=torch.float64)
    generated, real = (_screen(f, k, origin) for f in (samples, reference))
    own, theirs = (_squared_radii(side, k) for side in (generated, real))
    if round_radii:
        own, theirs = own.float().double(), theirs.float().double()
    found, covered = _covered(generated, real, own, theirs)
    return PrecisionRecall(float(found.double().mean()), float(covered.double().mean()))


def _screen(features: Tensor, k: int, origin: Tensor) -> Screen:
    if len(features) <= k:
        raise DataError(
            f"precision and recall need more than {k} images in each set, got {len(features)}"
        )
    return Screen.of(features, origin, fast_dtype(features.device))


def _squared_radii(side: Screen, k: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row, float64 [N]."""
    n, device = len(side), side.features.device
    blocks, count = _blocks(side), min(k + _CANDIDATES, n - 1)
    nearest = torch.full((n, count), torch.inf, device=device)
    which = torch.zeros((n, count), dtype=torch.int64, device=device)
    with progress("neighbours", len(blocks) * (len(blocks) + 1) // 2, unit="blocks") as bar:
        for i, rows in enumerate(blocks):
            for columns in blocks[i:]:
                bounds = side.lower_bounds(rows, side, columns)
                if rows == columns:
                    bounds.fill_diagonal_(torch.inf)
                else:
                    # The distances are symmetric: each block serves its columns, too.
                    _keep_smallest(nearest[columns], which[columns], bounds.T, rows.start)
                _keep_smallest(nearest[rows], which[rows], bounds, columns.start)
                bar.advance()
    # What exceeds the k-th smallest upper bound cannot be among the k nearest.
    own, others = side.width(slice(None), side)
    upper = nearest + own[:, None] + others[which]
    limit = upper.kthvalue(k, dim=1, keepdim=True).values
    near = nearest <= limit
    exact = torch.full(nearest.shape, torch.inf, dtype=torch.float64, device=device)
    exact[near] = side.distances_of_pairs(near.nonzero()[:, 0], side, which[near])
    radii = exact.kthvalue(k, dim=1).values
    # The rest is farther than every candidate's bound; where that does not settle it, look at all.
    unsettled = (radii > nearest.amax(dim=1)) & (radii > 0) & (n - 1 > count)
    for far in _chunks(unsettled, n):
        bounds = side.lower_bounds(far, side, slice(None))
        bounds[torch.arange(len(far), device=device), far] = torch.inf
        every = side.distances(far, side, bounds <= radii[far][:, None])
        radii[far] = every.kthvalue(k, dim=1).values
    return radii


def _covered(
    samples: Screen, reference: Screen, own: Tensor, theirs: Tensor
) -> tuple[Tensor, Tensor]:
    """Which samples lie within a ball of the reference [N], and the other way round [M], bool."""
    blocks, others = _blocks(samples), _blocks(reference)
    # The smallest upper and lower bound of (distance less radius) settles most of them.
    sides = [_Reach(samples, reference, theirs), _Reach(reference, samples, own)]
    with progress("precision, recall", len(blocks) * len(others), unit="blocks") as bar:
        for rows in blocks:
            for columns in others:
                bounds = samples.lower_bounds(rows, reference, columns)
                sides[0].look(bounds, rows, columns)
                sides[1].look(bounds.T, columns, rows)
                bar.advance()
    found, covered = (side.inside() for side in sides)
    return found, covered


class _Reach:
    """Which of `points` lie within balls around `centres`, from bounds of their distances."""

    def __init__(self, points: Screen, centres: Screen, radii: Tensor) -> None:
        self._points, self._centres, self._radii = points, centres, radii
        own, others = points.width(slice(None), centres)
        # Rounded towards what leaves the verdict open.
        self._may = torch.nextafter(radii.float(), radii.new_tensor(torch.inf).float())
        self._must = torch.nextafter(radii.float(), radii.new_tensor(-torch.inf).float()) - others
        self._own = own
        self._least = torch.full_like(own, torch.inf)
        self._most = torch.full_like(own, torch.inf)

    def look(self, bounds: Tensor, points: slice, centres: slice) -> None:
        """Take notice of lower bounds of a block of distances."""
        least = (bounds - self._may[centres]).amin(dim=1)
        most = (bounds - self._must[centres]).amin(dim=1)
        torch.minimum(self._least[points], least, out=self._least[points])
        torch.minimum(self._most[points], most, out=self._most[points])

    def inside(self) -> Tensor:
        """Whether each point is in any ball, bool [N]; those in doubt by exact distances."""
        result = self._most + self._own <= 0
        for rows in _chunks(~result & (self._least <= 0), len(self._centres)):
            bounds = self._points.lower_bounds(rows, self._centres, slice(None))
            exact = self._points.distances(rows, self._centres, bounds <= self._may)
            result[rows] = (exact <= self._radii).any(dim=1)
        return result


def _chunks(flags: Tensor, width: int) -> list[Tensor]:
    """Row numbers that are set in `flags`, so many at once that `width` columns of them fit."""
    rows = flags.nonzero().squeeze(1)
    parts = torch.split(rows, max(1, _AT_ONCE // width))
    return [part for part in parts if len(part)]


def _blocks(side: Screen) -> list[slice]:
    size = _BLOCK.get(side.features.device.type, _BLOCK_GPU)
    return [slice(start, min(start + size, len(side))) for start in range(0, len(side), size)]


def _keep_smallest(nearest: Tensor, which: Tensor, bounds: Tensor, start: int) -> None:
    """Put the smallest of each row of `nearest` [B, C] and `bounds` [B, M] into `nearest`.

    Their columns, counted from `start` in `bounds`, go into `which` [B, C].
    """
    columns = torch.arange(start, start + bounds.shape[1], device=bounds.device)
    numbers = torch.cat([which, columns.expand(len(bounds), -1)], dim=1)
    both = torch.cat([nearest, bounds], dim=1)
    smallest, order = both.topk(nearest.shape[1], dim=1, largest=False, sorted=False)
    nearest.copy_(smallest)
    which.copy_(numbers.gather(1, order))

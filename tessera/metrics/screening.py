"""Squared distances of features: cheap lower bounds of all, exact values of those that count.

Nearest neighbours need the exact distances of a few pairs, and of the rest only that they are
farther. Products in the fastest precision of the machine say that, because their error is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 18  # numbers that are widened to float64 at once, so that they stay in the cache
_COLUMNS = 4096  # of a product in float64
_PAIRS_A_ROW = 64  # above that many exact distances to a row, a product of matrices is faster


@dataclass(frozen=True)
class Screen:
    """Features, and what bounds of their distances are made from.

    Attributes:
        features: float32 or float64 [N, D], as given.
        low: [N, D] less a common origin, in the precision of the bounds.
        norms: float32 [N], squared lengths from the origin.
        slack: an exact squared distance of i and j differs from the one computed by at most
            slack · (norms_i + norms_j), within the set and to a set of no larger slack.
    """

    features: Tensor
    low: Tensor
    norms: Tensor
    slack: float

    @classmethod
    def of(cls, features: Tensor, origin: Tensor, dtype: torch.dtype) -> Screen:
        """Prepare features [N, D]; `origin` [D], float64, near their middle makes bounds tight."""
        low = torch.empty_like(features, dtype=dtype)
        norms = features.new_empty(len(features), dtype=torch.float32)
        rounding = 0.0
        size = max(1, _CHUNK // features.shape[1])
        for rows in (slice(s, s + size) for s in range(0, len(features), size)):
            centred = features[rows].to(origin.dtype) - origin
            low[rows] = centred.to(dtype)
            lengths = centred.square().sum(dim=1)
            lost = (centred - low[rows].to(origin.dtype)).square().sum(dim=1)
            norms[rows] = lengths.to(torch.float32)
            rounding = max(rounding, float((lost / lengths).nan_to_num(0).amax()) ** 0.5)
        # |xy - x'y'| <= rounding (2 + rounding) |x||y|, and a product's own sum and result round,
        # on GPUs perhaps twice; 2|x||y| is no more than |x|² + |y|², whose sum is rounded, too.
        unit = torch.finfo(torch.float32).eps
        result = torch.finfo(dtype).eps * (1 if features.device.type == "cuda" else 0.5)
        slack = rounding * (2 + rounding) + 1.05 * (result + features.shape[1] * unit) + 8 * unit
        return cls(features, low, norms, slack)

    def __len__(self) -> int:
        return len(self.features)

    def lower_bounds(self, rows: slice | Tensor, other: Screen, columns: slice) -> Tensor:
        """Lower bounds of |a_i - b_j|², float32 [rows, columns], less than 0 for close pairs."""
        factor = 1 - max(self.slack, other.slack)
        sums = factor * self.norms[rows][:, None] + factor * other.norms[columns]
        a, b = self.low[rows], other.low[columns].T
        if a.dtype == torch.float32:
            # The sum of norms goes in as the bias of the product: one pass less over the block.
            return torch.addmm(sums, a, b, alpha=-2)
        return sums.sub_(a @ b, alpha=2)

    def width(self, rows: slice | Tensor, other: Screen) -> tuple[Tensor, Tensor]:
        """Upper less lower bound of a pair is the sum of these, of `rows` and of all of `other`."""
        twice = 2 * max(self.slack, other.slack)
        return twice * self.norms[rows], twice * other.norms

    def distances(self, rows: Tensor, other: Screen, wanted: Tensor) -> Tensor:
        """Exact |a_i - b_j|², float64 [R, M], of `rows` [R] to all M; inf where not `wanted`."""
        if int(wanted.sum()) <= _PAIRS_A_ROW * len(rows):
            pairs = wanted.nonzero()
            exact = torch.full(wanted.shape, torch.inf, dtype=torch.float64, device=wanted.device)
            exact[wanted] = self.distances_of_pairs(rows[pairs[:, 0]], other, pairs[:, 1])
            return exact
        # So many close pairs come of a collapsed model: distances lost in the bounds' rounding.
        origin = other.features.mean(dim=0, dtype=torch.float64)
        a = self.features[rows].to(torch.float64) - origin
        exact = a.new_full(wanted.shape, torch.inf)
        for start in range(0, len(other), _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            b = other.features[columns].to(torch.float64) - origin
            sums = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
            exact[:, columns] = torch.addmm(sums, a, b.T, alpha=-2).clamp_(min=0)
        return exact.masked_fill_(~wanted, torch.inf)

    def distances_of_pairs(self, rows: Tensor, other: Screen, columns: Tensor) -> Tensor:
        """Exact |a_i - b_j|² of rows [P] and columns [P], float64 [P]."""
        result = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
        size = max(1, _CHUNK // self.features.shape[1])
        for part in (slice(s, s + size) for s in range(0, len(rows), size)):
            difference = self.features[rows[part]].to(torch.float64)
            difference -= other.features[columns[part]]
            result[part] = difference.square_().sum(dim=1)
        return result

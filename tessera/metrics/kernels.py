"""Kernels of two sets of features, and the parts of their sums that need no pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tessera.precision import fast_dtype

_ROWS = 256  # prepared at once, so that they stay in the processor's cache
_HALF_PRECISION_DIM = 512  # shorter products are cheap, and average less rounding away

_VARIANCE = 1.0  # of features; that of Inception's is about 0.1. Beyond, rounding would show


@dataclass(frozen=True)
class Operand:
    """One side of a kernel matrix, prepared for products.

    Attributes:
        features: [N, D], what is multiplied.
        extra: [N], a number for each row that the kernel adds to the product.
    """

    features: Tensor
    extra: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice | Tensor) -> Operand:
        return Operand(self.features[rows], self.extra[rows])


class Kernel(Protocol):
    """Sums of k(x_i, y_j), as a part by pairs and an exact part from sums over rows."""

    def operand(self, features: Tensor) -> Operand:
        """Features [N, D] prepared for `pairs`."""
        ...

    def pairs(self, x: Operand, y: Operand) -> Tensor:
        """The part of the kernel [N, M] that needs each pair, float32 or float64."""
        ...

    def exact(self, x: Tensor, y: Tensor, x_in: Tensor, y_in: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of the rest of the kernel over subsets, float64 [S] each.

        Args:
            x, y: features [N, D] and [M, D].
            x_in, y_in: [S, N] and [S, M], 1 for the rows in a subset and else 0.

        Returns:
            Within both sets over i ≠ j, and across the two.
        """
        ...


class Polynomial:
    """(x·y / D + 1)³, in its terms.

    With x = μ + x', where μ is the middle of all features, x·y / D + 1 = u + g for u = p(x) + p(y),
    p(x) = (1 + |μ|²/D)/2 + μ·x'/D, and g = x'·y'/D. Of the kernel u³ + 3u²g + 3ug² + g³ the first
    two terms are sums over rows, taken in float64. The last two are small; their products may be
    in half precision, whose rounding averages out over the pairs of a subset.
    """

    def __init__(self, middle: Tensor) -> None:
        """`middle`: μ [D], float64; any gives the same kernel, the mean gives the fewest errors."""
        self._middle = middle

    def _parts(self, features: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For some rows at a time, x' [R, D] in float32 and p(x) [R] in float64."""
        dim = features.shape[1]
        middle = self._middle.to(features.dtype)
        constant = 0.5 * (1 - self._middle.square().sum() / dim)
        for start in range(0, len(features), _ROWS):
            rows = slice(start, start + _ROWS)
            part = features[rows]
            along = part.double() @ self._middle
            yield rows, (part - middle).to(torch.float32), constant + along / dim

    def operand(self, features: Tensor) -> Operand:
        """x' / √D and 3 p(x)."""
        dim = features.shape[1]
        squares = torch.stack([x.square().sum() for _, x, _ in self._parts(features)])
        variance = float(squares.sum()) / features.numel()
        averages = dim >= _HALF_PRECISION_DIM and variance < _VARIANCE
        dtype = fast_dtype(features.device) if averages else torch.float32
        low = torch.empty_like(features, dtype=dtype)
        extra = features.new_empty(len(features), dtype=torch.float32)
        for rows, centred, p in self._parts(features):
            low[rows] = centred * dim**-0.5
            extra[rows] = (3 * p).to(torch.float32)
        return Operand(low, extra)

    def pairs(self, x: Operand, y: Operand) -> Tensor:
        """3ug² + g³."""
        product = (x.features @ y.features.T).to(torch.float32)
        return (x.extra[:, None] + y.extra).add_(product).mul_(product.square_())

    def exact(self, x: Tensor, y: Tensor, x_in: Tensor, y_in: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of u³ + 3u²g."""
        (x_powers, x_vectors, x_diagonal), (y_powers, y_vectors, y_diagonal) = (
            self._sums(features, member) for features, member in ((x, x_in), (y, y_in))
        )
        within = self._combined(x_powers, x_vectors, x_powers, x_vectors) - x_diagonal
        within += self._combined(y_powers, y_vectors, y_powers, y_vectors) - y_diagonal
        return within, self._combined(x_powers, x_vectors, y_powers, y_vectors)

    def _sums(self, features: Tensor, member: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over subsets of p⁰ to p³ [4, S] and of p⁰x' to p²x' [3, S, D]; of the diagonal."""
        subsets, dim = len(member), features.shape[1]
        powers = features.new_zeros(4, subsets, dtype=torch.float64)
        vectors = features.new_zeros(3, subsets, dim, dtype=torch.float64)
        diagonal = torch.zeros_like(powers[0])
        for rows, centred, p in self._parts(features):
            weights = member[:, rows] * p ** torch.arange(4, device=p.device)[:, None, None]
            powers += weights.sum(dim=2)
            low = weights[:3].to(torch.float32).flatten(0, 1)
            vectors += (low @ centred).reshape(vectors.shape)
            squares = torch.linalg.vecdot(centred, centred).double() / dim
            diagonal += 8 * weights[3].sum(dim=1) + 12 * weights[2] @ squares
        return powers, vectors, diagonal

    @staticmethod
    def _combined(a: Tensor, v: Tensor, b: Tensor, w: Tensor) -> Tensor:
        """Sums over all pairs of (p + q)³ + 3 (p + q)² x'·y' / D."""
        cubes = a[3] * b[0] + 3 * a[2] * b[1] + 3 * a[1] * b[2] + a[0] * b[3]
        products = v[2] * w[0] + 2 * v[1] * w[1] + v[0] * w[2]
        return cubes + 3 * products.mean(dim=1)


class Gaussian:
    """exp(-|x - y|² / 2σ²)."""

    def __init__(self, sigma: float) -> None:
        self._sigma = sigma

    def operand(self, features: Tensor) -> Operand:
        """The features and their squared lengths."""
        return Operand(features, features.square().sum(dim=1))

    def pairs(self, x: Operand, y: Operand) -> Tensor:
        """The whole kernel."""
        squares = x.extra[:, None] + y.extra
        squares = torch.addmm(squares, x.features, y.features.T, alpha=-2)
        return squares.div_(-2 * self._sigma**2).exp_()

    def exact(self, x: Tensor, y: Tensor, x_in: Tensor, y_in: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing."""
        nothing = torch.zeros(len(x_in), dtype=torch.float64, device=x.device)
        return nothing, nothing.clone()

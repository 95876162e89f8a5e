"""Mean and covariance of features, accumulated batch by batch in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Gaussian(Protocol):
    """Mean and covariance of features: `FeatureStatistics`, or `Moments` read from a file."""

    @property
    def n(self) -> int | None: ...

    @property
    def mu(self) -> Tensor: ...

    @property
    def sigma(self) -> Tensor: ...

    @property
    def dim(self) -> int: ...


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of features, from which no more can be accumulated.

    Attributes:
        mu: float64 [D].
        sigma: float64 [D, D], divisor n - 1.
        n: vectors behind them; None where a file does not say.
    """

    mu: Tensor
    sigma: Tensor
    n: int | None = None

    @property
    def dim(self) -> int:
        """Numbers in a feature vector."""
        return len(self.mu)

    def reordered(self, order: Tensor) -> Moments:
        """The same with features [D] in another order."""
        return Moments(self.mu[order], self.sigma[order][:, order], self.n)


@dataclass
class FeatureStatistics:
    """Count, mean and scatter of feature vectors of D numbers; nothing else is kept.

    Batches and the statistics of other processes are merged around their own means (Chan, Golub &
    LeVeque 1979), so that features far from zero lose no digits.

    Attributes:
        n: vectors so far.
        mu: float64 [D], their mean.
        scatter: float64 [D, D], sum of (f - mu)(f - mu)ᵀ.
    """

    n: int
    mu: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, dim: int, device: torch.device | str = "cpu") -> FeatureStatistics:
        """Statistics of no vectors of `dim` numbers."""
        zeros = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        return cls(0, zeros[0].clone(), zeros)

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Statistics of features [N, D]."""
        if features.ndim != 2:
            raise ValueError(f"features are [N, D], got shape {tuple(features.shape)}")
        features = features.to(torch.float64)
        mu = features.mean(dim=0) if len(features) else features.new_zeros(features.shape[1])
        centred = features - mu
        return cls(len(features), mu, centred.T @ centred)

    @classmethod
    def from_moments(cls, n: int, mu: Tensor, sigma: Tensor) -> FeatureStatistics:
        """Statistics with the given mean [D] and covariance [D, D] (divisor n - 1)."""
        mu, sigma = mu.to(torch.float64), sigma.to(torch.float64)
        return cls(n, mu, sigma * (n - 1))

    @property
    def dim(self) -> int:
        """Numbers in a feature vector."""
        return len(self.mu)

    @property
    def sigma(self) -> Tensor:
        """Covariance [D, D], float64, divisor n - 1.

        Raises:
            ValueError: fewer than two vectors.
        """
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, got {self.n}")
        return self.scatter / (self.n - 1)

    def update(self, features: Tensor) -> None:
        """Add features [B, D]; on the device of the statistics if they differ."""
        batch = features.to(self.mu.device, torch.float64)
        if batch.ndim != 2 or batch.shape[1] != self.dim:
            raise ValueError(f"features are [N, {self.dim}], got shape {tuple(batch.shape)}")
        if len(batch) == 0:
            return
        total, mean = self.n + len(batch), batch.mean(dim=0)
        delta = mean - self.mu
        # The step of the mean is one more row, so that a single product adds everything.
        row = delta * (self.n * len(batch) / total) ** 0.5
        rows = torch.cat([batch - mean, row[None]])
        self.scatter.addmm_(rows.T, rows)
        self.mu = self.mu + delta * (len(batch) / total)
        self.n = total

    def moments(self) -> Moments:
        """Mean and covariance as they are now, on the CPU."""
        return Moments(self.mu.cpu(), self.sigma.cpu(), self.n)

    def merge(self, other: FeatureStatistics) -> None:
        """Add the vectors behind `other`."""
        if other.dim != self.dim:
            raise ValueError(f"features of {other.dim} numbers added to features of {self.dim}")
        if other.n == 0:
            return
        total = self.n + other.n
        delta = other.mu - self.mu
        self.scatter = self.scatter + other.scatter
        self.scatter += torch.outer(delta, delta) * (self.n * other.n / total)
        self.mu = self.mu + delta * (other.n / total)
        self.n = total

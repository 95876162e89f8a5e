"""Fréchet distance between Gaussians fitted to two sets of features."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from tessera.metrics.statistics import Gaussian

_COLUMNS = 256


def frechet_distance(a: Gaussian, b: Gaussian, device: torch.device | None = None) -> float:
    """|μ_a - μ_b|² + tr(Σ_a) + tr(Σ_b) - 2 tr((Σ_a Σ_b)^½), with a warning if it is biased.

    With no more vectors than features a covariance is singular, and the distance says more about
    the number of images than about their quality. It is computed on `device`, by default that of
    `a`, which must have float64.
    """
    for side in (a, b):
        if side.n is not None and side.n <= side.dim:
            warnings.warn(
                f"a covariance of {side.dim} features from {side.n} images is singular and the "
                f"distance is biased upwards; use at least {side.dim + 1} images, better "
                f"{10 * side.dim}, and the same number on both sides",
                stacklevel=2,
            )
    where = device or a.mu.device
    return frechet_from_moments(*(m.to(where) for m in (a.mu, a.sigma, b.mu, b.sigma)))


def frechet_from_moments(mu_a: Tensor, sigma_a: Tensor, mu_b: Tensor, sigma_b: Tensor) -> float:
    """Squared 2-Wasserstein distance of N(μ_a, Σ_a) and N(μ_b, Σ_b); μ [D], Σ [D, D], float64.

    The trace of (Σ_a Σ_b)^½ is the sum of the roots of the eigenvalues of Lᵀ Σ_b L with Σ_a = L Lᵀ,
    which is symmetric and positive: real, also for singular covariances, where a root of the
    product itself has imaginary rounding (Heusel et al. 2017, equation 6, in exact arithmetic the
    same). L is the Cholesky factor; of a singular Σ_a, which has none, one from its eigenvectors.
    """
    root, failed = torch.linalg.cholesky_ex(sigma_a)
    if failed:  # the distance is the same both ways round
        sigma_a, sigma_b = sigma_b, sigma_a
        root, failed = torch.linalg.cholesky_ex(sigma_a)
    if failed:
        values, vectors = torch.linalg.eigh(sigma_a)
        root = vectors * values.clamp(min=0).sqrt()
        product = root.T @ sigma_b @ root
    else:
        product = _triangular_product(root, sigma_b)
    eigenvalues = torch.linalg.eigvalsh(product, UPLO="L")
    trace_of_root = eigenvalues.clamp(min=0).sqrt().sum()
    mean_term = (mu_a - mu_b).square().sum()
    return float(mean_term + sigma_a.trace() + sigma_b.trace() - 2 * trace_of_root)


def _triangular_product(lower: Tensor, sigma: Tensor) -> Tensor:
    """Lower triangle of Lᵀ Σ L for lower-triangular L [D, D] and symmetric Σ; the rest is 0.

    Leaving out the zeros of L and the upper triangle saves three quarters of the work.
    """
    product = torch.zeros_like(sigma)
    for start in range(0, len(lower), _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        part = sigma[start:, start:] @ lower[start:, columns]
        for first in range(start, len(lower), 2 * _COLUMNS):
            rows = slice(first, first + 2 * _COLUMNS)
            product[rows, columns] = lower[first:, rows].T @ part[first - start :]
    return product

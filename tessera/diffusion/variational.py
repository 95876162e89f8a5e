"""The variational bound of discrete processes, in bits per dimension (Ho et al. 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tessera.diffusion.discrete import Process

HALF_BIN = 1 / 255
"""Half the distance of two 8-bit pixel values in model space."""


class Bound:
    """The terms of the bound of a process, one for each step.

    Args:
        process: the steps.
        device: where the tables are wanted.
        small: use β̃ instead of β for networks that learn no variance.
    """

    def __init__(self, process: Process, device: torch.device, small: bool = False) -> None:
        fixed = process.posterior_log_variance if small else process.large_log_variance
        tables = process.mean_coefficients[0], process.posterior_log_variance, fixed
        self._coefficient, self._true, self._fixed = (t.to(device, torch.float32) for t in tables)

    def terms(
        self, index: Tensor, x: Tensor, estimate: Tensor, log_variance: Tensor | None
    ) -> Tensor:
        """KL(q(x_{t-1} | x_t, x) | p), at the first step -log p(x | x_0); mean over pixels, [B].

        Args:
            index: int64 [B], the steps.
            x: clean images [B, C, H, W].
            estimate: the network's estimates of them.
            log_variance: of the network's steps [B, C, H, W]; None for the fixed one.
        """
        coefficient, true, fixed = (
            t[index][:, None, None, None] for t in (self._coefficient, self._true, self._fixed)
        )
        model = fixed if log_variance is None else log_variance
        # Both means contain the same multiple of x_t.
        difference = coefficient * (x - estimate)
        divergence = 0.5 * (
            model - true - 1 + (true - model).exp() + difference.square() * (-model).exp()
        )
        first = -discretized_log_likelihood(x, estimate, 0.5 * model)
        terms = torch.where((index == 0)[:, None, None, None], first, divergence)
        return terms.mean(dim=(1, 2, 3)) / math.log(2)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of the 8-bit pixel values of x under a normal distribution, in nats.

    Its distribution function is approximated by a hyperbolic tangent, and probabilities are at
    least 1e-12. The first and last pixel values take the tails.
    """
    distance, scale = x - mean, (-log_scale).exp()
    above = _normal_cdf((distance + HALF_BIN) * scale)
    below = _normal_cdf((distance - HALF_BIN) * scale)
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()


def prior_terms(process: Process, x: Tensor) -> Tensor:
    """KL(q(x_T | x) | N(0, 1)) in bits per dimension, [B]."""
    left = float(process.alpha_bar[-1])
    divergence = 0.5 * (left * x.square() - left - math.log1p(-left))
    return divergence.mean(dim=(1, 2, 3)) / math.log(2)


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

"""Masked autoregression with a diffusion loss (Li et al. 2024): the model, and what trains it.

A token is made from its vector by a discrete diffusion process of its own. To the rest of the
library a set of tokens is a batch of images of one pixel with d channels: objective, sampler and
process are those of all discrete models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.diffusion.discrete import Discrete, DiscreteDenoiser
from tessera.diffusion.discrete_objective import DiscreteObjective
from tessera.diffusion.objectives import Reduction
from tessera.model import Model
from tessera.networks.diffusion_head import DiffusionHead
from tessera.networks.mar import Mar
from tessera.randomness import Draws

_MEAN, _STD = 1.0, 0.25
"""Of the normal distribution of mask ratios, before it is cut to [least ratio, 1]."""


class MaskedModel(Model):
    """A network of masked tokens, and the process by which its head makes them.

    Args:
        network: encoder, decoder and head.
        process: of the head; it predicts the noise.
        shape: (C, H, W) of the images.
        num_classes: number of classes that the network knows.
    """

    network: Mar

    def __init__(
        self, network: Mar, process: Discrete, shape: tuple[int, int, int], num_classes: int = 0
    ) -> None:
        super().__init__()
        self.network, self.process = network, process
        self.shape, self.num_classes = shape, num_classes
        # Not a part: of the model's networks there is one.
        self._of_tokens = (DiscreteDenoiser(nn.Identity(), process, (network.token_size, 1, 1)),)

    def denoiser(self, told: ToldHead) -> DiscreteDenoiser:
        """The denoiser of tokens, as images [N, d, 1, 1]."""
        return self._of_tokens[0].around(told)


class ToldHead(nn.Module):
    """The head as the network of a denoiser of tokens, each told its vector.

    Args:
        head: the small network.
        vectors: `head.cond_embed` of the tokens' vectors: [N, W], or what broadcasts to
            [*shape, W]; with `scale` first those of all tokens with class, then without, [2 N, W].
        shape: how the N tokens lie in the vectors; None: in a row.
        steps: number of steps of the process; None: all tokens are at the same.
        scale: weight of guidance, a number or a tensor without axes; None for none. The noise is
            guided, the variance is that with class.
    """

    def __init__(
        self,
        head: DiffusionHead,
        vectors: Tensor,
        shape: Sequence[int] | None = None,
        *,
        steps: int | None = None,
        scale: float | Tensor | None = None,
    ) -> None:
        super().__init__()
        self.head, self.vectors, self.shape = head, vectors, shape
        self.steps, self.scale = steps, scale

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        """Scaled tokens x [N, d, 1, 1] at steps `noise` [N] to [N, 2 d, 1, 1]."""
        if self.steps is None:
            times = self.head.times(noise[:1], 1)
        else:
            times = self.head.times(noise, self.steps)
        if self.shape is not None:
            times = times.reshape(*self.shape, -1)
        told = (times + self.vectors).reshape(-1, self.head.width)
        rows = x.flatten(1)
        if self.scale is None:
            guess, place = self.head(rows, told).chunk(2, dim=1)
        else:
            both, places = self.head(torch.cat([rows, rows]), told).to(torch.float32).chunk(2, 1)
            given, free = both.chunk(2)
            guess, place = free + self.scale * (given - free), places[: len(rows)]
        # Released heads put out v in [-1, 1] from the least variance to the largest.
        return torch.cat([guess, (1 - place) / 2], dim=1)[:, :, None, None]


def mask_ratio(u: float, least: float) -> float:
    """The share of tokens that is taken away: normal around 1 with deviation 0.25, cut to [least,
    1], at its quantile u.

    Example:
        >>> round(mask_ratio(0.5, least=0.7), 4)
        0.8743
    """
    normal = NormalDist()
    low, high = (normal.cdf((end - _MEAN) / _STD) for end in (least, 1.0))
    share = min(max(low + u * (high - low), 1e-12), high)
    return min(max(_MEAN + _STD * normal.inv_cdf(share), least), 1.0)


class MaskedObjective(nn.Module):
    """The loss of denoising the tokens that were taken away, given the others.

    Args:
        levels: number of noise levels of the tokens' process.
        mask_ratio_min: least share of the tokens that is taken away.
        repeats: noise levels at which every token is trained at once.
        label_dropout: share of images trained without their class, for guidance.
    """

    reduction: ClassVar[Reduction] = "mean"

    def __init__(
        self,
        levels: int,
        *,
        mask_ratio_min: float = 0.7,
        repeats: int = 4,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.mask_ratio_min, self.repeats = mask_ratio_min, repeats
        self.label_dropout = label_dropout
        # The error of the noise, without a weight, and the bound for its variance.
        self.base = DiscreteObjective(levels, weight="snr", label_dropout=0)

    def forward(
        self, model: MaskedModel, x: Tensor, cond: Conditioning, draws: Draws
    ) -> dict[str, Tensor]:
        """Loss terms of clean images x [B, C, H, W], each [B] and a mean over tokens.

        "loss" is the sum of "mse", the error of the noise, and "vb", the bound for the variance in
        bits. All images of a step lose as many tokens, also on other processes. Draws "mask_ratio"
        once, and "order", "timestep", "noise", "label_dropout" if there is any.
        """
        network = model.network
        if self.label_dropout > 0:
            cond = cond.drop_labels(draws.uniform("label_dropout") < self.label_dropout)
        tokens = network.cut(x)
        order = draws.uniform("order", network.tokens).argsort(dim=1, stable=True)
        ratio = mask_ratio(draws.step("mask_ratio"), self.mask_ratio_min)
        count = math.ceil(network.tokens * ratio)
        masked, known = (part.sort(dim=1).values for part in (order[:, :count], order[:, count:]))
        z: Tensor = network(tokens, known, masked, cond)
        return self.losses(model, tokens, masked, z, draws)

    def losses(
        self, model: MaskedModel, tokens: Tensor, wanted: Tensor, z: Tensor, draws: Draws
    ) -> dict[str, Tensor]:
        """The terms of images, [B], from vectors z [B, n, D_d] of the places `wanted` [B, n]."""
        head, (batch, count) = model.network.head, wanted.shape
        shape = (batch, self.repeats, count)
        told = ToldHead(head, head.cond_embed(z)[:, None], shape, steps=len(model.process.process))
        target = tokens.gather(1, wanted[:, :, None].expand(-1, -1, tokens.shape[2]))
        rows = target[:, None].expand(*shape, -1).reshape(-1, tokens.shape[2], 1, 1)
        of_tokens = _RowDraws(draws, self.repeats, count)
        terms = self.base(model.denoiser(told), rows, Conditioning(), of_tokens)
        names = ("loss", "loss_per_pixel", "mse", "vb")
        return {name: terms[name].reshape(batch, -1).mean(dim=1) for name in names}


class _RowDraws:
    """The draws of B images as those of their tokens, [B times so many, ...]."""

    def __init__(self, draws: Draws, *counts: int) -> None:
        self._draws, self._counts = draws, counts

    @property
    def band(self) -> int | None:
        return self._draws.band

    def normal(self, purpose: str, *shape: int) -> Tensor:
        return self._draws.normal(purpose, *self._counts, *shape).reshape(-1, *shape)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        return self._draws.uniform(purpose, *self._counts, *shape).reshape(-1, *shape)

    def integers(self, purpose: str, high: int, *shape: int) -> Tensor:
        return self._draws.integers(purpose, high, *self._counts, *shape).reshape(-1, *shape)

    def step(self, purpose: str) -> float:
        return self._draws.step(purpose)

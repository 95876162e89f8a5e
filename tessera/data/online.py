"""Latents that are made while training, from images, by a VAE that is not trained."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.data.codec import VaeCodec, sample_posterior
from tessera.randomness import Draws


class OnlineVae(VaeCodec):
    """A `VaeCodec` of data sets of images: they are encoded when they are trained on.

    The draws are those of training on a set of latents, and so are the losses.

    Args:
        shrink: train on means of blocks of so many latents a side.
        options: of `VaeCodec`.
    """

    def __init__(self, *args: Any, shrink: int = 1, **options: Any) -> None:
        super().__init__(*args, **options)
        self._shrink = shrink

    def train(self, images: Tensor, draws: Draws) -> Tensor:
        """Latents in model space, float32 [B, C, h, w], of images [B, 3, H, W]; draws "latent".

        Args:
            images: uint8, or floats in [-1, 1] such as those that were augmented.
        """
        moments = pool_moments(self.encode(images), self._shrink)
        return sample_posterior(moments, draws, self.scale, self.shift)


def pool_moments(moments: Tensor, factor: int) -> Tensor:
    """The posterior of means of blocks of latents, whose numbers are independent given the image.

    Args:
        moments: means and log-variances [B, 2 C, h, w].
        factor: side of a block; it divides h and w.

    Returns:
        float32 [B, 2 C, h / factor, w / factor].

    Example:
        >>> pool_moments(torch.zeros(1, 2, 4, 4), 2)[0, :, 0, 0]  # a variance of 1 / 4
        tensor([ 0.0000, -1.3863])
    """
    moments = moments.to(torch.float32)
    if factor == 1:
        return moments
    mean, log_variance = moments.chunk(2, dim=1)
    variance = F.avg_pool2d(log_variance.clamp(-30, 20).exp(), factor) / factor**2
    return torch.cat([F.avg_pool2d(mean, factor), variance.log()], dim=1)

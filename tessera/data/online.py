"""Latents that are made while training, from images, by a VAE that is not trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tessera.data.codec import VaeCodec, sample_posterior
from tessera.data.moments import pool_moments
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

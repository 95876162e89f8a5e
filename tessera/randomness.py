"""Randomness that is addressed, not consumed.

Every draw of a training run is a function of (seed, purpose, image number, element), where the
image number counts all images of the run, in the order in which they are trained on. Nothing is
remembered, so a resumed run repeats the draws of one that never stopped, and a run on any number of
devices makes the draws of a run on one.

The function is SplitMix64's finaliser (Steele, Lea & Flood 2014, "Fast splittable pseudorandom
number generators"), used as a hash of the address; it runs vectorised on any device.
"""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

PURPOSES = {
    "sigma": "noise level of an image",
    "timestep": "step of a discrete process, of an image",
    "noise": "white noise of an image",
    "order": "order in which an image's tokens would be made",
    "mask_ratio": "share of the tokens that a step takes away, of all its images",
    "label_dropout": "whether an image is trained without its class",
    "patch.row": "first row of an image's patch",
    "patch.column": "first column of an image's patch",
    "latent": "sample of an image's posterior in latent space",
    "nll": "noise of a step of a likelihood, nll.<step>",
    "energy": "noise of an image whose energy is asked for, energy.<level>.<repeat>",
    "block_noise": "one number for a block of pixels of an image, while training on blurred ones",
    "refinement_noise": "noise that refinement begins with, of an image's training on its descent",
    "contrastive_noise": "noise of the image that an energy is compared with",
    "contrastive_shift": "size of the error of the image that an energy is compared with",
    "augment": "parameters of an image's augmentation, augment.<transform>",
}
"""What is drawn for images while training and measuring; every purpose in one place."""

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for `purpose`, independent of the seeds of every other purpose."""
    text = "/".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A NumPy generator addressed by (seed, purpose)."""
    return np.random.Generator(np.random.Philox(derive_seed(seed, *purpose)))


class Draws(Protocol):
    """Source of the random numbers of a batch of B images; first axis of every result is B."""

    @property
    def band(self) -> int | None:
        """The band of noise levels that all images of the step are drawn from; None: all."""
        ...

    def normal(self, purpose: str, *shape: int) -> Tensor:
        r"""Standard normal float32 numbers [B, \*shape]."""
        ...

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        r"""Uniform float32 numbers in [0, 1), [B, \*shape]."""
        ...

    def integers(self, purpose: str, high: int, *shape: int) -> Tensor:
        r"""Uniform int64 numbers in 0..high-1, [B, \*shape]."""
        ...

    def step(self, purpose: str) -> float:
        """A uniform number in [0, 1) that all images of a step share, on all processes."""
        ...


class AddressedDraws:
    """`Draws` for the images with the given numbers in a run.

    Args:
        seed: the run's seed.
        images: int64 [B], image numbers in the run (images seen before the step + position in the
            global batch), on the device where the draws are wanted.
        images_seen: images before the step.
        band: of noise levels, if the step has one; its number.

    Example:
        >>> draws = AddressedDraws(0, torch.tensor([5, 6]))
        >>> draws.normal("noise", 3, 4, 4).shape
        torch.Size([2, 3, 4, 4])
        >>> again = AddressedDraws(0, torch.tensor([6]))  # what the others are does not matter
        >>> bool(again.uniform("sigma") == draws.uniform("sigma")[1])
        True
    """

    def __init__(
        self, seed: int, images: Tensor, images_seen: int = 0, band: int | None = None
    ) -> None:
        self.seed = seed
        self.images = images
        self.band = band
        self._images_seen = images_seen

    def step(self, purpose: str) -> float:
        """A uniform number in [0, 1) that all images of a step share, on all processes."""
        return derive_seed(self.seed, "step", purpose, self._images_seen) / 2**63

    def _bits(self, purpose: str, count: int) -> Tensor:
        """64 random bits as int64 [B, count]."""
        key = _signed(derive_seed(self.seed, "draws", purpose))
        per_image = mix64(self.images * _signed(_GOLDEN) + key)
        element = mix64(
            torch.arange(1, count + 1, device=self.images.device, dtype=torch.int64)
            * _signed(_GOLDEN)
        )
        return mix64(per_image[:, None] ^ element)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        r"""Uniform float32 numbers in [0, 1), [B, \*shape]; multiples of 2^-24."""
        bits = self._bits(purpose, math.prod(shape))
        return (_shift_right(bits, 40).to(torch.float32) * 2.0**-24).reshape(-1, *shape)

    def integers(self, purpose: str, high: int, *shape: int) -> Tensor:
        r"""Uniform int64 numbers in 0..high-1 for high < 2^31, [B, \*shape]."""
        bits = self._bits(purpose, math.prod(shape))
        return _shift_right(_shift_right(bits, 32) * high, 32).reshape(-1, *shape)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        r"""Standard normal float32 numbers [B, \*shape] (Box-Muller, 32 bits each)."""
        count = math.prod(shape)
        bits = self._bits(purpose, (count + 1) // 2)
        radius = ((bits & 0xFFFFFFFF).to(torch.float32) + 0.5) * 2.0**-32
        # float32 rounds the largest values up to 1, whose logarithm is a harmless 0.
        radius = radius.log_().mul_(-2).clamp_(min=0).sqrt_()
        angle = _shift_right(bits, 32).to(torch.float32) * (2.0**-32 * 2 * math.pi)
        pair = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return pair[:, :count].reshape(-1, *shape)


def mix64(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 tensors (arithmetic modulo 2^64)."""
    bits = (bits ^ _shift_right(bits, 30)) * _signed(_MIX1)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(_MIX2)
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical right shift; PyTorch's own keeps the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bit pattern of an unsigned 64-bit number."""
    return value - (1 << 64) if value >= 1 << 63 else value

"""The covariance of a set of images: whole for small ones, its power spectrum for larger ones."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tessera.diffusion.blur import dct_matrix
from tessera.errors import DataError
from tessera.planning.linear import Covariance, PixelCovariance, PowerSpectrum
from tessera.planning.sample import LARGEST_EXACT, ImageSample, Reading, open_sample

PlanesOf = Literal["all", "luma"]

_FOR_EACH = 8
"""Images for each number of an image that a whole covariance is trusted from.

Of fewer the full image, which has more numbers to be fitted to them, seems better than it is: by
about 13% divided by this, at noise of 0.1, for CIFAR-10."""

_AT_ONCE = 32  # images whose coefficients are made together
_LUMA = (0.299, 0.587, 0.114)
_OPPONENT = (
    (1 / math.sqrt(3), 1 / math.sqrt(3), 1 / math.sqrt(3)),
    (1 / math.sqrt(2), 0.0, -1 / math.sqrt(2)),
    (1 / math.sqrt(6), -2 / math.sqrt(6), 1 / math.sqrt(6)),
)
"""Axes at right angles along which the colours of photographs hardly depend on each other."""


@dataclass(frozen=True)
class MeasuredSet:
    """The second moments of a set, and what was looked at.

    Attributes:
        name: of the set.
        shape: (C, H, W) in model space.
        total: images of the set.
        images: of them that were counted.
        skipped: images that cannot be used.
        of_pixels: values are those of pixels, -1 to 1; otherwise latents.
        covariance: of its planes.
        planes: "all" channels along axes at right angles, or the "luma" of RGB.
        exact: the covariance is whole; otherwise it is taken to be diagonal in the DCT.
    """

    name: str
    shape: tuple[int, int, int]
    total: int
    images: int
    skipped: tuple[str, ...]
    of_pixels: bool
    covariance: Covariance
    planes: PlanesOf
    exact: bool


def measure_set(
    path: str | os.PathLike[str], reading: Reading = Reading(), planes: PlanesOf = "all"
) -> MeasuredSet:
    """Read a sample of a set once and count its second moments.

    The covariance is kept whole of images of up to 32x32 of which there are eight for each pixel.
    The same arguments give the same numbers.

    Args:
        path: images of any kind that is known, or latents.
        planes: what is counted of an image: "all", or "luma" (BT.601) of RGB images.

    Raises:
        DataError: nothing to read, images without any variance, or luma of what is not RGB.

    Example:
        >>> measure_set("cifar10.zip").covariance.std  # doctest: +SKIP
        0.4956
    """
    with open_sample(path, reading) as sample:
        axes = _axes_of(sample, planes)
        pixels = sample.shape[1] * sample.shape[2]
        exact = pixels <= LARGEST_EXACT and sample.chosen >= _FOR_EACH * pixels
        stacks = (torch.einsum("kc,nchw->nkhw", axes, batch) for batch in sample.batches)
        first = next(stacks, None)
        if first is None:
            raise DataError(
                "\n  ".join([f"{sample.name}: no image can be used", *sample.skipped[:5]])
            )
        count_up = _whole if exact else _powers
        count, covariance = count_up(itertools.chain([first], stacks), first)
        if covariance.variances.max() <= 0:
            raise DataError(f"{sample.name}: all of its images are the same")
        if not sample.scaled:
            covariance = covariance.scaled(1 / covariance.std)
        return MeasuredSet(
            sample.name, sample.shape, sample.total, count, tuple(sample.skipped),
            sample.of_pixels, covariance, planes, exact,
        )  # fmt: skip


def _axes_of(sample: ImageSample, planes: PlanesOf) -> Tensor:
    """Of the planes, in rows: [K, C]."""
    channels = sample.shape[0]
    colours = sample.of_pixels and channels == 3
    if planes == "luma":
        if not (colours or channels == 1):
            raise DataError(f"{sample.name} has {channels} channels; luma is that of RGB images")
        return torch.tensor([_LUMA if colours else (1.0,)])
    return torch.tensor(_OPPONENT) if colours else torch.eye(channels)


def _whole(stacks: Iterator[Tensor], first: Tensor) -> tuple[int, Covariance]:
    """Number of images, and the covariance of all pixels."""
    planes, height, width = first.shape[1:]
    # Products of what is near 0 are exact enough in float32; sums over batches are float64.
    centre = first.mean(0)
    products = torch.zeros(planes, height * width, height * width, dtype=torch.float64)
    sums, count = torch.zeros(planes, height * width, dtype=torch.float64), 0
    for stack in stacks:
        near = (stack - centre).flatten(2).transpose(0, 1)
        products += torch.bmm(near.mT, near)
        sums += near.sum(1, dtype=torch.float64)
        count += len(stack)
    mean = sums / count
    values = products / count - mean[:, :, None] * mean[:, None, :]
    square = float(((centre.flatten(1).double() + mean) ** 2).sum())
    return count, PixelCovariance(values.numpy(), (height, width), square)


def _powers(stacks: Iterator[Tensor], first: Tensor) -> tuple[int, Covariance]:
    """Number of images, and the variance of each coefficient of their DCT."""
    height, width = first.shape[2:]
    down, across = (dct_matrix(length, torch.float64) for length in (height, width))
    sums = torch.zeros(first.shape[1:], dtype=torch.float64)
    squares, count = torch.zeros_like(sums), 0
    for stack in stacks:
        for start in range(0, len(stack), _AT_ONCE):
            values = down @ stack[start : start + _AT_ONCE].double() @ across.mT
            sums += values.sum(0)
            squares += (values**2).sum(0)
        count += len(stack)
    mean = sums / count
    values = (squares / count - mean**2).clamp(min=0)
    return count, PowerSpectrum(values.numpy(), float((mean**2).sum()))

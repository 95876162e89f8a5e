"""What a set of images lets a denoiser know, by what it sees, over all noise levels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tessera.errors import DataError
from tessera.planning.linear import LARGEST_CROP, Array, Covariance, SeenError, log_spaced
from tessera.planning.spectrum import MeasuredSet

TABLE_SIGMAS = (0.1, 0.3, 0.8, 1.2, 2.0, 3.0, 5.0)
"""Noise levels of the table."""

_POINTS = 80  # noise levels of the curves
_SMALLEST = 8  # side of a coarse image, pixels
_HALOS = (0, 2, 4, 8)
_SIDES = (4, 8, 16, LARGEST_CROP)  # of crops

_PIXEL_STEP = 2 / 255
_LATENT_MIN = 0.002 / 0.5  # of latents, in standard deviations: EDM's of pixels
_DIFFERENT = 0.01  # nats between noise and images under noise where sampling starts
_SHARPNESS = 6


@dataclass(frozen=True)
class Sight:
    """What a denoiser sees of an image, and what of it counts.

    Attributes:
        factor: side of the blocks of pixels whose means it sees; 1: pixels.
        crop: side of the crop that it sees, pixels; None: the whole image.
        halo: pixels at the crop's border that do not count.
    """

    factor: int = 1
    crop: int | None = None
    halo: int = 0

    def __str__(self) -> str:
        if self.crop is None:
            return f"the image at 1/{self.factor} of its size" if self.factor > 1 else "the image"
        if not self.halo:
            return f"crop of {self.crop}, loss on all of it"
        return f"crop of {self.crop}, a halo of {self.halo}"


@dataclass(frozen=True)
class DataStudy:
    """Errors by noise level.

    Attributes:
        measured: the set.
        sigmas: noise levels, rising, `TABLE_SIGMAS` among them; [S].
        curves: what is seen, and the errors that it leaves at `sigmas`.
    """

    measured: MeasuredSet
    sigmas: Array
    curves: Mapping[Sight, SeenError]

    @cached_property
    def weights(self) -> Array:
        """Share of the training at each of `sigmas`, as `training_levels` says; [S]."""
        mean, std = training_levels(self.measured.covariance)
        places = np.log(self.sigmas)
        weights = np.exp(-0.5 * ((places - mean) / std) ** 2) * np.gradient(places)
        return np.asarray(weights / weights.sum())

    def table(self) -> dict[Sight, Array]:
        """Relative errors at `TABLE_SIGMAS`."""
        at = np.searchsorted(self.sigmas, TABLE_SIGMAS)
        return {sight: seen.relative[at] for sight, seen in self.curves.items()}


def study_set(measured: MeasuredSet) -> DataStudy:
    """Errors of crops and of coarse images at all noise levels that matter.

    Raises:
        DataError: the images are smaller than 8 pixels a side.
    """
    covariance = measured.covariance
    if min(covariance.size) < _SMALLEST:
        height, width = covariance.size
        raise DataError(
            f"{measured.name}: {height}x{width} is too small to see less of; take images of "
            f"{_SMALLEST} pixels a side or more"
        )
    low, high = sampling_range(covariance, of_pixels=measured.of_pixels)
    sigmas = np.union1d(
        log_spaced(min(low, TABLE_SIGMAS[0]), max(high, TABLE_SIGMAS[-1]), _POINTS), TABLE_SIGMAS
    )
    side = min(covariance.size)
    curves = {}
    for crop in (crop for crop in reversed(_SIDES) if crop < side):
        for halo in (halo for halo in _HALOS if 4 * halo <= crop):
            curves[Sight(crop=crop, halo=halo)] = covariance.crop(crop, halo, sigmas)
    for factor in coarse_factors(covariance.size):
        curves[Sight(factor)] = covariance.coarse(factor, sigmas)
    return DataStudy(measured, sigmas, curves)


def coarse_factors(size: tuple[int, int]) -> list[int]:
    """Powers of two by which images can be shrunk to 8 pixels or more."""
    found = []
    factor = 2
    while not any(length % factor for length in size) and min(size) // factor >= _SMALLEST:
        found.append(factor)
        factor *= 2
    return found


def sampling_range(covariance: Covariance, *, of_pixels: bool) -> tuple[float, float]:
    """Lowest and highest noise level of sampling.

    The lowest is the error of rounding to a step of 8 bits; of latents, EDM's in their standard
    deviations. The highest is where images under noise differ from noise, which sampling starts
    from, by 0.01 nats: the divergence of two Gaussians, with the images' covariance and mean or
    without.
    """
    low = _PIXEL_STEP / math.sqrt(12) if of_pixels else _LATENT_MIN * covariance.std
    below, above = low, 1e6 * covariance.std
    while above / below > 1.001:
        middle = math.sqrt(below * above)
        ratio = covariance.variances / middle**2
        nats = 0.5 * float((ratio - np.log1p(ratio)).sum())
        nats += 0.5 * covariance.mean_square / middle**2
        below, above = (middle, above) if nats > _DIFFERENT else (below, middle)
    return low, above


def training_levels(covariance: Covariance) -> tuple[float, float]:
    """Mean and standard deviation of ln σ in training.

    Training is worth where it can better the estimate that a network begins with, c_skip z (Karras
    et al. 2022, section 5 and figure 5a). How much the best linear denoiser betters it, between 0
    and 1 of its error, to the sixth power, is the density that is fitted: of CIFAR-10 that has the
    spread of 1.2 that was found best for it, and so the power was chosen.
    """
    std = covariance.std
    sigmas = log_spaced(1e-3 * std, 1e3 * std, 400)
    start = std**2 * sigmas**2 / (std**2 + sigmas**2)
    density = np.maximum(1 - covariance.full(sigmas) / start, 0) ** _SHARPNESS
    if density.sum() <= 1e-30:  # white: nothing can be learned, anywhere
        return math.log(std), 1.2
    weights, places = density / density.sum(), np.log(sigmas)
    mean = float(weights @ places)
    return mean, float(np.sqrt(weights @ (places - mean) ** 2))

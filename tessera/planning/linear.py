"""Errors of the best linear denoiser, given what it sees of the noised image.

Of images with covariance C, seen through a matrix B (all pixels, a crop, means of blocks) under
white noise of level ν, the linear estimate of least squares is the conditional mean of a Gaussian,
C Bᵀ (B C Bᵀ + ν² I)⁻¹ (B z - B μ), whose error is the trace of C - C Bᵀ (B C Bᵀ + ν² I)⁻¹ B C. No
network can be right about less than what its input determines, and of what is linear this is all.

An image is a stack of planes that are taken for uncorrelated, such as the colours along axes at
right angles, in which white noise stays white. Errors are means of squares over planes and pixels.
Everything is float64.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tessera.diffusion.blur import dct_matrix
from tessera.errors import DataError

Array = NDArray[np.float64]

LARGEST_CROP = 32
"""Side of the largest crop whose covariance is decomposed, pixels."""

_OFFSETS = 5  # of a crop along each side of an image


@dataclass(frozen=True)
class SeenError:
    """Error of the denoiser that sees something, and of the one that sees the full image.

    Attributes:
        error: mean squared error at each noise level, [S].
        full: of the same pixels from the full image, [S].
        everywhere: from the full image, of all of its pixels, [S].
    """

    error: Array
    full: Array
    everywhere: Array

    @property
    def relative(self) -> Array:
        """How many times larger the error is than that of the full image, at least 1; [S]."""
        return self.error / self.full

    @property
    def relative_to_image(self) -> Array:
        """Likewise, against all pixels of an image.

        Crops lie more often in the middle than at the edge of images, where there is less to see:
        this counts that against crops.
        """
        return self.error / self.everywhere


class Covariance(abc.ABC):
    """Second moments of images about their mean.

    Attributes:
        mean_square: of the mean image, summed over planes and pixels.
    """

    mean_square: float

    @property
    @abc.abstractmethod
    def size(self) -> tuple[int, int]:
        """(H, W) of an image."""

    @cached_property
    @abc.abstractmethod
    def variances(self) -> Array:
        """Along the axes of the covariance, of all planes: its eigenvalues, 0 or more."""

    @property
    def std(self) -> float:
        """Standard deviation of the values about the mean image."""
        return float(np.sqrt(self.variances.mean()))

    @abc.abstractmethod
    def scaled(self, factor: float) -> Covariance:
        """Of images whose values are multiplied by a factor."""

    def full(self, sigmas: Array) -> Array:
        """Error of the denoiser that sees everything at noise levels [S]; [S].

        Example:
            >>> white = PowerSpectrum(np.ones((1, 4, 4)))
            >>> white.full(np.array([1.0, 3.0]))
            array([0.5, 0.9])
        """
        return np.array([_left(self.variances, noise).mean() for noise in sigmas**2])

    @abc.abstractmethod
    def _full_map(self, sigmas: Array) -> Array:
        """Error of each pixel from the full image, mean over planes, [S, H, W]."""

    @abc.abstractmethod
    def _cuts(self, side: int) -> Iterator[tuple[int, int, Array]]:
        """First row, first column and covariance [K, side², side²] of crops to average over."""

    def crop(self, side: int, halo: int, sigmas: Array) -> SeenError:
        """From a crop, of its pixels that are at least `halo` from its border.

        At the image's own edge no halo is left out. The mean over several places of the crop.

        Args:
            side: of the crop, pixels; `LARGEST_CROP` at most.
            halo: pixels at the crop's border that are seen and not counted.
            sigmas: noise levels, [S].

        Raises:
            DataError: nothing is left inside of the halo, or the crop is too large.
        """
        height, width = self.size
        if not 0 < side <= min(height, width, LARGEST_CROP) or not 0 <= 2 * halo < side:
            raise DataError(
                f"a crop of {side} pixels with a halo of {halo}: take at most "
                f"{min(height, width, LARGEST_CROP)} pixels, and a halo of less than half of that"
            )
        errors, wholes = list[Array](), list[Array]()
        for top, left, seen, whole in self._crop_maps(side, sigmas):
            rows = _inside(top, side, halo, height)
            columns = _inside(left, side, halo, width)
            errors.append(seen[:, rows, columns].mean((1, 2)))
            wholes.append(whole[:, rows, columns].mean((1, 2)))
        error, full = np.mean(errors, axis=0), np.mean(wholes, axis=0)
        return SeenError(error, full, self.full(sigmas))

    def _crop_maps(self, side: int, sigmas: Array) -> list[tuple[int, int, Array, Array]]:
        """First row and column of crops, errors of their pixels [S, side, side], of the crop's
        denoiser and of the image's; kept for crops with another halo."""
        key = (side, sigmas.tobytes())
        if key not in self._kept:
            whole = self._full_map(sigmas)
            self._kept[key] = [
                (
                    top, left, _pixel_errors(covariance, sigmas).reshape(-1, side, side),
                    whole[:, top : top + side, left : left + side],
                )
                for top, left, covariance in self._cuts(side)
            ]  # fmt: skip
        return self._kept[key]

    @cached_property
    def _kept(self) -> dict[tuple[int, bytes], list[tuple[int, int, Array, Array]]]:
        return {}

    def coarse(self, factor: int, sigmas: Array) -> SeenError:
        """From the means of blocks of `factor` x `factor` pixels, of all pixels of the image.

        White noise of level σ is white noise of level σ / factor on the means.

        Raises:
            DataError: the blocks do not fill the image.
        """
        height, width = self.size
        if factor < 1 or height % factor or width % factor:
            raise DataError(f"{height}x{width} has no whole blocks of {factor}x{factor}")
        everywhere = self.full(sigmas)
        return SeenError(self._from_blocks(factor, sigmas), everywhere, everywhere)

    @abc.abstractmethod
    def _from_blocks(self, factor: int, sigmas: Array) -> Array: ...


class PixelCovariance(Covariance):
    """The covariance itself.

    Args:
        values: [K, H W, H W] of K planes.
        size: (H, W).
        mean_square: of the mean image.
    """

    def __init__(self, values: Array, size: tuple[int, int], mean_square: float = 0.0) -> None:
        self._values, self._size, self.mean_square = values, size, mean_square

    @property
    def size(self) -> tuple[int, int]:
        return self._size

    @cached_property
    def _axes(self) -> list[tuple[Array, Array]]:
        return [_axes(plane) for plane in self._values]

    @cached_property
    def variances(self) -> Array:
        return np.concatenate([variances for variances, _ in self._axes])

    def scaled(self, factor: float) -> PixelCovariance:
        return PixelCovariance(self._values * factor**2, self._size, self.mean_square * factor**2)

    def _full_map(self, sigmas: Array) -> Array:
        errors = np.mean([_errors(*axes, sigmas) for axes in self._axes], axis=0)
        return np.asarray(errors.reshape(len(sigmas), *self._size))

    def _cuts(self, side: int) -> Iterator[tuple[int, int, Array]]:
        """Some everywhere, at edges and in corners among them."""
        numbers = np.arange(self._size[0] * self._size[1]).reshape(self._size)
        tops, lefts = (
            np.unique(np.linspace(0, length - side, _OFFSETS).round().astype(int)).tolist()
            for length in self._size
        )
        for top, left in itertools.product(tops, lefts):
            chosen = numbers[top : top + side, left : left + side].ravel()
            yield top, left, self._values[:, chosen[:, None], chosen]

    def _from_blocks(self, factor: int, sigmas: Array) -> Array:
        height, width = self._size
        blocks = (height // factor, factor, width // factor, factor)
        numbers = np.arange(height * width).reshape(blocks).transpose(0, 2, 1, 3)
        members = numbers.reshape(-1, factor**2)
        errors = []
        for plane in self._values:
            with_means = plane[:, members].mean(2)
            variances, axes = _axes(with_means[members].mean(1))
            known = ((with_means @ axes) ** 2).sum(0)
            noise = (sigmas[:, None] / factor) ** 2
            errors.append(np.trace(plane) - (known / (variances + noise)).sum(1))
        return np.asarray(np.mean(errors, axis=0) / (height * width))


class PowerSpectrum(Covariance):
    """A covariance that is diagonal in the DCT, as that of stationary images nearly is.

    Args:
        values: variances of the coefficients of the orthonormal DCT-II, [K, H, W] of K planes;
            0 or more.
        mean_square: of the mean image.
    """

    def __init__(self, values: Array, mean_square: float = 0.0) -> None:
        self._values, self.mean_square = values, mean_square

    @property
    def size(self) -> tuple[int, int]:
        return self._values.shape[1], self._values.shape[2]

    @cached_property
    def variances(self) -> Array:
        return self._values.ravel()

    def scaled(self, factor: float) -> PowerSpectrum:
        return PowerSpectrum(self._values * factor**2, self.mean_square * factor**2)

    def _full_map(self, sigmas: Array) -> Array:
        down, across = (_dct(length) ** 2 for length in self.size)
        errors = np.stack([_left(self._values, noise).mean(0) for noise in sigmas**2])
        return np.asarray(down.T @ errors @ across)

    def _cuts(self, side: int) -> Iterator[tuple[int, int, Array]]:
        """One in the middle: large images have most of their crops away from their edges."""
        top, left = ((length - side) // 2 for length in self.size)
        down = _dct(self.size[0])[:, top : top + side]
        across = _dct(self.size[1])[:, left : left + side]
        # Covariances of rows r, s and columns c, d: sums of products of cosines.
        rows = (down[:, :, None] * down[:, None, :]).reshape(len(down), -1)
        columns = (across[:, :, None] * across[:, None, :]).reshape(len(across), -1)
        values = rows.T @ self._values @ columns
        values = values.reshape(-1, side, side, side, side).transpose(0, 1, 3, 2, 4)
        yield top, left, values.reshape(-1, side**2, side**2)

    def _from_blocks(self, factor: int, sigmas: Array) -> Array:
        # A frequency of the means stands for several of the image, each with its gain.
        down, across = (_block_gains(length, factor) ** 2 for length in self.size)
        seen = down @ self._values @ across.T
        known = down @ self._values**2 @ across.T
        explained = [(known / (seen + noise)).sum() for noise in (sigmas / factor) ** 2]
        return np.asarray((self._values.sum() - explained) / self._values.size)


def smallest_sigma(relative: Array, sigmas: Array, bound: float) -> float | None:
    """The noise level from which on errors stay within a bound; None if the last does not.

    Args:
        relative: errors at rising noise levels `sigmas`; between them ln σ is interpolated.

    Example:
        >>> smallest_sigma(np.array([1.5, 1.1, 1.0]), np.array([1.0, 2.0, 4.0]), 1.1)
        2.0
    """
    above = np.flatnonzero(relative > bound)
    if not len(above):
        return float(sigmas[0])
    last = int(above[-1])
    if last == len(sigmas) - 1:
        return None
    share = (relative[last] - bound) / (relative[last] - relative[last + 1])
    between = np.log(sigmas[last]) + share * np.log(sigmas[last + 1] / sigmas[last])
    return float(np.exp(between))


def log_spaced(low: float, high: float, count: int) -> Array:
    """Noise levels that rise by one factor."""
    return np.exp(np.linspace(np.log(low), np.log(high), count))


def _inside(start: int, side: int, halo: int, length: int) -> slice:
    """Pixels of a crop along one side that count."""
    return slice(halo if start > 0 else 0, side - (halo if start + side < length else 0))


def _axes(covariance: Array) -> tuple[Array, Array]:
    """Variances, 0 or more, and the axes that they lie along, in columns."""
    variances, axes = np.linalg.eigh(covariance)
    return np.maximum(variances, 0), axes


def _left(variances: Array, noise: Array | float) -> Array:
    """What is not known of numbers of these variances under noise of that variance."""
    return np.asarray(variances * noise / (variances + noise))


def _errors(variances: Array, axes: Array, sigmas: Array) -> Array:
    """Of each number from all of them, [S, P]."""
    return np.asarray(_left(variances, sigmas[:, None] ** 2) @ (axes**2).T)


def _pixel_errors(covariance: Array, sigmas: Array) -> Array:
    """Of each pixel, mean over planes, [S, P]."""
    return np.asarray(np.mean([_errors(*_axes(plane), sigmas) for plane in covariance], axis=0))


def _dct(length: int) -> Array:
    matrix: Array = dct_matrix(length).numpy()
    return matrix


def _block_gains(length: int, factor: int) -> Array:
    """What of each frequency of a row is in each of its block means, [length / factor, length]."""
    small = length // factor
    means = _dct(length).reshape(length, small, factor).mean(2)
    return np.asarray(_dct(small) @ means.T)

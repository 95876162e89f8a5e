"""Errors of linear denoisers against closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.diffusion.blur import dct_matrix
from tessera.errors import DataError
from tessera.planning.linear import (
    Covariance,
    PixelCovariance,
    PowerSpectrum,
    log_spaced,
    smallest_sigma,
)

SIGMAS = np.array([0.1, 0.5, 2.0, 10.0])
SIDE = 8


def smooth(power: float, side: int = SIDE, planes: int = 1) -> PowerSpectrum:
    """Variances that fall with the frequency."""
    place = np.arange(side)
    frequency = np.hypot(place[:, None], place) + 0.5
    return PowerSpectrum(np.stack([frequency**-power] * planes))


def whole(spectrum: PowerSpectrum) -> PixelCovariance:
    """The same covariance, written out."""
    height, width = spectrum.size
    axes = np.kron(dct_matrix(height).numpy(), dct_matrix(width).numpy())
    planes = spectrum.variances.reshape(-1, height * width)
    return PixelCovariance(np.stack([(axes.T * p) @ axes for p in planes]), (height, width))


BOTH = pytest.mark.parametrize("form", [lambda s: s, whole], ids=["spectrum", "whole"])


@BOTH
def test_of_white_images_a_crop_loses_nothing_and_means_lose_what_they_average(form) -> None:
    white: Covariance = form(PowerSpectrum(np.full((2, SIDE, SIDE), 0.25)))
    full = 0.25 * SIGMAS**2 / (0.25 + SIGMAS**2)
    np.testing.assert_allclose(white.full(SIGMAS), full)
    for side, halo in ((4, 0), (4, 1), (2, 0)):
        np.testing.assert_allclose(white.crop(side, halo, SIGMAS).relative, 1)
    # One number of four is seen, with variance 1/4 and noise 1/4 of each pixel's.
    known = 0.25 / 4 * (0.25 / (0.25 + SIGMAS**2))
    np.testing.assert_allclose(white.coarse(2, SIGMAS).error, 0.25 - known)


@BOTH
def test_of_constant_images_the_means_are_all_there_is_to_see(form) -> None:
    """A crop sees a part of the numbers whose mean the full image is: noise / n is left."""
    power = np.zeros((1, SIDE, SIDE))
    power[0, 0, 0] = variance = 3.0 * SIDE**2
    flat: Covariance = form(PowerSpectrum(power))
    for factor in (2, 4, 8):
        np.testing.assert_allclose(flat.coarse(factor, SIGMAS).relative, 1, atol=1e-9)
    left = [3.0 * s**2 / (3.0 * n + s**2) for n in (16, SIDE**2) for s in SIGMAS]
    seen = flat.crop(4, 0, SIGMAS)
    np.testing.assert_allclose(seen.error, left[: len(SIGMAS)], rtol=1e-6)
    np.testing.assert_allclose(seen.full, left[len(SIGMAS) :], rtol=1e-6)
    assert flat.std == pytest.approx((variance / SIDE**2) ** 0.5)


def test_images_along_one_direction() -> None:
    """A rank of one: what is left is the direction's squares, times noise over what is seen."""
    direction = np.linspace(0.5, 2, SIDE**2)
    images = PixelCovariance(np.outer(direction, direction)[None], (SIDE, SIDE))
    squares = direction**2
    full = SIGMAS**2 / (squares.sum() + SIGMAS**2)
    np.testing.assert_allclose(images.full(SIGMAS), full * squares.mean(), rtol=1e-9)
    blocks = direction.reshape(4, 2, 4, 2).mean((1, 3))
    coarse = SIGMAS**2 / 4 / ((blocks**2).sum() + SIGMAS**2 / 4)
    np.testing.assert_allclose(images.coarse(2, SIGMAS).error, coarse * squares.mean(), rtol=1e-6)
    # Crops of 7 lie at the four corners.
    grid = squares.reshape(SIDE, SIDE)
    crops = [grid[top : top + 7, left : left + 7] for top in (0, 1) for left in (0, 1)]
    errors = [SIGMAS**2 / (crop.sum() + SIGMAS**2) * crop.mean() for crop in crops]
    np.testing.assert_allclose(images.crop(7, 0, SIGMAS).error, np.mean(errors, 0), rtol=1e-6)


@BOTH
def test_whole_blocks_of_one_pixel_are_the_image(form) -> None:
    images: Covariance = form(smooth(2, planes=2))
    np.testing.assert_allclose(images.coarse(1, SIGMAS).relative, 1, rtol=1e-9)
    np.testing.assert_allclose(images.crop(SIDE, 0, SIGMAS).relative, 1, rtol=1e-9)


@settings(max_examples=8, deadline=None)
@given(power=st.floats(0.0, 4.0), seed=st.integers(0, 100))
def test_who_sees_more_knows_more(power: float, seed: int) -> None:
    """More of the image, more around the pixels that count, and finer means."""
    noise = np.random.default_rng(seed).uniform(0.2, 1, (1, SIDE, SIDE))
    spectrum = PowerSpectrum(smooth(power).variances.reshape(1, SIDE, SIDE) * noise)
    for images in (spectrum, whole(spectrum)):
        slack = 1 + 1e-9
        assert np.all(images.crop(4, 0, SIGMAS).relative * slack >= 1)
        assert np.all(images.crop(6, 0, SIGMAS).relative * slack >= 1)
        coarse = [images.coarse(factor, SIGMAS).relative for factor in (1, 2, 4, 8)]
        for finer, coarser in itertools.pairwise(coarse):
            assert np.all(finer <= coarser * slack)
        assert np.all(np.diff(images.full(SIGMAS)) > 0)
    # The same pixels in the middle, from 4x4 pixels and from 8x8 around them.
    near, far = (spectrum.crop(side, halo, SIGMAS) for side, halo in ((4, 1), (6, 2)))
    np.testing.assert_allclose(near.full, far.full)
    assert np.all(far.error <= near.error * slack)


def test_the_spectrum_is_the_whole_covariance_where_that_is_diagonal() -> None:
    spectrum = smooth(2, planes=2)
    images = whole(spectrum)
    for factor in (1, 2, 4):
        one, other = (c.coarse(factor, SIGMAS).error for c in (spectrum, images))
        np.testing.assert_allclose(one, other, rtol=1e-9)
    np.testing.assert_allclose(spectrum.full(SIGMAS), images.full(SIGMAS), rtol=1e-9)


def stationary(correlation: float, side: int) -> np.ndarray:
    """Of which neighbours are correlated by as much, along rows and columns."""
    distance = np.abs(np.subtract.outer(np.arange(side), np.arange(side)))
    return np.kron(correlation**distance, correlation**distance)


def test_the_spectrum_of_stationary_images_is_nearly_right() -> None:
    """Within 3% of the error, for neighbours that are correlated by 0.9."""
    side = 16
    covariance = stationary(0.9, side)
    axes = np.kron(dct_matrix(side).numpy(), dct_matrix(side).numpy())
    images = PixelCovariance(covariance[None], (side, side))
    spectrum = PowerSpectrum(np.diag(axes @ covariance @ axes.T).reshape(1, side, side))
    np.testing.assert_allclose(spectrum.full(SIGMAS), images.full(SIGMAS), rtol=0.03)
    for factor in (2, 4):
        one, other = (c.coarse(factor, SIGMAS).relative for c in (spectrum, images))
        np.testing.assert_allclose(one, other, rtol=0.03)


def test_halos_count_at_inner_borders_only() -> None:
    images = whole(smooth(2))
    axes = {(top, left) for top, left, *_ in images._crop_maps(4, SIGMAS)}
    assert {(0, 0), (4, 4), (0, 4)} <= axes
    # As the whole image has inner borders nowhere, a halo leaves out nothing.
    np.testing.assert_allclose(images.crop(SIDE, 2, SIGMAS).error, images.full(SIGMAS), rtol=1e-9)
    assert np.all(images.crop(4, 1, SIGMAS).relative < images.crop(4, 0, SIGMAS).relative)


def test_other_scales_are_other_noise_levels() -> None:
    for images in (smooth(2), whole(smooth(2))):
        double = images.scaled(2)
        np.testing.assert_allclose(double.full(2 * SIGMAS), 4 * images.full(SIGMAS))


def test_what_cannot_be_seen_is_refused() -> None:
    images = smooth(2)
    for side, halo in ((9, 0), (4, 2), (0, 0)):
        with pytest.raises(DataError, match="halo"):
            images.crop(side, halo, SIGMAS)
    with pytest.raises(DataError, match="3x3"):
        images.coarse(3, SIGMAS)


def test_the_smallest_noise_level_that_keeps_a_bound() -> None:
    sigmas = log_spaced(0.1, 10, 5)
    relative = np.array([1.01, 1.5, 1.2, 1.0, 1.0])
    assert smallest_sigma(relative, sigmas, 1.1) == pytest.approx((sigmas[2] * sigmas[3]) ** 0.5)
    assert smallest_sigma(relative, sigmas, 2) == pytest.approx(0.1)
    assert smallest_sigma(relative[::-1], sigmas, 1.005) is None

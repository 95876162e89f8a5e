"""Decoding: which kinds of image become what."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from tessera.data.decode import decode_image, is_image
from tessera.errors import DataError

COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [30, 60, 90]]], np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_colour_kinds_become_rgb():
    rgb = Image.fromarray(COLOURS)
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray(np.array([[0, 255], [128, 255]], np.uint8)))
    palette = rgb.quantize(4)
    for data in (encoded(rgb), encoded(alpha), encoded(palette), encoded(palette, "GIF")):
        np.testing.assert_array_equal(decode_image(data, "x"), COLOURS)
    cmyk = decode_image(encoded(rgb.convert("CMYK"), "TIFF"), "x")
    np.testing.assert_allclose(cmyk.astype(int), COLOURS, atol=2)


def test_transparent_palette_gives_no_warning():
    palette = Image.fromarray(COLOURS).quantize(4)
    data = encoded(palette, transparency=bytes([0, 128, 255, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(data, "x").shape == (2, 2, 3)


def test_grey_kinds_stay_grey():
    grey = np.array([[0, 255], [7, 130]], np.uint8)
    image = Image.fromarray(grey)
    np.testing.assert_array_equal(decode_image(encoded(image), "x"), grey)
    with_alpha = Image.merge("LA", (image, image))
    np.testing.assert_array_equal(decode_image(encoded(with_alpha), "x"), grey)
    deep = Image.fromarray(grey.astype(np.uint16) * 256 + 77)
    np.testing.assert_array_equal(decode_image(encoded(deep), "x"), grey)
    bits = Image.fromarray(grey > 100)
    np.testing.assert_array_equal(decode_image(encoded(bits), "x"), (grey > 100) * np.uint8(255))


def test_orientation_tag():
    image = Image.fromarray(COLOURS[:, :1])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    data = encoded(image, exif=exif)
    assert decode_image(data, "x").shape == (2, 1, 3)
    np.testing.assert_array_equal(
        decode_image(data, "x", upright=True), np.rot90(COLOURS[:, :1], -1)
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "photo: not an image"),
        (b"\xff\xd8\xff", "photo: not an image"),
        (encoded(Image.fromarray(COLOURS.repeat(50, 0)))[:60], "photo: cannot be decoded"),
        (encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "floating-point"),
    ],
)
def test_damaged_files_are_named(data, message):
    with pytest.raises(DataError, match=message):
        decode_image(data, "photo")


def test_which_names_are_images():
    assert all(map(is_image, ["a.png", "b/c.JPG", "d.jpeg", "e.webp", "f.bmp"]))
    assert not any(
        map(is_image, ["a.txt", "png", "__MACOSX/a.png", ".a.png", "b/._c.png", "d.pdf"])
    )

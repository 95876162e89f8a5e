"""Encoded image files to uint8 pixels."""

from __future__ import annotations

import functools
import os

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from tessera.errors import DataError
from tessera.images import MAX_PIXELS, image_formats, is_array, open_image, read_array


@functools.cache
def image_extensions() -> frozenset[str]:
    """Lower-case file name extensions (with the dot) of the formats that are opened."""
    return frozenset(
        extension
        for extension, kind in Image.registered_extensions().items()
        if kind in image_formats()
    )


def is_image(name: str) -> bool:
    """Whether a `/`-separated file name is that of an image; hidden files are not."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    ending = os.path.splitext(name)[1].lower()
    return not hidden and (ending in image_extensions() or ending == ".npy")


def decode_image(
    data: bytes,
    name: str,
    *,
    upright: bool = False,
    opaque: bool = False,
    alpha: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> NDArray[np.uint8]:
    """Pixels of an image file: uint8 [H, W] for grey images, else RGB [H, W, 3].

    Arrays of NumPy (`.npy`) may have other numbers of channels, see `images.read_array`.

    Palette, CMYK and all other colour images become RGB, 16-bit grey keeps its upper 8 bits, and an
    alpha channel is dropped.

    Args:
        name: what an error calls the file.
        upright: turn the picture as the camera's orientation tag (EXIF) says.
        alpha: make RGBA [H, W, 4] of every picture that is no array.
        opaque: refuse an image with an alpha channel.
        max_pixels: refuse an image of more pixels, before it is decoded.

    Raises:
        DataError: not an image, damaged, transparent, too large, or of a kind without a brightness
            scale (float).
    """
    if is_array(data):
        return read_array(data, name, max_pixels)
    try:
        # A decoder that meets damaged data may raise nearly anything.
        with open_image(data, name, max_pixels) as file:
            if opaque and ("A" in file.getbands() or "transparency" in file.info):
                raise DataError(
                    f"{name}: has an alpha channel, and what it would be laid over is not known. "
                    "Make RGB images of the set with: tessera data convert"
                )
            image = ImageOps.exif_transpose(file) if upright else file
            return np.array(image.convert("RGBA"), np.uint8) if alpha else _pixels(image)
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: not an image that can be read") from error
    except Exception as error:
        raise DataError(f"{name}: cannot be decoded ({error})") from error


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    mode = image.mode
    if mode in ("L", "RGB"):
        return np.array(image, dtype=np.uint8)
    if mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown scale")
    if mode.startswith("I"):  # 16-bit grey, which some Pillow versions hold in 32 bits
        grey: NDArray[np.uint8] = (np.array(image).clip(0, 65535) >> 8).astype(np.uint8)
        return grey
    if mode in ("1", "LA", "La"):
        return np.array(image.convert("L"), dtype=np.uint8)
    if mode == "P":  # by way of RGBA, because a palette entry may be transparent
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"), dtype=np.uint8)


def channels_first(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W] or [H, W, C] as a view [C, H, W]."""
    return image[None] if image.ndim == 2 else image.transpose(2, 0, 1)


def shape_text(shape: tuple[int, ...]) -> str:
    """(C, H, W) in words for messages: `32x32 RGB` (width x height)."""
    channels, height, width = shape
    kinds = {1: "grey", 3: "RGB"}
    return f"{width}x{height} {kinds.get(channels, f'with {channels} channels')}"

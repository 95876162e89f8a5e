"""Pixels between model space and files: quantisation, grids, PNG, arrays of many channels."""

from __future__ import annotations

import functools
import io
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tessera.channels import MAX_CHANNELS, is_picture
from tessera.errors import DataError
from tessera.files import atomic_file
from tessera.npy import NPY, npy_header

MAX_PIXELS = 1 << 26  # of one image that is opened; 8192 x 8192
# Nothing else is tried, whatever a file is called: Pillow has decoders that start other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "TIFF", "PPM")
# `open_image` refuses such images itself, and smaller ones.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1, any shape (x / 127.5 - 1)."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float -1..1 to uint8 by truncating clip(127.5 x + 128), any shape (EDM's rule)."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def to_pil(image: NDArray[np.uint8]) -> Image.Image:
    """uint8 [H, W, C] or [H, W] as a Pillow image to look at; see `visible` for many channels."""
    image = visible(image)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(image))


def visible(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Channels that can be looked at: [H, W], or [..., H, W, C] as a view with C = 1 or 3.

    Of other images the first three, of two channels the first one.
    """
    if images.ndim < 3 or is_picture(images.shape[-1]):
        return images
    return images[..., : 3 if images.shape[-1] > 3 else 1]


def array_bytes(image: NDArray[np.uint8]) -> bytes:
    """uint8 [H, W, C] as the bytes of a `.npy` file of NumPy."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(image, np.uint8), allow_pickle=False)
    return file.getvalue()


def is_array(data: bytes) -> bool:
    """Whether a file is an array of NumPy, by its first bytes."""
    return data.startswith(NPY)


def read_array(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The pixels in a `.npy` file: uint8 [H, W], or [H, W, C] with C from 2 to `MAX_CHANNELS`.

    Args:
        data: the file.
        name: what messages call it.
        max_pixels: refuse an image of more pixels.

    Raises:
        DataError: damaged, too large, of another type or shape.
    """
    start, shape, dtype = npy_header(data, name)
    if dtype != np.uint8:
        raise DataError(f"{name}: an array of {dtype}; the pixels of images are uint8, 0 to 255")
    if len(shape) not in (2, 3) or shape[2:] > (MAX_CHANNELS,):
        first = len(shape) == 3 and shape[0] <= MAX_CHANNELS
        raise DataError(
            f"{name}: an array of shape {shape}; images are [height, width] or [height, width, "
            f"channels] with at most {MAX_CHANNELS} channels"
            + ("; here the channels seem to come first" if first else "")
        )
    if shape[0] * shape[1] > max_pixels:
        raise DataError(_too_large(name, f"{shape[1]}x{shape[0]}", max_pixels))
    if len(data) - start != math.prod(shape):
        raise DataError(f"{name}: the array is cut off, or followed by something else")
    pixels = np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()
    return pixels[:, :, 0] if shape[2:] == (1,) else pixels


def save_image(path: str | os.PathLike[str], image: NDArray[np.uint8]) -> None:
    """Write uint8 [H, W, C] as a PNG file or, if the name ends in `.npy`, an array; atomically."""
    with atomic_file(path) as file:
        file.write(array_bytes(image) if str(path).endswith(".npy") else png_bytes(image))


def png_bytes(image: NDArray[np.uint8], compress_level: int = 6) -> bytes:
    """uint8 [H, W, C] or [H, W] as the bytes of a PNG file (level 0: uncompressed)."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG", compress_level=compress_level, optimize=False)
    return buffer.getvalue()


def save_png(path: str | os.PathLike[str], image: NDArray[np.uint8]) -> None:
    """Write uint8 [H, W, C] or [H, W] as a PNG file to look at, atomically."""
    with atomic_file(path) as file:
        file.write(png_bytes(image))


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are opened, of which it may have been built without some.

    Examples:
        >>> image_formats()[:3]
        ('PNG', 'JPEG', 'WEBP')
    """
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def open_image(
    source: str | os.PathLike[str] | bytes, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Open an image file of a known format, by its path or its bytes; no pixel is decoded yet.

    Args:
        name: what an error calls the file; by default its path.
        max_pixels: refuse an image of more pixels, however small its file.

    Raises:
        DataError: it is larger.
        PIL.UnidentifiedImageError: it is of no format in `image_formats`.
    """
    if isinstance(source, bytes):
        file: io.BytesIO | Path = io.BytesIO(source)
    else:
        file = Path(source)
    name = str(file) if name is None else name
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own limit, which no argument changes
    try:
        image = Image.open(file, formats=image_formats())
    except Image.DecompressionBombError as error:
        raise DataError(_too_large(name, "more", max_pixels)) from error
    if image.width * image.height > max_pixels:
        image.close()
        raise DataError(_too_large(name, f"{image.width}x{image.height}", max_pixels))
    return image


def _too_large(name: str, size: str, limit: int) -> str:
    return (
        f"{name}: {size} pixels are more than the limit of {limit:,} for one image, because a few "
        "such images fill the memory. If that is meant: tessera data convert --max-pixels NUMBER"
    )


def grid(
    images: NDArray[np.uint8], columns: int | None = None, gap: int = 2, scale: int | None = None
) -> NDArray[np.uint8]:
    """Tile images [N, H, W, C] row by row into one picture on white, [H', W', 1 or 3].

    Of many channels those that are `visible` are shown.

    Args:
        columns: images in a row; by default as square as possible.
        gap: white pixels between images.
        scale: whole-number enlargement of every image; by default small ones grow to be seen well.
    """
    images = visible(images)
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    scale = scale or max(1, 64 // max(height, width))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale, width * scale
    canvas = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8
    )
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def labelled_grid(
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
    *,
    gap: int = 2,
    least: int = 1,
) -> NDArray[np.uint8]:
    """Pictures in a grid on white, with names before the rows and above the columns if given.

    Args:
        rows: pictures [H, W, C] of each row; those of a row may differ in size.
        gap: white pixels between pictures.
        least: pictures are enlarged, each by a whole number, to so many pixels of width.

    Returns:
        uint8 [H', W', 3].
    """
    margin = 6
    cells = [[_enlarged(picture, least) for picture in row] for row in rows]
    heights = [max(cell.height for cell in row) for row in cells]
    widths = [max(cell.width for cell in column) for column in zip(*cells, strict=True)]
    font = ImageFont.load_default(size=min(16, max(10, min(heights) // 4)))
    left = max((2 * margin + math.ceil(font.getlength(name)) for name in row_names), default=0)
    top = 20 if column_names else 0
    lefts = [left + sum(widths[:index]) + index * gap for index in range(len(widths))]
    tops = [top + sum(heights[:index]) + index * gap for index in range(len(heights))]
    sheet = Image.new("RGB", (lefts[-1] + widths[-1], tops[-1] + heights[-1]), "white")
    draw = ImageDraw.Draw(sheet)
    for x, name in zip(lefts, column_names, strict=False):
        draw.text((x + 2, top // 2), name, "black", ImageFont.load_default(size=12), "lm")
    for y, height, name in zip(tops, heights, row_names, strict=False):
        draw.text((left - margin, y + height // 2), name, "black", font, "rm")
    for y, row in zip(tops, cells, strict=True):
        for x, cell in zip(lefts, row, strict=True):
            sheet.paste(cell, (x, y))
    return np.asarray(sheet)


def _enlarged(picture: NDArray[np.uint8], least: int) -> Image.Image:
    scale = max(1, -(-least // picture.shape[1]))
    return to_pil(picture.repeat(scale, axis=0).repeat(scale, axis=1)).convert("RGB")

"""Geometry of the conversion: crop and resize, on uint8 [H, W] or [H, W, C] (EDM's data set tool).

A size is (width, height), as users write it: 64x48 is wider than high.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tessera.channels import is_picture
from tessera.errors import DataError

Pixels = NDArray[np.uint8]
Transform = Literal["none", "center-crop", "center-crop-wide", "adm-center-crop", "lsun-crop"]
Filter = Literal["lanczos", "bicubic", "bilinear", "hamming", "box", "nearest"]

FIXED_FILTER: frozenset[Transform] = frozenset({"adm-center-crop", "lsun-crop"})
"""Transforms that say themselves how they resize."""

TRANSFORMS: tuple[Transform, ...] = get_args(Transform)
FILTERS: tuple[Filter, ...] = get_args(Filter)


def parse_size(text: str) -> tuple[int, int]:
    """`64`, `64x48` or `64,48` as (width, height)."""
    parts = text.lower().replace(",", "x").split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise DataError(f"resolution {text!r}: write one number, or width x height as in 64x48")
    return int(parts[0]), int(parts[-1])


def check_transform(
    transform: Transform, size: tuple[int, int] | None, resample: Filter | None
) -> None:
    """Raise DataError for choices that cannot give a square image, or contradict each other."""
    if transform not in TRANSFORMS:
        raise DataError(f"transform {transform!r}: choose one of {', '.join(TRANSFORMS)}")
    if resample is not None and resample not in FILTERS:
        raise DataError(f"filter {resample!r}: choose one of {', '.join(FILTERS)}")
    if resample is not None and transform in FIXED_FILTER:
        raise DataError(f"{transform} has filters of its own; leave out `resample`")
    if size is None:
        if transform != "none":
            raise DataError(f"transform {transform!r} needs the size to crop to: add a resolution")
        return
    width, height = size
    if transform == "center-crop-wide":
        if height > width:
            raise DataError(
                f"center-crop-wide pads a wide picture to a square, but {width}x{height} is high"
            )
    elif width != height:
        raise DataError(
            f"resolution {width}x{height} is not square, and models are trained on square images; "
            "use one number, or center-crop-wide for letter-boxed wide pictures"
        )


def apply_transform(
    image: Pixels,
    transform: Transform,
    size: tuple[int, int] | None,
    resample: Filter | None = None,
    released_wide_crop: bool = False,
) -> Pixels | None:
    """Crop and resize; None where center-crop-wide leaves out a picture that is too small.

    Args:
        image: uint8 [H, W] or [H, W, C]; the crops turn grey into three equal channels.
        size: (width, height); None keeps the image as it is.
        resample: filter, lanczos by default; the crops of ADM and LSUN have their own.
        released_wide_crop: repeat the released tool, which cuts to rows of the wrong aspect ratio
            and so stretches most pictures.
    """
    if size is None:
        return image
    resample = resample or "lanczos"
    if transform == "none":
        return resize(image, size, resample)
    if transform == "adm-center-crop":
        return _adm_crop(_rgb(image), size[0])
    if transform == "lsun-crop":
        return _short_side_crop(_rgb(image), size[0], "box")
    if transform == "center-crop":
        side = min(image.shape[:2])
        return resize(_rgb(_cut(image, side, side)), size, resample)
    return _wide(image, size, resample, released_wide_crop)


def resize(image: Pixels, size: tuple[int, int], resample: Filter) -> Pixels:
    """Resize to (width, height) without keeping the aspect ratio; unchanged if it fits already."""
    if (image.shape[1], image.shape[0]) == size:
        return image
    method = Image.Resampling[resample.upper()]
    if image.ndim == 3 and not is_picture(image.shape[2]):  # no colours, so each for itself
        planes = [resize(plane, size, resample) for plane in np.moveaxis(image, 2, 0)]
        return np.stack(planes, axis=2)
    return np.array(
        Image.fromarray(np.ascontiguousarray(image)).resize(size, method), dtype=np.uint8
    )


def _adm_crop(image: Pixels, side: int) -> Pixels:
    """Halved by BOX while at least twice the size, then BICUBIC, then cut (guided-diffusion)."""
    while min(image.shape[:2]) >= 2 * side:
        image = resize(image, (image.shape[1] // 2, image.shape[0] // 2), "box")
    return _short_side_crop(image, side, "bicubic")


def _short_side_crop(image: Pixels, side: int, resample: Filter) -> Pixels:
    """The shorter side brought to `side`, and the square in the middle."""
    height, width = image.shape[:2]
    scale = side / min(height, width)
    image = resize(image, (round(width * scale), round(height * scale)), resample)
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return np.ascontiguousarray(image[top : top + side, left : left + side])


def _wide(image: Pixels, size: tuple[int, int], resample: Filter, released: bool) -> Pixels | None:
    """The middle of the picture at the size's aspect ratio, on a black square of the width."""
    height, width = image.shape[:2]
    out_width, out_height = size
    if released:
        rows, columns = round(out_width * height / width), width
    else:
        rows, columns = min(height, round(width * out_height / out_width)), width
        if rows == height:
            columns = min(width, round(height * out_width / out_height))
    if columns < out_width or rows < out_height:
        return None
    picture = resize(_rgb(_cut(image, rows, columns)), size, resample)
    canvas = np.zeros((out_width, out_width, picture.shape[2]), np.uint8)
    canvas[(out_width - out_height) // 2 : (out_width + out_height) // 2] = picture
    return canvas


def _cut(image: Pixels, rows: int, columns: int) -> Pixels:
    height, width = image.shape[:2]
    top, bottom = (height - rows) // 2, (height + rows) // 2
    left, right = (width - columns) // 2, (width + columns) // 2
    return np.ascontiguousarray(image[top:bottom, left:right])


def _rgb(image: Pixels) -> Pixels:
    return image if image.ndim == 3 else image[:, :, None].repeat(3, axis=2)


def to_channels(image: Pixels, channels: int | None) -> Pixels:
    """Grey or RGB (1, 3) of each other, or RGBA of both (4); None leaves the image as it is.

    Raises:
        DataError: it has more channels than a picture, or the result should.
    """
    there = image.shape[2] if image.ndim == 3 else 1
    if channels in (None, there):
        return image
    if not is_picture(there) or channels not in (1, 3, 4):
        raise DataError(f"an image of {there} channels cannot become one of {channels}")
    if channels == 1:
        return np.array(Image.fromarray(image).convert("L"), dtype=np.uint8)
    image = _rgb(image)
    if channels == 4:
        return np.concatenate([image, np.full_like(image[:, :, :1], 255)], axis=2)
    return image

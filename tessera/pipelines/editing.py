"""Pictures of which a part is kept, and the rest made anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tessera.errors import TesseraError

Box = tuple[int, int, int, int]
"""Column and row of the first pixel, width, height."""

_WAYS = "`mask`, `box`, `keep` or `place`"


@dataclass(frozen=True)
class Edit:
    """What is to be made anew.

    Attributes:
        pictures: uint8 [N, H, W, C], as large as the samples of the model.
        made: bool [H, W], the pixels that are made anew, the same of all pictures.
    """

    pictures: NDArray[np.uint8]
    made: NDArray[np.bool_]

    def cells(self, side: int) -> NDArray[np.bool_]:
        """The squares of so many pixels a side, [H / side, W / side], that hold any such pixel."""
        height, width = self.made.shape
        squares = self.made.reshape(height // side, side, width // side, side)
        return np.asarray(squares.any(axis=(1, 3)))


def choose_edit(
    images: Sequence[NDArray[np.uint8]],
    shape: tuple[int, int, int],
    *,
    mask: NDArray[np.uint8] | None = None,
    box: Box | None = None,
    keep: Box | None = None,
    place: tuple[int, int] | None = None,
) -> Edit:
    """The edit that one of four ways describes.

    Args:
        images: uint8 [h, w, C] each, as large as the model's; with `place` smaller ones, too.
        shape: (C, H, W) of the model's pictures, in pixels.
        mask: [H, W]; what is over 127 is made anew.
        box: what is made anew.
        keep: what is kept.
        place: column and row where the images are put, around which the rest is made.

    Raises:
        TesseraError: none of these or several are given, sizes do not fit, or nothing is to be
            made or to be kept.

    Example:
        >>> image = np.zeros((4, 4, 1), np.uint8)
        >>> choose_edit([image], (1, 4, 4), box=(0, 0, 2, 1)).cells(2)
        array([[ True, False],
               [False, False]])
    """
    ways = [way for way in (mask, box, keep, place) if way is not None]
    if len(ways) != 1:
        raise TesseraError(f"say what is kept and what is made, in one way: {_WAYS}")
    if not images:
        raise TesseraError("name one image or more to edit")
    channels, height, width = shape
    pictures = np.zeros((len(images), height, width, channels), np.uint8)
    made = np.zeros((height, width), np.bool_)
    sizes = {image.shape[:2] for image in images}
    if place is not None:
        if len(sizes) > 1:
            raise TesseraError("`place`: images of different sizes leave different parts to make")
        rows, columns = _inside(
            (*place, images[0].shape[1], images[0].shape[0]), (height, width), "place"
        )
        pictures[:, rows, columns] = np.stack(images)
        made[:] = True
        made[rows, columns] = False
    else:
        for image, picture in zip(images, pictures, strict=True):
            if image.shape != picture.shape:
                raise TesseraError(
                    f"an image of {image.shape[1]}x{image.shape[0]} pixels: this model makes "
                    f"{width}x{height} (width x height). Resize it, or put a smaller one on the "
                    "canvas by `place`"
                )
            picture[:] = image
        if box is not None:
            made[_inside(box, (height, width), "box")] = True
        elif keep is not None:
            made[:] = True
            made[_inside(keep, (height, width), "keep")] = False
        elif mask is not None:
            if mask.shape != made.shape:
                raise TesseraError(
                    f"`mask`: it has {mask.shape[1]}x{mask.shape[0]} pixels, and the images have "
                    f"{width}x{height} (width x height)"
                )
            made = mask > 127
    if not made.any():
        raise TesseraError(f"nothing is to be made: {_WAYS} leaves all as it is")
    return Edit(pictures, made)


def _inside(box: Box, size: tuple[int, int], name: str) -> tuple[slice, slice]:
    """Rows and columns of a box within a picture of this height and width."""
    x, y, width, height = box
    if x < 0 or y < 0 or width < 1 or height < 1 or x + width > size[1] or y + height > size[0]:
        raise TesseraError(
            f"`{name}`: a box at {x},{y} of {width}x{height} pixels does not lie in a picture of "
            f"{size[1]}x{size[0]} (width x height)"
        )
    return slice(y, y + height), slice(x, x + width)

"""Latents decoded beside the images that they were made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tessera.data.codec import VaeCodec
from tessera.data.dataset import ImageDataset
from tessera.data.latent_keys import image_keys
from tessera.data.latents import LatentDataset
from tessera.errors import DataError
from tessera.randomness import numpy_generator


@dataclass(frozen=True)
class DecodedLatent:
    """What a row of a set shows.

    Attributes:
        row: of the set.
        image: uint8 [H, W, 3], its mean decoded.
        source: uint8 [H, W, 3], the image that it was made of; None where that is not known.
        psnr: of the two, in decibels; infinite if they are the same; None without a source.
    """

    row: int
    image: NDArray[np.uint8]
    source: NDArray[np.uint8] | None
    psnr: float | None


def decode_some(
    dataset: LatentDataset,
    codec: VaeCodec,
    count: int,
    *,
    images: ImageDataset | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[DecodedLatent]:
    """Decode the means of a few random rows.

    Args:
        codec: of the autoencoder, with the set's scale and shift if it says them.
        count: rows, at most.
        images: those that the set was made of, in any order; of a set that does not know its
            images by their content, in the order of its rows.
        seed: chooses the rows.

    Raises:
        DataError: `images` are others than those of the set.
    """
    order = numpy_generator(seed, "inspect").permutation(len(dataset))
    rows = np.sort(order[:count])
    values = torch.from_numpy(np.asarray(dataset.read(rows), np.float32)).to(device)
    channels = dataset.shape[0]
    x = values if dataset.drawn else (values[:, :channels] - codec.shift) * codec.scale
    decoded = codec.decode(x).permute(0, 2, 3, 1).cpu().numpy()
    sources: list[NDArray[np.uint8] | None] = [None] * len(rows)
    if images is not None:
        if images.shape != codec.image_shape(dataset.shape):
            raise DataError(
                f"{images.name}: images of {images.shape[2]}x{images.shape[1]}; the set was made "
                f"of larger, smaller or other ones: {decoded.shape[2]}x{decoded.shape[1]} RGB"
            )
        sources = [*images.read(_source_rows(dataset, rows, images)).transpose(0, 2, 3, 1)]
    return [
        DecodedLatent(int(row), image, source, None if source is None else psnr(image, source))
        for row, image, source in zip(rows, decoded, sources, strict=True)
    ]


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures, in decibels.

    Example:
        >>> black = np.zeros((2, 2, 3), np.uint8)
        >>> round(psnr(black, black + 1), 2), psnr(black, black)
        (48.13, inf)
    """
    error = float(np.square(one.astype(np.float64) - other).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def _source_rows(
    dataset: LatentDataset, rows: NDArray[Any], images: ImageDataset
) -> NDArray[np.int64]:
    """Where the images of some rows are among the images."""
    keys = dataset.keys
    if keys is None:
        if len(images) != len(dataset):
            raise DataError(
                f"{images.name} has {len(images):,} images and {dataset.name} {len(dataset):,} "
                "latents; this set does not know which images it was made of, so both must have "
                "the same number, in the same order"
            )
        return rows
    places = {key: place for place, key in enumerate(image_keys(images, 64))}
    wanted = [bytes(key) for key in keys[rows]]
    missing = sum(key not in places for key in wanted)
    if missing:
        raise DataError(
            f"{images.name} lacks {missing} of the {len(rows)} images that were looked for, by "
            f"their pixels: {dataset.name} was made of others, or of other sizes"
        )
    return np.array([places[key] for key in wanted], np.int64)

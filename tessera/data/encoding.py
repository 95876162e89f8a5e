"""Making sets of latents: all images of a set, encoded once by a VAE (see `data.latents`)."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tessera.data.codec import VaeCodec
from tessera.data.dataset import ImageDataset
from tessera.data.latent_formats.base import LatentInfo, LatentPlan, Precision
from tessera.data.latent_formats.registry import (
    check_mirrored,
    choose_format,
    choose_precision,
    latent_sink,
)
from tessera.data.parallel import ordered_map
from tessera.errors import DataError
from tessera.files import user_path
from tessera.progress import progress


@dataclass(frozen=True)
class LatentReport:
    """What `write_latents` did."""

    path: Path
    count: int
    shape: tuple[int, int, int]
    info: LatentInfo
    flips: bool
    num_classes: int
    seconds: float


def write_latents(
    dataset: ImageDataset,
    codec: VaeCodec,
    path: str | os.PathLike[str],
    *,
    batch: int = 16,
    device: torch.device | str = "cpu",
    xflip: bool = False,
    precision: Precision | None = None,
    form: str | None = None,
    seed: int = 0,
    shard: int = 64,
    overwrite: bool = False,
) -> LatentReport:
    """Encode all images of a set; the file appears when it is whole.

    Args:
        batch: images that are read and encoded at once.
        xflip: encode the mirrored images, too.
        precision: of the numbers, where the format leaves a choice; by default float16.
        form: name of the format, see `latent_formats`; None is told by the ending of `path`.
        seed: of the sample, where the format holds one of each image.
        shard: rows of a file, where the format has several files.
        overwrite: replace an existing set.

    Raises:
        DataError: images that the codec cannot encode, or a file that exists already.
    """
    path, begin = user_path(path), time.monotonic()
    written = choose_format(path, form, overwrite)
    precision = choose_precision(path, written, precision, "float16")
    check_mirrored(path, written, xflip)
    channels, height, width = dataset.shape
    if channels != 3:
        raise DataError(
            f"{dataset.name}: a VAE encodes RGB images, and these are grey; make them RGB with: "
            "tessera data convert --channels 3"
        )
    if height != width or height % codec.downsample:
        raise DataError(
            f"{dataset.name}: its images are {width}x{height} pixels; the VAE {codec.model} needs "
            f"squares whose side is a multiple of {codec.downsample}. Resize them with: "
            "tessera data convert --resolution N --transform center-crop"
        )
    info = LatentInfo(codec.model, width, codec.downsample, codec.scale, codec.shift)
    side = width // codec.downsample
    shape = (codec.channels, side, side)
    starts = range(0, len(dataset), batch)

    def read(start: int) -> NDArray[np.uint8]:
        return dataset.read(np.arange(start, min(start + batch, len(dataset))))

    plan = LatentPlan(
        path.stem, len(dataset), shape, info, xflip, dataset.labels, dataset.class_names, precision,
        shard,
    )  # fmt: skip
    with (
        latent_sink(path, written, plan, seed) as put,
        progress("encoding", len(dataset), unit="images") as bar,
    ):
        for start, images in zip(starts, ordered_map(read, starts, 2, 4), strict=True):
            pixels = torch.from_numpy(images).to(device)
            put(start, codec.encode(pixels), codec.encode(pixels.flip(3)) if xflip else None)
            bar.advance(len(images))
    seconds = time.monotonic() - begin
    return LatentReport(path, len(dataset), shape, info, xflip, dataset.num_classes, seconds)

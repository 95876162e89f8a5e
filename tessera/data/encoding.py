"""Making sets of latents: all images of a set, encoded once by a VAE (see `data.latents`)."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tessera import distributed
from tessera.data.codec import VaeCodec
from tessera.data.dataset import ImageDataset
from tessera.data.latent_cache import Changes, update_cache
from tessera.data.latent_formats.base import (
    LatentFormat,
    LatentInfo,
    LatentPlan,
    Precision,
)
from tessera.data.latent_formats.packed import PACKED
from tessera.data.latent_formats.registry import (
    check_mirrored,
    choose_format,
    choose_precision,
    latent_sink,
)
from tessera.data.parallel import ordered_map
from tessera.errors import DataError
from tessera.files import user_path
from tessera.precision import resolve
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
    changes: Changes | None = None
    """Of a packed set, which is brought up to date."""


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
    """Encode all images of a set; it appears when it is whole.

    A packed set that is there already is brought up to date, see `latent_cache`, and processes of
    a launcher share the work.

    Args:
        batch: images that are read and encoded at once.
        xflip: encode the mirrored images, too.
        precision: of the numbers, where the format leaves a choice; by default float16.
        form: name of the format, see `latent_formats`; None is told by the ending of `path`.
        seed: of the sample, where the format holds one of each image.
        shard: rows of a file, where the format has several files.
        overwrite: replace an existing set, and take nothing from it.

    Raises:
        DataError: images that the codec cannot encode, or something is there that is not replaced.
    """
    path, begin = user_path(path), time.monotonic()
    renewed = form in (None, PACKED.name) and PACKED.recognise(path)
    written = choose_format(path, form, overwrite or renewed)
    if precision is None and renewed and not overwrite:
        precision = PACKED.open(path).precision
    precision = choose_precision(path, written, precision, "float16")
    check_mirrored(path, written, xflip)
    if written is not PACKED and distributed.world() > 1:
        raise DataError(
            f"{path}: several processes encode packed sets only. Encode into one, and convert it: "
            f"tessera data latents NAME.safetensors {path} --to {written.name}"
        )
    channels, height, width = dataset.shape
    if channels != 3:
        raise DataError(
            f"{dataset.name}: a VAE encodes RGB images, and these have {channels} channel(s); make "
            "them RGB with: tessera data convert --channels 3"
        )
    if height != width or height % codec.downsample:
        raise DataError(
            f"{dataset.name}: its images are {width}x{height} pixels; the VAE {codec.model} needs "
            f"squares whose side is a multiple of {codec.downsample}. Resize them with: "
            "tessera data convert --resolution N --transform center-crop"
        )
    device = torch.device(device)
    codec.precision = compute = resolve(codec.precision, device, together=True)
    info = LatentInfo(
        codec.model, width, codec.downsample, codec.scale, codec.shift, codec.weights_digest(),
        compute,
    )  # fmt: skip
    side = width // codec.downsample
    shape = (codec.channels, side, side)
    plan = LatentPlan(
        path.stem, len(dataset), shape, info, xflip, dataset.labels, dataset.class_names, precision,
        shard,
    )  # fmt: skip
    changes = None
    if written is PACKED:
        changes = update_cache(
            dataset, codec, path, plan, batch=batch, device=device, overwrite=overwrite
        )
    else:
        _encode_whole(dataset, codec, path, written, plan, batch, device, seed)
    seconds = time.monotonic() - begin
    count, classes = len(dataset), dataset.num_classes
    return LatentReport(path, count, shape, info, xflip, classes, seconds, changes)


def _encode_whole(
    dataset: ImageDataset,
    codec: VaeCodec,
    path: Path,
    form: LatentFormat,
    plan: LatentPlan,
    batch: int,
    device: torch.device,
    seed: int,
) -> None:
    """Encode all images into a set of a format that cannot be brought up to date."""
    starts = range(0, len(dataset), batch)

    def read(start: int) -> NDArray[np.uint8]:
        return dataset.read(np.arange(start, min(start + batch, len(dataset))))

    with (
        latent_sink(path, form, plan, seed) as put,
        progress("encoding", len(dataset), unit="images") as bar,
    ):
        for start, images in zip(starts, ordered_map(read, starts, 2, 4), strict=True):
            pixels = torch.from_numpy(images).to(device)
            mirrored = codec.encode(pixels.flip(3)) if plan.mirrored else None
            put(start, codec.encode(pixels), mirrored)
            bar.advance(len(images))

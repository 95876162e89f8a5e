"""Making sets of latents: all images of a set, encoded once by a VAE (see `data.latents`)."""

from __future__ import annotations

import json
import math
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.data.codec import VaeCodec
from tessera.data.dataset import ImageDataset
from tessera.data.latents import VERSION, LatentInfo
from tessera.data.packed import DTYPES, LATENTS_FORMAT, tensor_entry
from tessera.data.parallel import ordered_map
from tessera.errors import DataError
from tessera.files import atomic_file, check_free, user_path
from tessera.progress import progress

Precision = Literal["float16", "float32"]


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
    precision: Precision = "float16",
    overwrite: bool = False,
) -> LatentReport:
    """Encode all images of a set; the file appears when it is whole.

    Args:
        batch: images that are read and encoded at once.
        xflip: encode the mirrored images, too.
        precision: of the numbers in the file.
        overwrite: replace an existing file.

    Raises:
        DataError: images that the codec cannot encode, or a file that exists already.
    """
    path, begin = user_path(path), time.monotonic()
    if path.suffix.lower() != ".safetensors":
        raise DataError(f"{path}: a set of latents is one file; end its name in .safetensors")
    check_free(path, overwrite)
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

    with (
        atomic_file(path) as file,
        progress("encoding", len(dataset), unit="images") as bar,
    ):
        put = _begin(file, dataset, path.stem, info, shape, xflip, precision)
        for start, images in zip(starts, ordered_map(read, starts, 2, 4), strict=True):
            pixels = torch.from_numpy(images).to(device)
            put("moments", start, codec.encode(pixels))
            if xflip:
                put("moments_flip", start, codec.encode(pixels.flip(3)))
            bar.advance(len(images))
    seconds = time.monotonic() - begin
    return LatentReport(path, len(dataset), shape, info, xflip, dataset.num_classes, seconds)


def _begin(
    file: IO[bytes],
    dataset: ImageDataset,
    name: str,
    info: LatentInfo,
    shape: tuple[int, int, int],
    xflip: bool,
    precision: Precision,
) -> Any:
    """Write header and labels; returns `put(tensor, first row, moments)`, which writes rows."""
    metadata = {
        "format": LATENTS_FORMAT,
        "version": VERSION,
        "name": name,
        "vae": info.vae,
        "resolution": str(info.resolution),
        "downsample": str(info.downsample),
        "scale": repr(info.scale),
        "shift": repr(info.shift),
    }
    labels = dataset.labels
    if labels is not None and dataset.class_names is not None:
        metadata["class_names"] = json.dumps(dataset.class_names, ensure_ascii=False)
    code = {"float16": "F16", "float32": "F32"}[precision]
    dtype = DTYPES[code]
    rows = (len(dataset), 2 * shape[0], *shape[1:])
    size = math.prod(rows) * dtype.itemsize
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    if labels is not None:
        # First, where their numbers of eight bytes are aligned.
        header["labels"] = tensor_entry(
            "I64" if labels.ndim == 1 else "F32", labels.shape, 0, labels.nbytes
        )
        end = labels.nbytes
    offsets = {}
    for tensor in ("moments", "moments_flip")[: 2 if xflip else 1]:
        header[tensor] = tensor_entry(code, rows, end, end + size)
        offsets[tensor], end = end, end + size
    text = json.dumps(header, ensure_ascii=False).encode()
    text = text.ljust(-(-(8 + len(text)) // 64) * 64 - 8)
    file.write(struct.pack("<Q", len(text)) + text)
    if labels is not None:
        file.write(np.ascontiguousarray(labels).data)

    def put(tensor: str, first: int, moments: Tensor) -> None:
        file.seek(8 + len(text) + offsets[tensor] + first * size // rows[0])
        file.write(np.ascontiguousarray(moments.cpu().numpy(), dtype).data)

    return put

"""Sets of latents: images that a VAE has encoded once, in one safetensors file that is mapped.

Tensors: `moments` float16 or float32 [N, 2 C, h, w], the posterior's mean, then its log-variance;
`moments_flip`, the same of the mirrored images, if wanted; `labels` as in packed sets.
Metadata: `format` = "tessera-latents", `version`, `name`, `class_names` (JSON list, if known),
`vae` (its name), `resolution` (of the images), `downsample`, `scale` and `shift`.

Neither samples nor scaled latents are stored: a fresh sample is drawn each time that an image is
trained on. float16 is enough: its rounding, once scaled, is a tenth of that of the 8-bit pixels.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.data.dataset import choose_subset, count_classes
from tessera.data.packed import LATENTS_FORMAT, read_header
from tessera.errors import DataError
from tessera.files import user_path
from tessera.progress import progress

VERSION = "1"


@dataclass(frozen=True)
class LatentInfo:
    """What a set of latents was made from and how.

    Attributes:
        vae: name of the autoencoder.
        resolution: side of the images, pixels.
        downsample: side of the images / side of the latents.
        scale, shift: a model's latents are (z - shift) * scale.
    """

    vae: str
    resolution: int
    downsample: int
    scale: float
    shift: float


class LatentDataset:
    """N latents with their labels, memory-mapped.

    Attributes:
        name: base name of the file.
        shape: (C, h, w) of the latents.
        info: how the set was made.
        flips: the mirrored images have been encoded, too.
        labels, class_names, num_classes: as of an `ImageDataset`.
    """

    kind = "latents"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_images: int | None = None,
        seed: int = 0,
        xflip: bool = False,
    ) -> None:
        """Open a set that `write_latents` has made.

        Args:
            max_images: keep a random subset of this size.
            seed: chooses the subset.
            xflip: double the set; its second half is that of the mirrored images.

        Raises:
            DataError: no such set, damaged, or without mirrored images.
        """
        path = user_path(path)
        try:
            header = read_header(path)
            metadata = header.metadata
            if metadata.get("format") != LATENTS_FORMAT or metadata.get("version") != VERSION:
                raise DataError(f"{path} is no set of latents of version {VERSION}. {_HOW_TO_MAKE}")
            moments = header.map("moments")
            self.flips = "moments_flip" in header.entries
            mirrored = header.map("moments_flip") if self.flips else None
            labels, self.class_names = header.labels(), header.class_names()
            self.info = _info(metadata)
            _check_moments(moments, mirrored, labels)
            count, width, *sides = moments.shape
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        except ValueError as error:
            raise DataError(
                f"{path}: not a whole set of latents ({error}). {_HOW_TO_MAKE}"
            ) from error
        if xflip and mirrored is None:
            raise DataError(
                f"{path} has no latents of mirrored images, which data.xflip asks for. Make the "
                "set with: tessera data latents --xflip"
            )
        self.name = path.stem
        self.shape: tuple[int, int, int] = (width // 2, *sides)
        self.num_classes = count_classes(labels, self.class_names)
        raw = choose_subset(count, max_images, seed)
        self.raw_indices = np.concatenate([raw, raw]) if xflip else raw
        self.labels = None if labels is None else labels[self.raw_indices]
        self._mirrored_from = len(raw)
        self._moments, self._mirrored = moments, mirrored
        self._shrink = 1

    def __len__(self) -> int:
        return len(self.raw_indices)

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Means and log-variances [n, 2 C, h, w], a fresh array. Safe to call from threads."""
        raw = self.raw_indices[indices]
        moments = np.asarray(self._moments[raw])
        mirrored = np.asarray(indices) >= self._mirrored_from
        if self._mirrored is not None and mirrored.any():
            moments[mirrored] = self._mirrored[raw[mirrored]]
        return moments if self._shrink == 1 else _pooled(moments, self._shrink)

    def shrunk(self, factor: int) -> LatentDataset:
        """The same with means of blocks of latents, from which later stages of a relay start.

        Args:
            factor: side of a block.

        Raises:
            DataError: the blocks do not fill the latents.
        """
        channels, height, width = self.shape
        if height % factor or width % factor:
            raise DataError(
                f"{self.name}: its latents of {height}x{width} have no whole number of blocks of "
                f"{factor}x{factor}"
            )
        made = copy.copy(self)
        made._shrink = self._shrink * factor
        made.shape = channels, height // factor, width // factor
        made.info = replace(self.info, resolution=self.info.resolution // factor)
        return made

    def close(self) -> None:
        """The map goes with the object."""


def _pooled(moments: NDArray[Any], factor: int) -> NDArray[np.float32]:
    """The posterior of means of blocks: their numbers are independent given the image."""
    count, width, height, columns = moments.shape
    blocks = moments.astype(np.float32).reshape(
        count, width, height // factor, factor, columns // factor, factor
    )
    mean, log_variance = np.split(blocks, 2, axis=1)
    variance = np.exp(log_variance.clip(-30, 20)).mean((3, 5)) / factor**2
    return np.concatenate([mean.mean((3, 5)), np.log(variance)], axis=1)


def _info(metadata: Mapping[str, str]) -> LatentInfo:
    """How a set was made. Raises ValueError where its metadata do not say it."""
    names = ("vae", "resolution", "downsample", "scale", "shift")
    missing = [name for name in names if name not in metadata]
    if missing:
        raise ValueError(f"it does not say its {', '.join(missing)}")
    info = LatentInfo(
        metadata["vae"],
        int(metadata["resolution"]),
        int(metadata["downsample"]),
        float(metadata["scale"]),
        float(metadata["shift"]),
    )
    positive = 0 < info.resolution < 2**31 and 0 < info.downsample < 2**31
    if not (positive and math.isfinite(info.scale) and math.isfinite(info.shift)):
        raise ValueError("its metadata are no sizes and scales")
    return info


def _check_moments(
    moments: NDArray[Any], mirrored: NDArray[Any] | None, labels: NDArray[Any] | None
) -> None:
    """Raise ValueError for tensors that do not belong together."""
    if moments.ndim != 4 or moments.shape[1] % 2 or 0 in moments.shape:
        raise ValueError(f"moments of shape {moments.shape}")
    if moments.dtype.kind != "f":
        raise ValueError(f"moments that are {moments.dtype}")
    if mirrored is not None and (mirrored.shape, mirrored.dtype) != (moments.shape, moments.dtype):
        raise ValueError(f"mirrored moments of shape {mirrored.shape}, others of {moments.shape}")
    if labels is not None and len(labels) != len(moments):
        raise ValueError(f"{len(moments)} latents but {len(labels)} labels")


_HOW_TO_MAKE = "`tessera data latents IMAGES LATENTS.safetensors --vae MODEL` makes one"


def is_latents(path: str | os.PathLike[str]) -> bool:
    """Whether the file at `path` says that it is a set of latents."""
    path = user_path(path)
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return False
    try:
        return read_header(path).metadata.get("format") == LATENTS_FORMAT
    except (OSError, ValueError, DataError):
        return False


def open_latents(
    path: str | os.PathLike[str],
    *,
    max_images: int | None = None,
    seed: int = 0,
    xflip: bool = False,
) -> LatentDataset:
    """Open a set of latents, see `LatentDataset`.

    Raises:
        DataError: there is none at `path`; images are told apart.
    """
    path = user_path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if not is_latents(path):
        raise DataError(
            f"{path} is no set of latents, which codec.kind=vae trains on. {_HOW_TO_MAKE}"
        )
    return LatentDataset(path, max_images=max_images, seed=seed, xflip=xflip)


def channel_statistics(
    dataset: LatentDataset, batch: int = 1024
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each channel of a model's latents, over images and places."""
    channels = dataset.shape[0]
    total, squares = np.zeros(channels), np.zeros(channels)
    with progress("reading latents", len(dataset), unit="images") as bar:
        for start in range(0, len(dataset), batch):
            rows = dataset.read(np.arange(start, min(start + batch, len(dataset))))
            mean, log_variance = np.split(rows.astype(np.float64), 2, axis=1)
            mean -= dataset.info.shift
            total += mean.sum(axis=(0, 2, 3))
            squares += (mean**2 + np.exp(log_variance)).sum(axis=(0, 2, 3))
            bar.advance(len(rows))
    count = len(dataset) * math.prod(dataset.shape[1:])
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return dataset.info.scale * mean, dataset.info.scale * std

"""Sets of latents: images that a VAE has encoded once, in any of the `latent_formats`."""

from __future__ import annotations

import copy
import math
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.data.dataset import choose_subset, count_classes
from tessera.data.latent_formats.base import LatentFormat
from tessera.data.latent_formats.registry import find_format
from tessera.errors import DataError
from tessera.files import user_path
from tessera.progress import progress


class LatentDataset:
    """N latents with their labels.

    Attributes:
        name: base name of the file or folder.
        form: name of the format.
        shape: (C, h, w) of the latents.
        drawn: rows are samples in model space, [C, h, w], not means and log-variances.
        info: how the set was made, as far as it says it.
        flips: the mirrored images have been encoded, too.
        precision: of the numbers.
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
        """Open a set.

        Args:
            max_images: keep a random subset of this size.
            seed: chooses the subset.
            xflip: double the set; its second half is that of the mirrored images.

        Raises:
            DataError: no such set, damaged, or without mirrored images.
        """
        path = user_path(path)
        form = latent_format(path)
        self._reader = reader = form.open(path)
        if xflip and reader.mirrored == "none":
            raise DataError(
                f"{path} has no latents of mirrored images, which data.xflip asks for. Make the "
                "set with: tessera data latents --xflip"
            )
        if xflip and reader.mirrored == "flipped":
            warnings.warn(
                f"{path} holds no latents of mirrored images: data.xflip mirrors the latents "
                "themselves, as the released code does, which are nearly those of them",
                stacklevel=2,
            )
        self.name, self.form, self.info = path.stem, form.name, reader.info
        self.shape, self.drawn, self.precision = reader.shape, reader.drawn, reader.precision
        self.flips, self.class_names = reader.mirrored == "encoded", reader.class_names
        self.num_classes = count_classes(reader.labels, self.class_names)
        raw = choose_subset(reader.count, max_images, seed)
        self.raw_indices = np.concatenate([raw, raw]) if xflip else raw
        self.labels = None if reader.labels is None else reader.labels[self.raw_indices]
        self._mirrored_from = len(raw)
        self._shrink = 1

    def __len__(self) -> int:
        return len(self.raw_indices)

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Means and log-variances [n, 2 C, h, w], or samples [n, C, h, w]; a fresh array.

        Safe to call from threads.

        Raises:
            DataError: a file is damaged; the message names it.
        """
        indices = np.asarray(indices)
        rows = self._reader.read(self.raw_indices[indices], indices >= self._mirrored_from)
        if self._shrink == 1:
            return rows
        return (_block_means if self.drawn else _pooled)(rows, self._shrink)

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
        if self.info.resolution is not None:
            made.info = replace(self.info, resolution=self.info.resolution // factor)
        return made

    def close(self) -> None:
        """Close the files behind the set."""
        self._reader.close()


def _pooled(moments: NDArray[Any], factor: int) -> NDArray[np.float32]:
    """The posterior of means of blocks: their numbers are independent given the image."""
    mean, log_variance = np.split(moments.astype(np.float32), 2, axis=1)
    variance = _block_means(np.exp(log_variance.clip(-np.inf, 20)), factor) / factor**2
    with np.errstate(divide="ignore"):  # of samples, which have no variance
        return np.concatenate([_block_means(mean, factor), np.log(variance)], axis=1)


def _block_means(values: NDArray[Any], factor: int) -> NDArray[np.float32]:
    """[n, C, h, w] to [n, C, h / factor, w / factor]."""
    count, width, height, columns = values.shape
    blocks = values.reshape(count, width, height // factor, factor, columns // factor, factor)
    means: NDArray[np.float32] = blocks.mean((3, 5), dtype=np.float32)
    return means


_HOW_TO_MAKE = "`tessera data latents IMAGES LATENTS.safetensors --vae MODEL` makes one"


def is_latents(path: str | os.PathLike[str]) -> bool:
    """Whether what is at `path` is a set of latents of some format."""
    return find_format(user_path(path)) is not None


def latent_format(path: Path) -> LatentFormat:
    """The format of the set of latents at `path`.

    Raises:
        DataError: there is none.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    form = find_format(path)
    if form is None:
        raise DataError(
            f"{path} is no set of latents, which codec.kind=vae trains on. {_HOW_TO_MAKE}"
        )
    return form


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
    return LatentDataset(path, max_images=max_images, seed=seed, xflip=xflip)


def channel_statistics(
    dataset: LatentDataset, batch: int = 1024
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each channel of a model's latents, over images and places.

    Unscaled where the set does not say its scale.
    """
    channels = dataset.shape[0]
    scale = 1.0 if dataset.drawn else dataset.info.scale or 1.0
    shift = 0.0 if dataset.drawn else dataset.info.shift or 0.0
    total, squares = np.zeros(channels), np.zeros(channels)
    with progress("reading latents", len(dataset), unit="images") as bar:
        for start in range(0, len(dataset), batch):
            rows = dataset.read(np.arange(start, min(start + batch, len(dataset))))
            mean = rows[:, :channels].astype(np.float64)
            mean -= shift
            total += mean.sum(axis=(0, 2, 3))
            squares += (mean**2).sum(axis=(0, 2, 3))
            if not dataset.drawn:
                squares += np.exp(rows[:, channels:].astype(np.float64)).sum(axis=(0, 2, 3))
            bar.advance(len(rows))
    count = len(dataset) * math.prod(dataset.shape[1:])
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return scale * mean, scale * std

"""What is in a set: figures for a table, and a grid of samples to look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.data.dataset import ImageDataset
from tessera.images import grid, labelled_grid
from tessera.progress import progress
from tessera.randomness import numpy_generator

_BATCH = 256
_ROWS = 20


@dataclass(frozen=True)
class ClassCount:
    """One class of a set."""

    index: int
    name: str | None
    count: int


@dataclass(frozen=True)
class Summary:
    """Figures of a set.

    Attributes:
        count: images.
        shape: (C, H, W).
        mean: of each channel, 0..255.
        std: of each channel over all pixels, 0..255.
        classes: the classes that occur, by index; empty without class labels.
        num_classes: classes that a model of this set needs.
        label_vectors: length of the label vectors, 0 if there are none.
        bytes: size on disk.
    """

    count: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[ClassCount, ...]
    num_classes: int
    label_vectors: int
    bytes: int


def summarise(dataset: ImageDataset, path: Path) -> Summary:
    """Read every image once and count.

    Raises:
        DataError: an image cannot be read.
    """
    channels = dataset.shape[0]
    # Exact: sums of a histogram of each channel's 256 levels.
    levels = np.zeros((channels, 256), np.int64)
    with progress("reading images", len(dataset), unit="images") as bar:
        for start in range(0, len(dataset), _BATCH):
            images = dataset.read(np.arange(start, min(start + _BATCH, len(dataset))))
            for channel in range(channels):
                levels[channel] += np.bincount(images[:, channel].ravel(), minlength=256)
            bar.advance(len(images))
    mean, std = level_moments(levels)
    vectors = dataset.labels is not None and dataset.labels.ndim == 2
    return Summary(
        count=len(dataset),
        shape=dataset.shape,
        mean=mean,
        std=std,
        classes=_classes(dataset),
        num_classes=0 if vectors else dataset.num_classes,
        label_vectors=dataset.num_classes if vectors else 0,
        bytes=bytes_on_disk(path),
    )


def level_moments(
    levels: NDArray[np.int64],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, from how often each of its 256 levels occurs.

    Args:
        levels: [C, 256].
    """
    values = np.arange(256, dtype=np.float64)
    share = levels / levels.sum(axis=1, keepdims=True)
    mean = share @ values
    std = np.sqrt(np.maximum(share @ values**2 - mean**2, 0))
    return tuple(mean.tolist()), tuple(std.tolist())


def sample_grid(
    dataset: ImageDataset, columns: int = 10, *, rows: int | None = None, seed: int = 0
) -> NDArray[np.uint8]:
    """A picture [H, W, 3] of random images; one labelled row a class if there are labels.

    Args:
        columns: images in a row.
        rows: rows at most; by default 20 classes, or as many rows as columns without labels.
        seed: chooses the images.
    """
    generator = numpy_generator(seed, "inspect")
    classes = _classes(dataset)[: rows or _ROWS]
    if not classes:
        count = min(len(dataset), columns * (rows or columns))
        chosen = np.sort(generator.permutation(len(dataset))[:count])
        return _rgb(grid(_channels_last(dataset.read(chosen)), columns))
    assert dataset.labels is not None
    lines: list[NDArray[np.uint8]] = []
    for entry in classes:
        members = np.flatnonzero(dataset.labels == entry.index)
        chosen = np.sort(generator.permutation(members)[:columns])
        images = np.full((columns, *dataset.shape), 255, np.uint8)
        images[: len(chosen)] = dataset.read(chosen)
        lines.append(grid(_channels_last(images), columns))
    names = [str(c.index) if c.name is None else c.name for c in classes]
    return labelled_grid([[line] for line in lines], names)


def _classes(dataset: ImageDataset) -> tuple[ClassCount, ...]:
    return count_labels(dataset.labels, dataset.class_names)


def count_labels(
    labels: NDArray[Any] | None, class_names: tuple[str, ...] | None
) -> tuple[ClassCount, ...]:
    """The classes that occur, by index; none without class labels."""
    if labels is None or labels.ndim == 2:
        return ()
    names = class_names or ()
    indices, counts = np.unique(labels, return_counts=True)
    return tuple(
        ClassCount(index, names[index] if index < len(names) else None, count)
        for index, count in zip(indices.tolist(), counts.tolist(), strict=True)
    )


def _channels_last(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return images.transpose(0, 2, 3, 1)


def _rgb(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return picture if picture.shape[2] == 3 else picture.repeat(3, axis=2)


def bytes_on_disk(path: Path) -> int:
    """Of a file, or of all files below a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size

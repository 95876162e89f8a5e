"""Some of the images of a set in model space, read once, batch by batch."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tessera.data.dataset import choose_subset
from tessera.data.decode import channels_first, shape_text
from tessera.data.latents import LatentDataset, is_latents, open_latents
from tessera.data.parallel import cores, ordered_map
from tessera.data.sources import open_source
from tessera.data.sources.base import Record
from tessera.data.transforms import apply_transform
from tessera.errors import DataError
from tessera.files import user_path
from tessera.images import from_uint8
from tessera.progress import progress
from tessera.randomness import derive_seed, numpy_generator

LARGEST_EXACT = 32 * 32
"""Pixels of an image whose covariance is kept whole."""

_BATCH = 512
_CHUNK = 32  # images that a thread reads at a time
_MANY, _NUMBERS = 20_000, 2**26  # images of small pictures; numbers read of larger ones
_SOME = (256, 4096)  # images of larger ones, at least and at most


@dataclass(frozen=True)
class Reading:
    """How the images of a set are brought to what is trained on.

    Attributes:
        images: how many are looked at, chosen at random; None: as many as take half a minute.
        seed: chooses them.
        resolution: side that images of any size are cropped and resized to; None: as they are.
        shrink: side of the blocks of pixels or latents whose means are trained on.
        scale, shift: of latents, (z - shift) * scale; None: what their set says, and if it says
            nothing, such that their standard deviation is 1.
    """

    images: int | None = None
    seed: int = 0
    resolution: int | None = None
    shrink: int = 1
    scale: float | None = None
    shift: float | None = None


@dataclass
class ImageSample:
    """Images that are read while they are counted.

    Attributes:
        name: of the set.
        shape: (C, H, W) in model space.
        total: images of the set.
        chosen: images that are looked at.
        of_pixels: values are those of pixels, -1 to 1; otherwise latents.
        scaled: values are in model space; otherwise latents that do not say their scale.
        batches: float32 [n, C, H, W], once.
        skipped: messages about images that cannot be used, complete once all are read.
    """

    name: str
    shape: tuple[int, int, int]
    total: int
    chosen: int
    of_pixels: bool
    scaled: bool
    batches: Iterator[Tensor]
    skipped: list[str] = field(default_factory=list)


@contextlib.contextmanager
def open_sample(
    path: str | os.PathLike[str], reading: Reading = Reading()
) -> Iterator[ImageSample]:
    """Open whatever collection of images or latents is at `path`.

    Raises:
        DataError: nothing there, of no known kind, or images of several sizes without a resolution.

    Example:
        >>> with open_sample("cifar10.zip", Reading(images=1000)) as sample:  # doctest: +SKIP
        ...     count = sum(len(batch) for batch in sample.batches)
    """
    path = user_path(path)
    if reading.shrink < 1 or (reading.images is not None and reading.images < 2):
        raise DataError("`images` must be at least 2, and shrink at least 1")
    opened = _latents if path.exists() and is_latents(path) else _images
    with opened(path, reading) as sample:
        yield sample


def _wanted(shape: tuple[int, int, int], reading: Reading) -> int:
    """How many images are looked at."""
    if reading.images is not None:
        return reading.images
    channels, height, width = shape
    if height * width <= LARGEST_EXACT * reading.shrink**2:
        return _MANY
    return min(max(_NUMBERS // (channels * height * width), _SOME[0]), _SOME[1])


def _shrunk(shape: tuple[int, int, int], factor: int, name: str) -> tuple[int, int, int]:
    channels, height, width = shape
    if height % factor or width % factor:
        raise DataError(f"{name}: {height}x{width} has no whole blocks of {factor}x{factor}")
    return channels, height // factor, width // factor


# ------------------------------------------------------------------------------------------ images


@contextlib.contextmanager
def _images(path: Path, reading: Reading) -> Iterator[ImageSample]:
    with open_source(path) as source:
        if not source.count:
            raise DataError(f"{path}: no images in it")
        records = iter(source.records)
        skipped: list[str] = []
        at, first = _first(records, reading, skipped, str(path))
        shape = first.shape
        count = min(_wanted(shape, reading), source.count)
        wanted = set(choose_subset(source.count, count, derive_seed(reading.seed, "plan")).tolist())
        rest = (record for index, record in enumerate(records, at + 1) if index in wanted)
        load = _loader(reading, shape)
        head: list[list[NDArray[np.uint8] | str]] = [[first]] if at in wanted else []
        chunks = _chunks(rest)
        loaded = ordered_map(lambda chunk: [*map(load, chunk)], chunks, cores(), cores() + 2)
        bars = progress(f"reading {source.name}", count, unit="images")
        with contextlib.closing(loaded), bars as bar:
            every: Iterator[list[NDArray[np.uint8] | str]] = itertools.chain(head, loaded)
            batches = _batched(itertools.chain.from_iterable(every), skipped, bar.advance)
            small = _shrunk(shape, reading.shrink, source.name)
            yield ImageSample(
                source.name, small, source.count, count, True, True,
                _pooled((from_uint8(torch.from_numpy(batch)) for batch in batches), reading),
                skipped,
            )  # fmt: skip


def _first(
    records: Iterator[Record], reading: Reading, skipped: list[str], where: str
) -> tuple[int, NDArray[np.uint8]]:
    """Number and pixels of the first image that can be used, which sets the shape."""
    load = _loader(reading, None)
    for index, record in enumerate(records):
        image = load(record)
        if not isinstance(image, str):
            return index, image
        skipped.append(image)
    raise DataError("\n  ".join([f"{where}: no image in it can be used", *skipped[:5]]))


def _loader(
    reading: Reading, shape: tuple[int, ...] | None
) -> Callable[[Record], NDArray[np.uint8] | str]:
    """Reads an image as uint8 [C, H, W] of a shape, or says why it cannot be used."""
    size = None if reading.resolution is None else (reading.resolution, reading.resolution)

    def load(record: Record) -> NDArray[np.uint8] | str:
        try:
            image = record.load()
            grey = image.ndim == 2
            if size is not None:
                cut = apply_transform(image, "center-crop", size)
                image = image if cut is None else cut
            pixels = channels_first(image)
        except DataError as error:
            text = str(error)
            return text if record.name in text else f"{record.name}: {text}"
        if shape is None:
            return pixels[:1] if grey else pixels
        if grey:
            pixels = np.broadcast_to(pixels[:1], (shape[0], *pixels.shape[1:]))
        if pixels.shape == shape:
            return pixels
        if pixels.shape[1:] != shape[1:]:
            raise DataError(
                f"{record.name} is {shape_text(pixels.shape)}, but the first image is "
                f"{shape_text(shape)}; `resolution` brings all images to one size"
            )
        return f"{record.name}: {shape_text(pixels.shape)}, unlike the first image"

    return load


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    while chunk := list(itertools.islice(records, _CHUNK)):
        yield chunk


def _batched(
    loaded: Iterator[NDArray[np.uint8] | str],
    skipped: list[str],
    advance: Callable[[float], object],
) -> Iterator[NDArray[np.uint8]]:
    while chunk := list(itertools.islice(loaded, _BATCH)):
        skipped += [item for item in chunk if isinstance(item, str)]
        images = [item for item in chunk if not isinstance(item, str)]
        if images:
            yield np.stack(images)
        advance(len(chunk))


def _pooled(batches: Iterator[Tensor], reading: Reading) -> Iterator[Tensor]:
    if reading.shrink == 1:
        return batches
    return (F.avg_pool2d(batch, reading.shrink) for batch in batches)


# ----------------------------------------------------------------------------------------- latents


@contextlib.contextmanager
def _latents(path: Path, reading: Reading) -> Iterator[ImageSample]:
    if reading.resolution is not None:
        raise DataError(f"{path} holds latents, which have their size: leave out `resolution`")
    with contextlib.closing(open_latents(path)) as dataset:
        total = len(dataset)
        count = min(_wanted(dataset.shape, reading), total)
        rows = choose_subset(total, count, derive_seed(reading.seed, "plan"))
        scale, shift = reading.scale, reading.shift
        if dataset.drawn:  # in model space already
            scale, shift = 1.0, 0.0
        scale = dataset.info.scale if scale is None else scale
        shift = dataset.info.shift if shift is None else shift
        # Whatever the scale, it is one for all channels: what has none is brought to 1 later.
        values = _drawn(dataset, rows, 1.0 if scale is None else scale, shift or 0.0, reading.seed)
        shape = _shrunk(dataset.shape, reading.shrink, dataset.name)
        batches = _pooled(values, reading)
        yield ImageSample(dataset.name, shape, total, count, False, scale is not None, batches)


def _drawn(
    dataset: LatentDataset, rows: NDArray[np.int64], scale: float, shift: float, seed: int
) -> Iterator[Tensor]:
    """Samples of the posteriors of latents, as a model is trained on them."""
    channels = dataset.shape[0]
    with progress(f"reading {dataset.name}", len(rows), unit="images") as bar:
        for start in range(0, len(rows), _BATCH):
            part = rows[start : start + _BATCH]
            moments = dataset.read(part).astype(np.float32)
            values = moments[:, :channels]
            if moments.shape[1] > channels:
                noise = numpy_generator(seed, "plan", "latent", start).standard_normal(
                    values.shape, np.float32
                )
                spread = np.exp(0.5 * np.minimum(moments[:, channels:], 20))
                values = (values + spread * noise).astype(np.float32)
            yield torch.from_numpy((values - shift) * scale)
            bar.advance(len(part))

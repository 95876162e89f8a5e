"""What is in a collection that is not converted yet: sizes, channels, classes, and samples."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tessera.data.dataset import choose_subset
from tessera.data.inspect import ClassCount, level_moments
from tessera.data.parallel import cores, ordered_map
from tessera.data.sources import Options, Record, open_source
from tessera.data.transforms import apply_transform
from tessera.errors import DataError
from tessera.images import grid, labelled_grid, visible
from tessera.progress import progress
from tessera.randomness import numpy_generator

_SIDE = 64  # of a sample in the picture
_ROWS = 20


@dataclass(frozen=True)
class Survey:
    """Figures of a collection, whose images may have any sizes.

    Attributes:
        kind: in words.
        name: of the collection.
        sizes: (width, height) of the images, and how often each occurs, small to large.
        channels: numbers of channels, and how often each occurs.
        mean, std: of each channel over all pixels, 0..255; () if images differ in their channels.
        classes: those that occur, by index; empty without class labels.
        unlabelled: images without a class, where others have one.
        label_vectors: length of the label vectors, 0 if there are none.
        skipped: messages about images that cannot be used.
        ignored: names of files that are not images.
        picture: uint8 [H, W, 3], random samples, cut to squares; a row a class if there are some.
    """

    kind: str
    name: str
    sizes: tuple[tuple[tuple[int, int], int], ...]
    channels: tuple[tuple[int, int], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[ClassCount, ...]
    unlabelled: int
    label_vectors: int
    skipped: tuple[str, ...]
    ignored: tuple[str, ...]
    picture: NDArray[np.uint8]

    @property
    def count(self) -> int:
        """Images that can be used."""
        return sum(number for _, number in self.sizes)


@dataclass
class _Samples:
    """The images of lowest rank, of each class or of all."""

    columns: int
    ranks: dict[int, list[int]] = field(default_factory=dict)
    images: dict[int, NDArray[np.uint8]] = field(default_factory=dict)

    def offer(self, label: int, rank: int, image: NDArray[np.uint8]) -> None:
        ranks = self.ranks.setdefault(label, [])
        most = self.columns if label >= 0 else self.columns**2
        if len(ranks) == most and rank > ranks[-1]:
            return
        bisect.insort(ranks, rank)
        square = apply_transform(visible(image), "center-crop", (_SIDE, _SIDE))
        assert square is not None  # only center-crop-wide leaves pictures out
        self.images[rank] = square
        for last in ranks[most:]:
            del self.images[last]
        del ranks[most:]
        if sum(number >= 0 for number in self.ranks) > _ROWS:  # only the first classes are shown
            for last in self.ranks.pop(max(self.ranks)):
                del self.images[last]

    def picture(self, names: tuple[str, ...] | None) -> NDArray[np.uint8]:
        labels = sorted(label for label in self.ranks if label >= 0)
        if not labels:
            return grid(np.stack([self.images[rank] for rank in self.ranks[-1]]), self.columns)
        lines = []
        for label in labels:
            tiles = np.full((self.columns, _SIDE, _SIDE, 3), 255, np.uint8)
            for tile, rank in zip(tiles, self.ranks[label], strict=False):
                tile[:] = self.images[rank]
            lines.append([grid(tiles, self.columns)])
        return labelled_grid(lines, [_name(label, names) or str(label) for label in labels])


def survey(
    path: Path,
    options: Options | None = None,
    *,
    columns: int = 10,
    max_images: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
) -> Survey:
    """Decode every image of a collection once, and count; nothing is converted.

    Args:
        path: of any kind that `data.sources.open_source` reads.
        options: which column, split and so on.
        columns: samples in a row of the picture.
        max_images: look at a random subset of this size.
        seed: chooses the subset and the samples.
        skip_bad: leave out images that cannot be read; otherwise they are an error.

    Raises:
        DataError: there is no image, one cannot be read, or the options do not fit.
    """
    sizes: Counter[tuple[int, int]] = Counter()
    labels: Counter[int | None] = Counter()
    levels: dict[int, NDArray[np.int64]] = {}
    counts: Counter[int] = Counter()
    samples, skipped, vectors = _Samples(columns), list[str](), 0
    with open_source(path, options) as source:
        chosen = choose_subset(source.count, max_images, seed)
        ranks = numpy_generator(seed, "inspect").permutation(source.count)
        wanted = set(chosen.tolist())

        def records() -> Iterator[tuple[int, Record]]:
            return (pair for pair in enumerate(source.records) if pair[0] in wanted)

        with progress("reading images", len(wanted), unit="images") as bar:
            workers = cores()
            for index, record, image in ordered_map(_load, records(), workers, 4 * workers):
                bar.advance()
                if isinstance(image, DataError):
                    if not skip_bad:
                        raise image
                    skipped.append(str(image))
                    continue
                planes = image.reshape(*image.shape[:2], -1)
                sizes[image.shape[1], image.shape[0]] += 1
                count = planes.shape[2]
                counts[count] += 1
                _count_levels(levels.setdefault(count, np.zeros((count, 256), np.int64)), planes)
                label = record.label
                if isinstance(label, list):
                    vectors = len(label)
                    label = None
                labels[label] += 1
                samples.offer(-1 if label is None else label, int(ranks[index]), image)
        kind, name, names, ignored = source.kind, source.name, source.class_names, source.ignored
    if not sizes:
        raise DataError("\n  ".join([f"{path}: there is no image in it", *skipped[:5]]))
    # Of different channels there is no mean.
    mean, std = level_moments(*levels.values()) if len(levels) == 1 else ((), ())
    classes = sorted((label, number) for label, number in labels.items() if label is not None)
    return Survey(
        kind,
        name,
        tuple(sorted(sizes.items(), key=lambda pair: pair[0][0] * pair[0][1])),
        tuple(sorted(counts.items())),
        mean,
        std,
        tuple(ClassCount(label, _name(label, names), number) for label, number in classes),
        labels[None] if classes else 0,
        vectors,
        tuple(skipped),
        tuple(ignored),
        samples.picture(names),
    )


def _load(pair: tuple[int, Record]) -> tuple[int, Record, NDArray[np.uint8] | DataError]:
    index, record = pair
    try:
        return index, record, record.load()
    except DataError as error:
        return index, record, error


def _count_levels(levels: NDArray[np.int64], planes: NDArray[np.uint8]) -> None:
    for channel, row in enumerate(levels):
        row += np.bincount(planes[:, :, channel].ravel(), minlength=256)


def _name(label: int, names: tuple[str, ...] | None) -> str | None:
    return names[label] if names and label < len(names) else None

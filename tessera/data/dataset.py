"""Image sets for training and scoring: EDM archives, packed sets and plain folders."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tessera.data.decode import channels_first, decode_image, is_image, shape_text
from tessera.data.labels import Labels, find_labels, label_array, stray_text
from tessera.data.members import Members, open_members
from tessera.data.packed import PackedFile
from tessera.data.parallel import cores, ordered_map
from tessera.data.sources import find_kind, is_foreign
from tessera.errors import DataError
from tessera.files import user_path
from tessera.progress import progress


class ImageReader(Protocol):
    """Pixels of numbered images."""

    shape: tuple[int, int, int]

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """A fresh array [n, C, H, W]."""
        ...

    def close(self) -> None:
        """Release the open files."""
        ...


class Dataset(Protocol):
    """N numbered images, or what a codec trains on in their place, with their labels.

    Attributes:
        name: for people.
        shape: of what is read; (C, H, W).
        labels: int64 [N] class indices, float32 [N, K] label vectors, or None.
        class_names: names of the classes, or None if they are not known.
        num_classes: number of classes; 0 without labels.
    """

    name: str
    shape: tuple[int, int, int]
    labels: NDArray[Any] | None
    class_names: tuple[str, ...] | None
    num_classes: int

    def __len__(self) -> int: ...

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """A fresh array [n, ...]; uint8 [n, C, H, W] of images. Safe to call from threads."""
        ...

    def close(self) -> None:
        """Release the open files."""
        ...


class ImageDataset:
    """N images of one shape with their labels.

    Attributes:
        name: base name of the file or folder.
        kind: "zip", "folder" or "packed".
        shape: (C, H, W).
        labels: int64 [N] class indices, float32 [N, K] label vectors, or None.
        class_names: names of the classes, or None if they are not known.
        num_classes: number of classes in the whole set, also of a subset of it (length of the
            vectors for label vectors); 0 without labels.
        skipped: messages about the images that were left out (`skip_bad`).
    """

    def __init__(
        self,
        name: str,
        kind: str,
        reader: ImageReader,
        labels: NDArray[Any] | None,
        class_names: tuple[str, ...] | None,
        raw: NDArray[np.int64],
        xflip: bool,
        skipped: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.kind = kind
        self.shape = reader.shape
        self.class_names = class_names
        self.num_classes = count_classes(labels, class_names)
        self.skipped = tuple(skipped)
        self.raw_indices = np.concatenate([raw, raw]) if xflip else raw
        self.labels = None if labels is None else labels[self.raw_indices]
        self._mirrored_from = len(raw)
        self._reader = reader

    def __len__(self) -> int:
        return len(self.raw_indices)

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images [n, C, H, W] as a fresh uint8 array. Safe to call from several threads.

        Raises:
            DataError: an image is damaged or of another shape; the message names the file.
        """
        images = self._reader.read(self.raw_indices[indices])
        mirrored = np.asarray(indices) >= self._mirrored_from
        if mirrored.any():
            images[mirrored] = images[mirrored, :, :, ::-1]
        return images

    def close(self) -> None:
        """Close the files behind the set."""
        self._reader.close()


class ShrunkDataset:
    """Images that are smaller than those of another set: the means of blocks of pixels.

    Args:
        dataset: of uint8 images.
        factor: side of a block.

    Raises:
        DataError: the blocks do not fill the images.
    """

    def __init__(self, dataset: Dataset, factor: int) -> None:
        channels, height, width = dataset.shape
        if height % factor or width % factor:
            raise DataError(
                f"{dataset.name}: its images of {height}x{width} pixels have no whole number of "
                f"blocks of {factor}x{factor}"
            )
        self._dataset, self._factor = dataset, factor
        self.name, self.shape = dataset.name, (channels, height // factor, width // factor)
        self.labels, self.class_names = dataset.labels, dataset.class_names
        self.num_classes = dataset.num_classes

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images [n, C, H, W], rounded to uint8. Safe to call from several threads."""
        images, size = self._dataset.read(indices), self._factor
        blocks = images.reshape(*images.shape[:2], self.shape[1], size, self.shape[2], size)
        sums = blocks.sum((3, 5), dtype=np.uint32)
        rounded: NDArray[np.uint8] = ((sums + size**2 // 2) // size**2).astype(np.uint8)
        return rounded

    def close(self) -> None:
        """Close the files behind the set."""
        self._dataset.close()


class PartDataset:
    """Some of the images of another set.

    Args:
        dataset: of images or latents.
        rows: which of them, int64 [N].
    """

    def __init__(self, dataset: Dataset, rows: NDArray[np.int64]) -> None:
        self._dataset, self._rows = dataset, rows
        self.name, self.shape, self.kind = dataset.name, dataset.shape, getattr(dataset, "kind", "")
        self.labels = None if dataset.labels is None else dataset.labels[rows]
        self.class_names, self.num_classes = dataset.class_names, dataset.num_classes

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """What the other set reads, [n, ...]. Safe to call from several threads."""
        return self._dataset.read(self._rows[indices])

    def close(self) -> None:
        """Close the files behind the set."""
        self._dataset.close()


def open_dataset(
    path: str | os.PathLike[str],
    *,
    max_images: int | None = None,
    seed: int = 0,
    xflip: bool = False,
    cache: bool = False,
    skip_bad: bool = False,
    opaque: bool = False,
) -> ImageDataset:
    """Open an archive (`.zip`), a packed set (`.safetensors`) or a folder of images.

    Images are ordered by their names as plain strings. Labels come from `dataset.json`, without one
    from the top-level folders.

    Args:
        max_images: keep a random subset of this size, in the order of the whole set.
        seed: chooses the subset.
        xflip: double the set; its second half is the first half mirrored left-right.
        cache: keep decoded images in memory, N*C*H*W bytes once all have been read; a packed set
            needs none.
        skip_bad: decode every image now and leave out those that cannot be read or have another
            shape than the first; otherwise reading such an image is an error.
        opaque: make it an error to read an image with an alpha channel, which is dropped otherwise.

    Raises:
        DataError: nothing to read at `path`, or labels that do not fit.

    Examples:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> for name in ("cats/a.png", "dogs/b.png"):
        ...     Path("photos", name).parent.mkdir(parents=True)
        ...     Image.new("RGB", (64, 64)).save(Path("photos", name))
        >>> dataset = open_dataset("photos")
        >>> dataset.read(np.arange(2)).shape, dataset.labels.tolist(), dataset.class_names
        ((2, 3, 64, 64), [0, 1], ('cats', 'dogs'))
    """
    path = user_path(path)
    reader: ImageReader
    skipped: list[str] = []
    labels: NDArray[Any] | None
    if path.suffix.lower() == ".safetensors" and not path.is_dir():
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        packed = PackedFile(path)
        labels, class_names, kind = packed.labels, packed.class_names, "packed"
        reader, total = PackedReader(packed.images), len(packed.images)
    else:
        _refuse_foreign(path)
        members = open_members(path)
        kind = "folder" if path.is_dir() else "zip"
        every = [name for name in members.names if is_image(name)]
        found = find_labels(members, every)
        kept, strays = _without_strays(members, every, found, skip_bad)
        names, skipped = _readable(members, kept) if skip_bad else (kept, [])
        skipped = [*strays, *skipped]
        if not names:
            raise DataError(f"{path}: no images in it" + "".join(f"\n  {s}" for s in skipped[:5]))
        class_names = found.class_names if found is not None else None
        labels = None
        if found is not None:
            labels = label_array(found.of(every, names), names, str(path))
        reader, total = MemberReader(members, names, opaque), len(names)
    if total == 0:
        raise DataError(f"{path}: no images in it")
    raw = choose_subset(total, max_images, seed)
    if cache and kind != "packed":
        reader = CachedReader(reader, total)
    return ImageDataset(path.stem, kind, reader, labels, class_names, raw, xflip, skipped)


def _refuse_foreign(path: Path) -> None:
    """Raise for a collection that has to be converted first."""
    if is_foreign(path):
        raise DataError(
            f"{path}: neither a folder of images, a .zip archive nor a packed set. One can be made "
            f"of it ({find_kind(path).words}): tessera data convert {path} NAME.zip"
        )


def _without_strays(
    members: Members, every: list[str], found: Labels | None, skip: bool
) -> tuple[list[str], list[str]]:
    """The images that lie in the folders of the classes; messages about those beside them."""
    if found is None or not found.strays:
        return every, []
    messages = [stray_text(members.where(name)) for name in every if name in found.strays]
    if not skip:
        raise DataError(messages[0])
    return [name for name in every if name not in found.strays], messages


class PackedReader:
    """Images of a packed set: one gather from the memory map."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self._images = images
        self.shape: tuple[int, int, int] = images.shape[1:]

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """A fresh array [n, C, H, W]."""
        return np.asarray(self._images[indices])

    def close(self) -> None:
        """The map goes with the object."""


class MemberReader:
    """Images that are decoded each time they are read; the first one gives the shape."""

    def __init__(self, members: Members, names: Sequence[str], opaque: bool = False) -> None:
        self._members = members
        self._names = names
        self._opaque = opaque
        self.shape: tuple[int, int, int] = _decode(members, names[0], opaque).shape

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """A fresh array [n, C, H, W]."""
        images = np.empty((len(indices), *self.shape), np.uint8)
        for row, index in enumerate(indices):
            name = self._names[index]
            image = _decode(self._members, name, self._opaque)
            images[row] = _checked(image, self.shape, self._members, name)
        return images

    def close(self) -> None:
        """Close the archive."""
        self._members.close()


class CachedReader:
    """Keeps what another reader has decoded."""

    def __init__(self, reader: ImageReader, total: int) -> None:
        self._reader = reader
        self.shape = reader.shape
        # The system hands out pages when they are first written, so this costs nothing yet.
        self._images = np.empty((total, *reader.shape), np.uint8)
        self._filled = np.zeros(total, bool)
        self._lock = threading.Lock()

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """A fresh array [n, C, H, W]."""
        missing = np.unique(indices[~self._filled[indices]])
        if len(missing):
            images = self._reader.read(missing)
            with self._lock:  # pixels before flags, also as seen by other threads
                self._images[missing] = images
                self._filled[missing] = True
        return self._images[indices]

    def close(self) -> None:
        """Close the files behind the cache."""
        self._reader.close()


def _decode(members: Members, name: str, opaque: bool = False) -> NDArray[np.uint8]:
    return channels_first(decode_image(members.read(name), members.where(name), opaque=opaque))


def _checked(
    image: NDArray[np.uint8], shape: tuple[int, ...], members: Members, name: str
) -> NDArray[np.uint8]:
    if image.shape != shape:
        raise DataError(
            f"{members.where(name)} is {shape_text(image.shape)}, but the first image of the set "
            f"is {shape_text(shape)}; `tessera data convert` brings images to one shape"
        )
    return image


def _readable(members: Members, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of the images that fit to the first readable one; messages for the rest."""

    def examine(name: str) -> tuple[int, ...] | str:
        try:
            return _decode(members, name).shape
        except DataError as error:
            return str(error)

    kept: list[str] = []
    bad: list[str] = []
    shape: tuple[int, ...] | None = None
    workers = cores()
    with progress(f"checking {members.path.name}", len(names)) as bar:
        results = ordered_map(examine, names, workers, 8 * workers)
        for name, result in zip(names, results, strict=True):
            bar.advance()
            if isinstance(result, str):
                bad.append(result)
            elif shape is None or result == shape:
                shape = result
                kept.append(name)
            else:
                bad.append(f"{members.where(name)} is {shape_text(result)}")
    return kept, bad


def choose_subset(total: int, max_images: int | None, seed: int) -> NDArray[np.int64]:
    """Indices of a random subset, sorted; EDM's rule: the first of the legacy shuffle."""
    indices = np.arange(total, dtype=np.int64)
    if max_images is not None and max_images < total:
        np.random.RandomState(seed % (1 << 31)).shuffle(indices)
        indices = np.sort(indices[:max_images])
    return indices


def count_classes(labels: NDArray[Any] | None, class_names: tuple[str, ...] | None) -> int:
    """Classes that a model of these labels needs."""
    if labels is None:
        return 0
    if labels.ndim == 2:
        return int(labels.shape[1])
    return max(int(labels.max()) + 1, len(class_names or ()))

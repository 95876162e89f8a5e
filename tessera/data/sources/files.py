"""Folders and ZIP archives of images, and packed sets."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tessera.data.decode import is_image
from tessera.data.labels import LABELS_FILE, Label, find_labels, stray_text
from tessera.data.members import Members, ZipMembers, open_members
from tessera.data.packed import PackedFile
from tessera.data.sources.base import Kind, Options, Pixels, Record, Source
from tessera.errors import DataError


@contextlib.contextmanager
def _open_files(path: Path, options: Options) -> Iterator[Source]:
    members = open_members(path, options.max_file_bytes)
    try:
        yield _files(members, options)
    finally:
        members.close()


def _files(members: Members, options: Options) -> Source:
    images = [name for name in members.names if is_image(name)]
    if not isinstance(members, ZipMembers):
        images.sort(key=lambda name: name.split("/"))  # component-wise, like path objects
    ignored = tuple(n for n in members.names if n != LABELS_FILE and not is_image(n))
    labels = find_labels(members, images)

    strays = labels.strays if labels is not None else frozenset()

    def load(name: str) -> Pixels:
        if name in strays:
            raise DataError(stray_text(members.where(name)))
        return options.decode(members.read(name), members.where(name))

    values: list[Label] = labels.values if labels is not None else [None] * len(images)
    records = [
        Record(members.where(name), value, functools.partial(load, name))
        for name, value in zip(images, values, strict=True)
    ]
    kind = "ZIP of images" if isinstance(members, ZipMembers) else "image folder"
    names = labels.class_names if labels is not None else None
    return Source(kind, members.path.stem, len(records), records, names, ignored)


@contextlib.contextmanager
def _open_packed(path: Path, options: Options) -> Iterator[Source]:
    packed = PackedFile(path)

    def load(index: int) -> Pixels:
        image = np.array(packed.images[index])
        return image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))

    labels = [None] * len(packed.images) if packed.labels is None else packed.labels.tolist()
    records = [
        Record(f"image {index}", label, functools.partial(load, index))
        for index, label in enumerate(labels)
    ]
    yield Source("packed set", path.stem, len(records), records, packed.class_names)


FILES = Kind(
    "folders and .zip of images",
    lambda path: path.is_dir() or path.suffix.lower() == ".zip",
    _open_files,
)
PACKED = Kind(
    ".safetensors packed sets", lambda path: path.suffix.lower() == ".safetensors", _open_packed
)

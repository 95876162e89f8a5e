"""The files of MNIST and its relatives."""

from __future__ import annotations

import contextlib
import functools
import gzip
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tessera.data.labels import Label
from tessera.data.sources.base import Kind, Options, Pixels, Record, Source
from tessera.errors import DataError

_IDX_BYTES = 1024 * 2**20  # the largest of the extended MNIST sets has 610 MiB
_ENDINGS = ("-images-idx3-ubyte.gz", "-images-idx3-ubyte", "-images.idx3-ubyte")


@contextlib.contextmanager
def _open(path: Path, options: Options) -> Iterator[Source]:
    yield _idx(path)


def _idx(path: Path) -> Source:
    images = _read_idx(path, 3)
    labels_path = path.with_name(
        path.name.replace("-images-idx3", "-labels-idx1").replace("-images.idx3", "-labels.idx1")
    )
    labels: Sequence[Label] = [None] * len(images)
    class_names = None
    if labels_path.exists():
        indices = _read_idx(labels_path, 1).tolist()
        if len(indices) != len(images):
            raise DataError(f"{labels_path}: {len(indices)} labels for {len(images)} images")
        labels = indices
        class_names = tuple(str(i) for i in range(max(indices, default=-1) + 1)) or None
    if images.shape[1:] == (28, 28):
        images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    records = [
        Record(f"{path.name}[{i}]", label, functools.partial(np.array, images[i]))
        for i, label in enumerate(labels)
    ]
    return Source("MNIST files", path.name.split("-")[0], len(records), records, class_names)


def _read_idx(path: Path, axes: int) -> Pixels:
    """An IDX file of unsigned bytes: 2 zero bytes, type 8, number of axes, sizes, values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(4 + 4 * axes)
            if header[:4] != bytes([0, 0, 8, axes]):
                raise DataError(f"{path}: not an IDX file of bytes with {axes} axes")
            shape = struct.unpack_from(f">{axes}I", header, 4)
            size = math.prod(shape)
            if size > _IDX_BYTES or 0 in shape[1:]:
                raise DataError(f"{path}: it says that it holds {shape} bytes, which is no set")
            # No more than it should be, and one byte to see that it is not.
            data = file.read(size + 1)
        return np.frombuffer(data, np.uint8).reshape(shape)
    except (OSError, EOFError, struct.error, ValueError, zlib.error) as error:
        raise DataError(f"{path}: not a whole IDX file ({error})") from error


IDX = Kind(
    "*-images-idx3-ubyte.gz (MNIST)", lambda path: path.name.lower().endswith(_ENDINGS), _open
)

"""The packed format: decoded images in one safetensors file, read through a memory map.

Tensors: `images` uint8 [N, C, H, W]; `labels` int64 [N] or float32 [N, K], absent if unlabelled.
A tensor `padding` of up to 7 zeros keeps the labels aligned where the images' size needs it.
Metadata: `format` = "tessera-packed", `version`, `name`, and, if known, `class_names` (JSON list).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from tessera.channels import MAX_CHANNELS
from tessera.data.labels import is_names
from tessera.errors import DataError
from tessera.plain import MIB, parse_json

FORMAT = "tessera-packed"
LATENTS_FORMAT = "tessera-latents"
"""Of the sets that `tessera.data.latents` reads."""
VERSION = "1"
DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "I64": np.dtype("<i8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
}


class PackedWriter:
    """Streams images into an open file; `finish` writes the header in the space kept for it.

    Args:
        file: a writable, seekable binary file.
        shape: (C, H, W) of every image.
    """

    def __init__(
        self,
        file: IO[bytes],
        shape: tuple[int, int, int],
        name: str,
        class_names: tuple[str, ...] | None,
    ) -> None:
        self._file = file
        self._shape = shape
        self._count = 0
        self._metadata = {"format": FORMAT, "version": VERSION, "name": name}
        if class_names is not None:
            self._metadata["class_names"] = json.dumps(class_names, ensure_ascii=False)
        # The count is known last; the header is padded to what the longest one could need.
        longest = len(self._header(10**12, ("F32", [10**12, 10**6]), 7))
        self._start = math.ceil((8 + longest) / 64) * 64
        file.write(bytes(self._start))

    def add(self, image: NDArray[np.uint8]) -> None:
        """Append an image [C, H, W]."""
        if image.shape != self._shape:
            raise ValueError(f"image of shape {image.shape} in a set of {self._shape}")
        self._file.write(np.ascontiguousarray(image).data)
        self._count += 1

    def finish(self, labels: NDArray[Any] | None) -> None:
        """Write labels (int64 [N] or float32 [N, K]) and the header."""
        described = None
        padding = 0
        if labels is None:
            self._metadata.pop("class_names", None)
        else:
            padding = -self._count * math.prod(self._shape) % 8
            self._file.write(bytes(padding))
            self._file.write(np.ascontiguousarray(labels).data)
            described = ("I64" if labels.ndim == 1 else "F32", list(labels.shape))
        header = self._header(self._count, described, padding).ljust(self._start - 8)
        self._file.seek(0)
        self._file.write(struct.pack("<Q", len(header)) + header)

    def _header(self, count: int, labels: tuple[str, list[int]] | None, padding: int) -> bytes:
        header: dict[str, Any] = {"__metadata__": self._metadata}
        end = count * math.prod(self._shape)
        header["images"] = tensor_entry("U8", [count, *self._shape], 0, end)
        if padding:
            header["padding"] = tensor_entry("U8", [padding], end, end + padding)
            end += padding
        if labels is not None:
            size = math.prod(labels[1]) * DTYPES[labels[0]].itemsize
            header["labels"] = tensor_entry(*labels, end, end + size)
        return json.dumps(header, ensure_ascii=False).encode()


def tensor_entry(dtype: str, shape: Sequence[int], start: int, end: int) -> dict[str, Any]:
    """A tensor in the words of a safetensors header; offsets in bytes."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


class PackedFile:
    """A packed set, memory-mapped.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], float32 [N, K], or None.
        class_names: names of the classes, if known.
    """

    def __init__(self, path: Path) -> None:
        try:
            header = read_header(path)
            metadata = header.metadata
            if metadata.get("format") == LATENTS_FORMAT:
                raise DataError(
                    f"{path} holds latents of images, not images: train on it with codec.kind=vae, "
                    "and give other commands the images that it was made from"
                )
            images = header.map("images")
            self.labels, self.class_names = header.labels(), header.class_names()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        except ValueError as error:
            raise DataError(
                f"{path}: not a whole packed set ({error}); `tessera data convert` writes them"
            ) from error
        labels = self.labels
        if metadata.get("format", FORMAT) != FORMAT or metadata.get("version", VERSION) != VERSION:
            raise DataError(
                f"{path}: format {metadata.get('format')!r} version {metadata.get('version')!r}, "
                f"but this library reads {FORMAT!r} version {VERSION!r}"
            )
        if (
            images.dtype != np.uint8
            or images.ndim != 4
            or not 1 <= images.shape[1] <= MAX_CHANNELS
            or 0 in images.shape[2:]
        ):
            raise DataError(
                f"{path}: images must be uint8 [N, C, H, W] with C from 1 to {MAX_CHANNELS}"
            )
        if labels is not None and len(labels) != len(images):
            raise DataError(f"{path}: {len(images)} images but {len(labels)} labels")
        self.images = images


@dataclass(frozen=True)
class Entry:
    """A tensor in a safetensors file; `first` and `last` are bytes from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file, of which all types and places have been checked.

    Its methods raise ValueError for what does not fit.
    """

    path: Path
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]

    def map(self, name: str) -> NDArray[Any]:
        """A tensor, memory-mapped."""
        if name not in self.entries:
            raise ValueError(f"no tensor {name!r} in it")
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"{name!r} is of the type {entry.dtype[:20]!r}")
        dtype, size = DTYPES[entry.dtype], math.prod(entry.shape)
        if entry.last - entry.first != size * dtype.itemsize:
            raise ValueError("sizes in its header contradict each other")
        if not size:
            return np.empty(entry.shape, dtype)
        array: NDArray[Any] = np.memmap(
            self.path, dtype, "r", offset=entry.first, shape=entry.shape
        )
        return array

    def labels(self) -> NDArray[Any] | None:
        """Class indices int64 [N] or vectors float32 [N, K], in memory; None if there are none."""
        if "labels" not in self.entries:
            return None
        labels = np.array(self.map("labels"))
        if labels.dtype == np.int64 and labels.ndim == 1:
            fits = not labels.size or (labels.min() >= 0 and labels.max() < 2**31)
        else:
            fits = labels.dtype == np.float32 and labels.ndim == 2 and np.isfinite(labels).all()
        if not fits:
            raise ValueError("labels that are neither class indices [N] nor vectors [N, K]")
        return labels

    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, if known."""
        text = self.metadata.get("class_names")
        names = None if text is None else parse_json(text, f"{self.path}: class_names")
        if names is not None and not is_names(names):
            raise ValueError("class_names that are no list of names")
        return None if names is None else tuple(names)


def read_header(path: Path) -> Header:
    """The header of a safetensors file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is none, is damaged, or describes what is not in it.
        DataError: its header is nested or long beyond all need.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(100 * MIB, size - 8):
            raise ValueError("its header is not that of a safetensors file")
        content = parse_json(file.read(length), str(path), max_bytes=100 * MIB)
    if not isinstance(content, dict):
        raise ValueError("its header is not that of a safetensors file")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are no texts by name")
    begin = 8 + length
    entries = {name: _entry(name, value, begin, size) for name, value in content.items()}
    return Header(path, metadata, entries)


def _entry(name: str, value: Any, begin: int, size: int) -> Entry:
    """What a header says of a tensor, in a file of `size` bytes whose tensors begin at `begin`."""
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _is_sizes(shape) and _is_sizes(offsets)):
        raise ValueError(f"no type, shape and place of {name[:40]!r}")
    if len(shape) > 8 or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - begin:
        raise ValueError(f"{name[:40]!r} is not within the file")
    return Entry(dtype, tuple(shape), begin + offsets[0], begin + offsets[1])


def _is_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**62 for v in values)

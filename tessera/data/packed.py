"""The packed format: decoded images in one safetensors file, read through a memory map.

Tensors: `images` uint8 [N, C, H, W]; `labels` int64 [N] or float32 [N, K], absent if unlabelled.
A tensor `padding` of up to 7 zeros keeps the labels aligned where the images' size needs it.
Metadata: `format` = "tessera-packed", `version`, `name`, and, if known, `class_names` (JSON list).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tessera.errors import DataError

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
            header, start = read_header(path)
            metadata = header.pop("__metadata__", {})
            if metadata.get("format") == LATENTS_FORMAT:
                raise DataError(
                    f"{path} holds latents of images, not images: train on it with codec.kind=vae, "
                    "and give other commands the images that it was made from"
                )
            images = map_tensor(path, header["images"], start)
            labels = map_tensor(path, header["labels"], start) if "labels" in header else None
            names = metadata.get("class_names")
            self.class_names = None if names is None else tuple(json.loads(names))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        except (KeyError, TypeError, ValueError, struct.error) as error:
            raise DataError(
                f"{path}: not a whole packed set ({type(error).__name__}: {error}); "
                "`tessera data convert` writes them"
            ) from error
        if metadata.get("format", FORMAT) != FORMAT or metadata.get("version", VERSION) != VERSION:
            raise DataError(
                f"{path}: format {metadata.get('format')!r} version {metadata.get('version')!r}, "
                f"but this library reads {FORMAT!r} version {VERSION!r}"
            )
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise DataError(f"{path}: images must be uint8 [N, C, H, W] with C = 1 or 3")
        if labels is not None and len(labels) != len(images):
            raise DataError(f"{path}: {len(images)} images but {len(labels)} labels")
        self.images = images
        self.labels = None if labels is None else np.array(labels)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its tensors begin."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > 100_000_000:
            raise ValueError("its header is not that of a safetensors file")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not that of a safetensors file")
    return header, 8 + length


def map_tensor(path: Path, entry: dict[str, Any], start: int) -> NDArray[Any]:
    """The tensor that a header's entry describes, memory-mapped.

    Raises:
        KeyError, TypeError, ValueError: the entry contradicts itself.
    """
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError("sizes in its header contradict each other")
    if not math.prod(shape):
        return np.empty(shape, dtype)
    array: NDArray[Any] = np.memmap(path, dtype, "r", offset=start + first, shape=shape)
    return array

"""Image sets that are scored: data sets, folders, archives, NPZ files and arrays."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.channels import MAX_CHANNELS
from tessera.data.dataset import open_dataset
from tessera.errors import DataError
from tessera.files import user_path
from tessera.memory import physical
from tessera.metrics.classifier import LabelledImages

# Of deflated arrays: images shrink to a half, not to a hundredth.
_FREELY, _EXPANSION = 64 * 2**20, 100


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory, as a set.

    Attributes:
        name: how messages call the set.
        images: uint8 [N, C, H, W].
        labels: int64 [N] or None.
        class_names: names of the classes, if known.
    """

    name: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images at `indices`, uint8 [n, C, H, W]."""
        return self.images[indices]


def open_images(path: str | os.PathLike[str]) -> LabelledImages:
    """A folder, ZIP archive, packed set or NPZ file (`arr_0` uint8 NHWC, labels in `arr_1`).

    Raises:
        DataError: nothing is there, it holds no images, or it cannot be read; images with an alpha
            channel raise it when they are read.
    """
    path = user_path(path)
    if path.suffix == ".npz" and path.is_file():
        return _open_npz(path)
    # What lies under transparent pixels is no sample.
    return open_dataset(path, opaque=True)


def batches(
    data: LabelledImages, indices: NDArray[np.int64] | None = None, size: int = 256
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """The images at `indices` (by default all) in order: indices [B], uint8 [B, C, H, W]."""
    indices = np.arange(len(data)) if indices is None else indices
    for start in range(0, len(indices), size):
        chunk = indices[start : start + size]
        yield chunk, torch.from_numpy(np.array(data.read(chunk)))


def _open_npz(path: Path) -> ArrayImages:
    images = _map_member(path, "arr_0.npy")
    arrays = read_npz(path, only=("arr_1",) if images is not None else ("arr_0", "arr_1"))
    if images is None and "arr_0" not in arrays:
        names = ", ".join(npz_names(path)) or "nothing"
        raise DataError(f"{path}: no images in it (no array 'arr_0'); it holds {names}")
    images = arrays["arr_0"] if images is None else images
    if images.dtype != np.uint8 or images.ndim != 4 or not 1 <= images.shape[3] <= MAX_CHANNELS:
        raise DataError(
            f"{path}: images are uint8 [N, H, W, C] with C from 1 to {MAX_CHANNELS}, but 'arr_0' "
            f"is {images.dtype} {list(images.shape)}"
        )
    labels = arrays.get("arr_1")
    if labels is not None:
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise DataError(f"{path}: 'arr_1' must hold one whole number per image, the class")
        labels = labels.astype(np.int64)
    return ArrayImages(path.name, images.transpose(0, 3, 1, 2), labels)


def _map_member(path: Path, name: str) -> NDArray[Any] | None:
    """An array of an NPZ file mapped into memory, so that sets larger than memory can be read.

    None if the member is absent, compressed, or not plain numbers.
    """
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            member = archive.getinfo(name)
            if member.compress_type != zipfile.ZIP_STORED:
                return None
            # The local header says how long its own name and extra field are.
            file.seek(member.header_offset + 26)
            lengths = np.frombuffer(file.read(4), "<u2")
            file.seek(member.header_offset + 30 + int(lengths.sum()))
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                return None
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            if fortran or dtype.hasobject or 0 in shape:
                return None
            return np.memmap(path, dtype, "r", file.tell(), shape)
    except Exception:  # whatever is wrong with it, `read_npz` says it in the user's words
        return None


def npz_names(path: Path) -> tuple[str, ...]:
    """The arrays in an NPZ file; none if it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return tuple(file.files)
    except Exception:  # whatever is wrong with it, who reads it says it in the user's words
        return ()


def read_npz(
    path: Path, *, only: Sequence[str] | None = None, skip: Sequence[str] = ()
) -> dict[str, NDArray[Any]]:
    """Arrays of an NPZ file, all or `only` some, without ever unpickling anything.

    Raises:
        DataError: the file is missing, damaged, holds Python objects, or unpacks to more than any
            numbers do or than fits into memory.
    """
    try:
        with open(path, "rb") as start:
            if start.read(6) == b"\x93NUMPY":
                raise DataError(f"{path}: one bare array, not an NPZ archive of named arrays")
        with np.load(path, allow_pickle=False) as file:
            wanted = [name for name in file.files if only is None or name in only]
            wanted = [name for name in wanted if name not in skip]
            _check_sizes(path, wanted)
            return {name: _array(path, name, file[name]) for name in wanted}
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except (DataError, MemoryError):
        raise
    except Exception as error:  # a damaged archive or header may raise nearly anything
        raise DataError(f"{path}: not a readable NPZ file, it may be damaged ({error})") from error


def _check_sizes(path: Path, arrays: Sequence[str]) -> None:
    """Refuse arrays that unpack to more than they can be, before any of them is unpacked."""
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if m.filename.removesuffix(".npy") in arrays]
    total = sum(member.file_size for member in members)
    stored = sum(member.compress_size for member in members)
    if total > _FREELY and total > _EXPANSION * stored:
        raise DataError(
            f"{path}: {stored / 2**20:,.0f} MiB that unpack to {total / 2**20:,.0f}; no real "
            "images or features do"
        )
    if total > physical() // 2:
        raise DataError(
            f"{path}: its arrays have {total / 2**30:,.1f} GiB unpacked, more than fits into the "
            f"memory here beside the rest. Save it uncompressed (np.savez): 'arr_0' is then read "
            "from the disk as it is needed"
        )


def _array(path: Path, name: str, value: Any) -> NDArray[Any]:
    """What an NPZ file holds under a name; a member that is no array comes as its bytes."""
    if not isinstance(value, np.ndarray):
        raise DataError(f"{path}: {name!r} in it is no array of NumPy")
    return value

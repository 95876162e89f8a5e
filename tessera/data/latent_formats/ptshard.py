"""The shards of Energy: `shard_NNNNN.pt`, files of `torch.save` in one folder.

Each holds a dictionary: `moments` and `moments_flip`, float16 [N, 2 C, h, w], of images and of the
mirrored ones, mean, then log-variance, which released code has not cut; and `labels`, int64 [N].
Nothing in the files is run; their tensors are read where they lie.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tessera.data.latent_formats.base import (
    LatentFormat,
    LatentInfo,
    LatentPlan,
    Mirrored,
    Precision,
)
from tessera.data.latent_formats.facts import (
    FACTS_FILE,
    check_count,
    data_files,
    facts_json,
    first_file,
    read_facts,
)
from tessera.data.members import FolderMembers
from tessera.errors import DataError
from tessera.files import atomic_folder
from tessera.progress import progress
from tessera.torch_files import TENSOR_NAMES, StoredTensor, read_torch_zip

_TITLE = "folder of shards of latents"
_PATTERN = r"shard_\d{5,}\.pt"
_DTYPES: dict[torch.dtype, Precision] = {torch.float16: "float16", torch.float32: "float32"}
_CLASSES = 2**31


@dataclass(frozen=True)
class _Shard:
    """Where the rows of a file lie: bytes from its beginning to those of the images, and mirrored.

    Attributes:
        shape: of all its moments.
        mirrored: -1 where there are none.
    """

    path: Path
    shape: tuple[int, ...]
    precision: Precision
    moments: int
    mirrored: int
    labels: NDArray[np.int64]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What all shards of a set have in common."""
        return self.shape[1:], self.precision, self.mirrored >= 0


class ShardedLatents:
    """Reads a folder of shards; see `LatentReader`."""

    drawn = False

    def __init__(self, path: Path) -> None:
        """Look into every shard, which alone says how many rows it has; only labels are read.

        Raises:
            DataError: damaged, or something else is in it.
        """
        members = FolderMembers(path)
        names = data_files(members, _PATTERN, _TITLE)
        facts = read_facts(members)
        self._shards = []
        with progress(f"opening {path.name}", len(names), unit="shards") as bar:
            for name in names:
                self._shards.append(_open_shard(path / name))
                _check_alike(self._shards[0], self._shards[-1])
                bar.advance()
        counts = [shard.shape[0] for shard in self._shards]
        self._starts = np.cumsum([0, *counts])
        self.count = int(self._starts[-1])
        check_count(path, self.count, facts)
        (width, *sides), self.precision, mirrored = self._shards[0].kind
        self.shape: tuple[int, int, int] = (width // 2, *sides)
        self.mirrored: Mirrored = "encoded" if mirrored else "none"
        self.info = LatentInfo() if facts is None else facts.info
        self.class_names = None if facts is None else facts.class_names
        labelled = facts is None or facts.labelled
        self.labels = np.concatenate([s.labels for s in self._shards]) if labelled else None

    def read(self, rows: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> NDArray[Any]:
        """Means and log-variances [n, 2 C, h, w]; only the rows that are wanted are read."""
        moments = np.empty((len(rows), *self._shards[0].shape[1:]), self.precision)
        chosen = np.searchsorted(self._starts, rows, "right") - 1
        size = moments[:1].nbytes
        for number in np.unique(chosen):
            shard = self._shards[number]
            try:
                with open(shard.path, "rb", buffering=0) as file:
                    for at in np.flatnonzero(chosen == number):
                        start = shard.mirrored if mirrored[at] else shard.moments
                        file.seek(start + int(rows[at] - self._starts[number]) * size)
                        if file.readinto(moments[at].data) != size:
                            raise DataError(f"{shard.path} is not whole any more")
            except OSError as error:
                raise DataError(f"{shard.path}: cannot be read ({error.strerror})") from error
        return moments

    def close(self) -> None:
        """Nothing stays open."""


def _check_alike(first: _Shard, other: _Shard) -> None:
    if first.kind != other.kind:
        raise DataError(
            f"{other.path} holds {other.precision} {other.shape[1:]}"
            f"{'' if other.mirrored >= 0 else ' without mirrored images'}, but {first.path.name} "
            f"{first.precision} {first.shape[1:]}{'' if first.mirrored >= 0 else ' without them'}; "
            "the shards of a set are alike"
        )


def _open_shard(path: Path) -> _Shard:
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise DataError("it is empty")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        try:
            content = read_torch_zip(path, mapped, TENSOR_NAMES)
            return _describe(path, content, len(mapped))
        finally:
            # Thousands of them are opened. Where an error holds on to it, it goes with that.
            with contextlib.suppress(BufferError):
                mapped.close()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except DataError as error:
        raise DataError(f"{path} is no whole shard of latents: {error}") from error


def _describe(path: Path, content: Any, size: int) -> _Shard:
    """A shard, of which all types and places have been checked."""
    tensors = content if isinstance(content, dict) else {}
    moments, labels, mirrored = (tensors.get(k) for k in ("moments", "labels", "moments_flip"))
    if not isinstance(moments, StoredTensor) or not isinstance(labels, StoredTensor):
        raise DataError("no dictionary of tensors `moments` and `labels`")
    shape, precision = moments.shape, _DTYPES.get(moments.storage.dtype)
    if precision is None or len(shape) != 4 or shape[1] % 2 or 0 in shape:
        raise DataError(f"moments of shape {str(shape)[:80]} and type {moments.storage.dtype}")
    places = [_place(moments, size), -1]
    if mirrored is not None:
        alike = isinstance(mirrored, StoredTensor) and mirrored.shape == shape
        if not alike or mirrored.storage.dtype != moments.storage.dtype:
            raise DataError("mirrored moments that do not belong to the others")
        places[1] = _place(mirrored, size)
    return _Shard(path, shape, precision, places[0], places[1], _read_labels(labels, shape[0]))


def _place(tensor: StoredTensor, size: int) -> int:
    """Bytes from the beginning of a file of `size` to a tensor whose numbers lie in a row."""
    strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
    pairs = zip(tensor.shape, tensor.stride, strides, strict=True)
    if any(length > 1 and found != wanted for length, found, wanted in pairs):
        raise DataError("its moments do not lie in a row, as the released code writes them")
    storage = tensor.storage
    whole = storage.offset >= 0 and storage.offset + storage.nbytes <= size
    if not whole or tensor.offset + math.prod(tensor.shape) > storage.count:
        raise DataError(f"{storage.name} is not whole")
    return storage.offset + tensor.offset * storage.dtype.itemsize


def _read_labels(labels: StoredTensor, count: int) -> NDArray[np.int64]:
    if labels.storage.dtype != torch.int64 or labels.shape != (count,):
        raise DataError(f"labels that are not {count} class indices")
    found: NDArray[np.int64] = labels.view_of(labels.storage.read()).clone().numpy()
    if found.min() < 0 or found.max() >= _CLASSES:
        raise DataError("labels that are no class indices")
    return found


class _Writer:
    def __init__(self, folder: Path, plan: LatentPlan) -> None:
        self._folder, self._plan = folder, plan
        self._waiting: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self._written = self._shards = 0

    def put(self, first: int, rows: NDArray[Any], mirrored: NDArray[Any] | None) -> None:
        """Write moments from number `first` on; see `LatentWriter.put`."""
        assert mirrored is not None
        for pair in zip(rows.astype(np.float16), mirrored.astype(np.float16), strict=True):
            self._waiting.append(pair)
            if len(self._waiting) == self._plan.shard:
                self._write()

    def finish(self) -> None:
        """Write the last shard, which may be short."""
        if self._waiting:
            self._write()
        (self._folder / FACTS_FILE).write_bytes(facts_json(self._plan))

    def _write(self) -> None:
        first, self._written = self._written, self._written + len(self._waiting)
        labels = np.zeros(self._written - first, np.int64)
        if self._plan.labels is not None:
            labels[:] = self._plan.labels[first : self._written]
        names = ("moments", "moments_flip")
        arrays = zip(names, (np.stack(part) for part in zip(*self._waiting, strict=True)))  # noqa: B905
        content = {name: torch.from_numpy(array) for name, array in arrays}
        content["labels"] = torch.from_numpy(labels)
        torch.save(content, self._folder / f"shard_{self._shards:05d}.pt")
        self._shards += 1
        self._waiting.clear()


def _recognise(path: Path) -> bool:
    name = first_file(path) or ""
    return path.is_dir() and name.startswith("shard_") and name.endswith(".pt")


@contextlib.contextmanager
def _create(path: Path, plan: LatentPlan) -> Iterator[_Writer]:
    if plan.labels is not None and plan.labels.ndim != 1:
        raise DataError(f"{path}: shards hold class indices, not vectors as labels")
    with atomic_folder(path) as folder:
        writer = _Writer(folder, plan)
        yield writer
        writer.finish()


PTSHARD = LatentFormat(
    "ptshard",
    _TITLE,
    (),
    folder=True,
    drawn=False,
    mirrored=True,
    precision="float16",
    recognise=_recognise,
    open=ShardedLatents,
    create=_create,
)

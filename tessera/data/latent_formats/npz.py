"""The folder of npz files of MAR and Energy: `CLASS/NAME.npz`, one an image.

Each holds `moments` and `moments_flip`, float32 [2 C, h, w], of the image and of the mirrored one:
mean, then log-variance, which released code has not cut. A label is the index of the class's folder
in the order of their names.
"""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
    Facts,
    check_count,
    data_files,
    facts_json,
    first_file,
    read_facts,
)
from tessera.data.latent_formats.npy import NpyArrays
from tessera.data.members import MAX_BYTES, FolderMembers
from tessera.errors import DataError
from tessera.files import atomic_folder

_TITLE = "folder of npz latents"
_UNLABELLED = ("all",)


class NpzLatents:
    """Reads a folder of npz files; see `LatentReader`.

    In folders that we have written, rows keep the order in which they were written; in others they
    are sorted by class, then by name.
    """

    drawn = False
    precision: Precision = "float32"

    def __init__(self, path: Path) -> None:
        """List the files, and read the first one for its shape.

        Raises:
            DataError: damaged, or something else is in it.
        """
        self._members = members = FolderMembers(path)
        names = data_files(members, r"[^/]+/[^/]+\.npz", _TITLE)
        facts = read_facts(members)
        self.count = len(names)
        check_count(path, self.count, facts)
        if facts is not None:
            names.sort(key=lambda name: name.rpartition("/")[2])
        self._names = names
        self.labels, self.class_names = _labels(path, names, facts)
        self.info = LatentInfo() if facts is None else facts.info
        first = str(path / names[0])
        self._arrays = NpyArrays(_read_array(first, "moments", MAX_BYTES), first)
        shape = self._arrays.shape
        if len(shape) != 3 or shape[0] % 2:
            raise DataError(f"{first}: moments [2 C, h, w] are wanted, not {shape}")
        self.shape = shape[0] // 2, shape[1], shape[2]
        self.mirrored: Mirrored = "encoded" if _has_array(first, "moments_flip") else "none"

    def read(self, rows: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Means and log-variances [n, 2 C, h, w]."""
        moments = np.empty((len(rows), *self._arrays.shape), np.float32)
        for out, row, flip in zip(moments, rows, mirrored, strict=True):
            where = self._members.where(self._names[row])
            name = "moments_flip" if flip else "moments"
            out[:] = self._arrays.read(_read_array(where, name, self._arrays.max_bytes), where)
        return moments

    def close(self) -> None:
        """Nothing stays open."""


def _labels(
    path: Path, names: Sequence[str], facts: Facts | None
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Class indices of the files, and the names of the classes."""
    if facts is not None and not facts.labelled:
        return None, None
    found = [name.partition("/")[0] for name in names]
    folders = facts.folders if facts is not None else None
    index = {folder: number for number, folder in enumerate(folders or sorted(set(found)))}
    stray = next((folder for folder in found if folder not in index), None)
    if stray is not None:
        raise DataError(f"{path / stray}: no folder of a class that {FACTS_FILE} knows")
    labels = np.array([index[folder] for folder in found], np.int64)
    return labels, tuple(index) if facts is None else facts.class_names


def _has_array(path: str, name: str) -> bool:
    with _opened(path) as archive:
        return f"{name}.npy" in archive.namelist()


def _read_array(path: str, name: str, limit: int) -> bytes:
    """A `.npy` file in an npz file, of which no more is unpacked than the limit."""
    with _opened(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            raise DataError(f"{path} has no array {name}")
        info = archive.getinfo(f"{name}.npy")
        if info.file_size > limit:
            raise DataError(
                f"{path}: its {name} of {info.file_size:,} bytes are larger than those of the first"
                " file of the set, or than any"
            )
        with archive.open(info) as member:
            return member.read(info.file_size + 1)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except DataError:
        raise
    except Exception as error:  # damaged archives raise nearly anything
        raise DataError(f"{path} cannot be read as npz ({str(error)[:200]})") from error


class _Writer:
    def __init__(self, folder: Path, plan: LatentPlan, classes: Sequence[str]) -> None:
        self._folder, self._plan, self._classes = folder, plan, classes
        for name in classes:
            (folder / name).mkdir()

    def put(self, first: int, rows: NDArray[Any], mirrored: NDArray[Any] | None) -> None:
        """Write moments from number `first` on; see `LatentWriter.put`."""
        assert mirrored is not None
        labels = self._plan.labels
        for number, (row, other) in enumerate(zip(rows, mirrored, strict=True), first):
            name = self._classes[0 if labels is None else labels[number]]
            np.savez(
                self._folder / name / f"img{number:08d}.npz",
                moments=np.ascontiguousarray(row, np.float32),
                moments_flip=np.ascontiguousarray(other, np.float32),
            )

    def finish(self) -> None:
        """Take away folders of classes that have no images, which released code cannot read."""
        for name in self._classes:
            with contextlib.suppress(OSError):
                (self._folder / name).rmdir()
        data = facts_json(self._plan, self._classes)
        (self._folder / FACTS_FILE).write_bytes(data)


def _class_folders(plan: LatentPlan) -> Sequence[str]:
    """Names of folders whose order is that of the classes: their own, if those have it."""
    if plan.labels is None:
        return _UNLABELLED
    names = plan.class_names or ()
    count = max(int(plan.labels.max()) + 1, len(names))
    plain = all(re.fullmatch(r"\w[\w .,()'+-]{0,99}", name) for name in names)
    if len(names) == count and plain and list(names) == sorted(set(names)):
        return names
    return [f"{number:05d}" for number in range(count)]


def _recognise(path: Path) -> bool:
    return re.fullmatch(r"[^/]+/[^/]+\.npz", first_file(path) or "") is not None


@contextlib.contextmanager
def _create(path: Path, plan: LatentPlan) -> Iterator[_Writer]:
    if plan.labels is not None and plan.labels.ndim != 1:
        raise DataError(f"{path}: a {_TITLE} has a folder for each class, not vectors as labels")
    with atomic_folder(path) as folder:
        writer = _Writer(folder, plan, _class_folders(plan))
        yield writer
        writer.finish()


NPZ = LatentFormat(
    "npz",
    _TITLE,
    (),
    folder=True,
    drawn=False,
    mirrored=True,
    precision="float32",
    recognise=_recognise,
    open=NpzLatents,
    create=_create,
)

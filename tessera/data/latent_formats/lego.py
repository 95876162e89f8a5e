"""LEGO's archive of latents: a stored ZIP (or folder) of `.npy` files and `dataset.json`.

Each file holds one sample of an image's posterior, drawn when the archive was made, times the VAE's
scale: float32 [C, h, w], as the model is trained on it. Files are sorted by name; labels are those
of an EDM archive. There are no mirrored images: the released code mirrors the latents themselves.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.data import archive
from tessera.data.labels import LABELS_FILE, find_labels, label_array
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
from tessera.data.latent_formats.npy import NpyArrays, npy_bytes
from tessera.data.members import open_members
from tessera.errors import DataError
from tessera.files import atomic_file, atomic_folder
from tessera.npy import NPY_HEADER, npy_header

_TITLE = "LEGO archive of latents"


class LegoLatents:
    """Reads an archive of samples; see `LatentReader`."""

    drawn = True
    mirrored: Mirrored = "flipped"
    precision: Precision = "float32"

    def __init__(self, path: Path) -> None:
        """Read names and labels, and the first sample for its shape.

        Raises:
            DataError: damaged, or something else is in it.
        """
        self._members = members = open_members(path)
        self._names = data_files(members, r".+\.npy", _TITLE)
        self.count = len(self._names)
        facts = read_facts(members)
        check_count(path, self.count, facts)
        found = find_labels(members, self._names)
        self.labels: NDArray[Any] | None = None
        self.class_names = None if found is None else found.class_names
        if found is not None:
            self.labels = label_array(found.values, self._names, str(path))
        self.info = LatentInfo() if facts is None else facts.info
        first = self._names[0]
        self._arrays = NpyArrays(members.read(first), members.where(first))
        shape = self._arrays.shape
        if len(shape) != 3 or shape[1] != shape[2]:
            raise DataError(f"{members.where(first)}: latents [C, h, h] are wanted, not {shape}")
        self.shape = shape

    def read(self, rows: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Samples in model space [n, C, h, w]; mirrored are the latents themselves."""
        samples = np.empty((len(rows), *self.shape), np.float32)
        for sample, row, flip in zip(samples, rows, mirrored, strict=True):
            name = self._names[row]
            array = self._arrays.read(self._members.read(name), self._members.where(name))
            sample[:] = array[..., ::-1] if flip else array
        return samples

    def close(self) -> None:
        """Close the archive."""
        self._members.close()


class _Writer:
    def __init__(self, put: archive.PutFile) -> None:
        self._put = put

    def put(self, first: int, rows: NDArray[Any], mirrored: NDArray[Any] | None) -> None:
        """Write samples from number `first` on; see `LatentWriter.put`."""
        for number, row in enumerate(rows, first):
            self._put(archive.member_name(number, "npy"), npy_bytes(row))

    def finish(self, plan: LatentPlan) -> None:
        labels = None if plan.labels is None else plan.labels.tolist()
        self._put(LABELS_FILE, archive.labels_json(labels, plan.class_names, "npy"))
        self._put(FACTS_FILE, facts_json(plan))


def _recognise(path: Path) -> bool:
    name = first_file(path) or ""
    return name.endswith(".npy") and not _is_image(path, name)


def _is_image(path: Path, name: str) -> bool:
    """Whether an array is one of pixels, as sets of images of many channels hold them."""
    try:
        if path.is_dir():
            with open(path / name, "rb") as file:
                head = file.read(NPY_HEADER)
        else:
            with zipfile.ZipFile(path) as zipped, zipped.open(name) as member:
                head = member.read(NPY_HEADER)
        return npy_header(head, name)[2] == np.uint8
    except Exception:  # a damaged file may raise nearly anything; opening it will tell
        return False


@contextlib.contextmanager
def _create(path: Path, plan: LatentPlan) -> Iterator[_Writer]:
    if plan.shape[1] != plan.shape[2]:
        raise DataError(f"{path}: a {_TITLE} holds squares, and these latents are none")
    with contextlib.ExitStack() as stack:
        if path.suffix.lower() == ".zip":
            put = archive.zip_putter(
                stack.enter_context(archive.open_zip(stack.enter_context(atomic_file(path))))
            )
        else:
            put = archive.folder_putter(stack.enter_context(atomic_folder(path)))
        writer = _Writer(put)
        yield writer
        writer.finish(plan)


LEGO = LatentFormat(
    "lego",
    _TITLE,
    (".zip",),
    folder=True,
    drawn=True,
    mirrored=False,
    precision="float32",
    recognise=_recognise,
    open=LegoLatents,
    create=_create,
)

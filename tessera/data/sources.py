"""Readers of foreign image collections, all giving the same stream of records."""

from __future__ import annotations

import contextlib
import functools
import gzip
import math
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from tessera.data.decode import decode_image, is_image
from tessera.data.labels import LABELS_FILE, Label, find_labels, stray_text
from tessera.data.members import MAX_BYTES, Members, ZipMembers, open_members
from tessera.data.packed import PackedFile
from tessera.errors import DataError, require_extra
from tessera.files import user_path
from tessera.images import MAX_PIXELS
from tessera.pickles import NUMPY, load_pickle

Pixels = NDArray[np.uint8]
Decode = Callable[[bytes, str], Pixels]  # an image file's bytes and name

# CIFAR-10 has 178 MiB, the largest of the extended MNIST sets 610.
_CIFAR_BYTES = 512 * 2**20
_IDX_BYTES = 1024 * 2**20


@dataclass(frozen=True)
class Record:
    """One image of a source.

    Attributes:
        name: what messages call it.
        label: class index, vector, or None.
        load: gives uint8 [H, W] or [H, W, 3]; may run in any thread; raises DataError.
    """

    name: str
    label: Label
    load: Callable[[], Pixels]


@dataclass(frozen=True)
class Source:
    """An image collection.

    Attributes:
        kind: in words.
        name: for messages and as the name of the set.
        count: number of records.
        records: the images, in order.
        class_names: if known.
        ignored: names of files that are not images.
    """

    kind: str
    name: str
    count: int
    records: Iterable[Record]
    class_names: tuple[str, ...] | None = None
    ignored: tuple[str, ...] = ()


@contextlib.contextmanager
def open_source(
    path: Path,
    *,
    upright: bool = True,
    max_file_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Source]:
    """Open a folder, ZIP, CIFAR-10 archive, MNIST file, LSUN LMDB or packed set by its name.

    Args:
        upright: turn photos as the camera's orientation tag says.
        max_file_bytes: the largest file in a folder or ZIP that is read.
        max_pixels: refuse images of more pixels, before they are decoded.

    Raises:
        DataError: nothing there, or of no known kind.
    """
    path = user_path(path)
    name = path.name.lower()
    decode = functools.partial(decode_image, upright=upright, max_pixels=max_pixels)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir() and (name.endswith("_lmdb") or (path / "data.mdb").exists()):
        with _open_lmdb(path, decode) as source:
            yield source
    elif path.is_dir() or name.endswith(".zip"):
        members = open_members(path, max_file_bytes)
        try:
            yield _files(members, decode)
        finally:
            members.close()
    elif name.endswith((".tar.gz", ".tgz", ".tar")):
        yield _cifar(path)
    elif name.endswith(("-images-idx3-ubyte.gz", "-images-idx3-ubyte", "-images.idx3-ubyte")):
        yield _idx(path)
    elif name.endswith(".safetensors"):
        yield _packed(path)
    else:
        raise DataError(
            f"{path}: not a kind of image collection that is known here; known are folders, .zip, "
            "cifar-10-python.tar.gz, *-images-idx3-ubyte.gz (MNIST), LSUN *_lmdb folders and "
            ".safetensors packed sets"
        )


# ---------------------------------------------------------------------------- folders and archives


def _files(members: Members, decode: Decode) -> Source:
    images = [name for name in members.names if is_image(name)]
    if not isinstance(members, ZipMembers):
        images.sort(key=lambda name: name.split("/"))  # component-wise, like path objects
    ignored = tuple(n for n in members.names if n != LABELS_FILE and not is_image(n))
    labels = find_labels(members, images)

    strays = labels.strays if labels is not None else frozenset()

    def load(name: str) -> Pixels:
        if name in strays:
            raise DataError(stray_text(members.where(name)))
        return decode(members.read(name), members.where(name))

    values: list[Label] = labels.values if labels is not None else [None] * len(images)
    records = [
        Record(members.where(name), value, functools.partial(load, name))
        for name, value in zip(images, values, strict=True)
    ]
    kind = "ZIP of images" if isinstance(members, ZipMembers) else "image folder"
    names = labels.class_names if labels is not None else None
    return Source(kind, members.path.stem, len(records), records, names, ignored)


def _packed(path: Path) -> Source:
    packed = PackedFile(path)

    def load(index: int) -> Pixels:
        image = np.array(packed.images[index])
        return image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))

    labels = [None] * len(packed.images) if packed.labels is None else packed.labels.tolist()
    records = [
        Record(f"image {index}", label, functools.partial(load, index))
        for index, label in enumerate(labels)
    ]
    return Source("packed set", path.stem, len(records), records, packed.class_names)


# ----------------------------------------------------------------------------------------- CIFAR-10


def _cifar(path: Path) -> Source:
    batches: dict[str, dict[bytes, Any]] = {}
    wanted = {"batches.meta", *(f"data_batch_{i}" for i in range(1, 6))}
    try:
        with _unpacked(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                content = archive.extractfile(member) if name in wanted else None
                if content is not None:
                    try:
                        batches[name] = load_pickle(content, NUMPY, encoding="bytes")
                    except DataError as error:
                        raise DataError(f"{path}: {name}: {error}") from error
    except DataError:
        raise
    except Exception as error:  # a damaged archive may raise nearly anything
        raise DataError(f"{path}: not a whole CIFAR-10 python archive ({error})") from error
    missing = sorted(wanted - {"batches.meta"} - batches.keys())
    if missing:
        raise DataError(f"{path}: no CIFAR-10 python archive: {', '.join(missing)} missing in it")
    meta = batches.pop("batches.meta", {})
    names = meta.get(b"label_names") if isinstance(meta, dict) else None
    if not (names is None or (isinstance(names, list) and all(map(_is_text, names)))):
        raise DataError(f"{path}: batches.meta: label_names should be a list of names")
    records: list[Record] = []
    for name in sorted(batches):
        pixels, labels = _cifar_batch(batches[name], f"{path}: {name}")
        records += [
            Record(f"{name}[{i}]", label, functools.partial(np.ascontiguousarray, image))
            for i, (image, label) in enumerate(zip(pixels, labels, strict=True))
        ]
    class_names = None if names is None else tuple(_text(name) for name in names)
    return Source("CIFAR-10 archive", "cifar10", len(records), records, class_names)


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    """A tar file, unpacked on the way if it is deflated; no more of it than CIFAR-10 has."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else open(path, "rb") as content:
        yield cast("IO[bytes]", _Bounded(cast("IO[bytes]", content), _CIFAR_BYTES, str(path)))


class _Bounded:
    """A file of which at most `limit` bytes are read."""

    def __init__(self, file: IO[bytes], limit: int, where: str) -> None:
        self._file, self._limit, self._where = file, limit, where
        self.tell, self.seekable = file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        self._check(self.tell() + size if size >= 0 else self._limit + 1)
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._check(offset if whence == 0 else self._limit + 1)
        return self._file.seek(offset)

    def _check(self, position: int) -> None:
        if position > self._limit:
            raise DataError(
                f"{self._where}: no CIFAR-10 python archive: unpacked, it would be larger than "
                f"{self._limit / 2**20:,.0f} MiB"
            )


def _is_text(value: Any) -> bool:
    return isinstance(value, bytes | str)


def _cifar_batch(batch: Any, where: str) -> tuple[Pixels, list[int]]:
    items = batch.items() if isinstance(batch, dict) else ()
    fields = {_text(k): v for k, v in items if _is_text(k)}
    pixels, labels = fields.get("data"), fields.get("labels")
    if not (
        isinstance(pixels, np.ndarray)
        and pixels.dtype == np.uint8
        and pixels.ndim == 2
        and pixels.shape[1] == 3 * 32 * 32
        and isinstance(labels, list)
        and len(labels) == len(pixels)
        and all(type(label) is int and 0 <= label <= 9 for label in labels)
    ):
        raise DataError(f"{where}: should hold uint8 data [n, 3072] and n labels 0..9")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


# ------------------------------------------------------------------------------------------ MNIST


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


# ------------------------------------------------------------------------------------------- LSUN


@contextlib.contextmanager
def _open_lmdb(path: Path, decode: Decode) -> Iterator[Source]:
    lmdb = require_extra("lmdb", "data", "reading an LMDB folder")
    try:
        database = lmdb.open(str(path), readonly=True, lock=False, readahead=True, max_readers=1)
    except lmdb.Error as error:
        raise DataError(f"{path}: not an LMDB folder ({error})") from error
    with database, database.begin() as transaction:

        def records() -> Iterator[Record]:
            # The cursor belongs to this thread; the bytes go to the others.
            for key, value in transaction.cursor():
                name = f"{path}: {key.decode('utf-8', 'backslashreplace')}"
                load = functools.partial(decode, bytes(value), name)
                yield Record(name, None, load)

        yield Source("LMDB folder", path.name, int(transaction.stat()["entries"]), records())

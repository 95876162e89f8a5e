"""The CIFAR-10 archive, whose pickles are read without running anything that is in them."""

from __future__ import annotations

import contextlib
import functools
import gzip
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from tessera.data.sources.base import Kind, Options, Pixels, Record, Source
from tessera.errors import DataError
from tessera.pickles import NUMPY, load_pickle

_CIFAR_BYTES = 512 * 2**20  # CIFAR-10 has 178 MiB
_ENDINGS = (".tar.gz", ".tgz", ".tar")


def _matches(path: Path) -> bool:
    """By its name or by the first files in it."""
    if not path.name.lower().endswith(_ENDINGS) or path.is_dir():
        return False
    if path.name.lower().startswith("cifar"):
        return True
    try:
        with open(path, "rb") as file:
            head = file.read(8192)
        if head[:2] == b"\x1f\x8b":
            head = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(head, 8192)
    except (OSError, zlib.error):
        return False
    return any(name in head for name in (b"cifar-10-batches-py", b"data_batch_", b"batches.meta"))


@contextlib.contextmanager
def _open(path: Path, options: Options) -> Iterator[Source]:
    yield _cifar(path)


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


CIFAR = Kind("cifar-10-python.tar.gz", _matches, _open)

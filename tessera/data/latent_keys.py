"""Names of images by their content, and what an encoding that was interrupted has left behind."""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from tessera import distributed
from tessera.data.dataset import ImageDataset
from tessera.data.parallel import cores, ordered_map
from tessera.errors import DataError, TesseraError
from tessera.files import writing
from tessera.progress import progress

T = TypeVar("T")
Key = tuple[bytes, bool]
"""SHA-256 of an image, and whether it is of the mirrored one."""

_RECORD = struct.Struct("<4sIII")
_MARK = b"rows"
_FLUSH_SECONDS = 1.0


def image_key(image: NDArray[np.uint8]) -> bytes:
    """SHA-256 of an image [C, H, W], of its size and pixels."""
    found = hashlib.sha256("x".join(map(str, image.shape)).encode())
    found.update(np.ascontiguousarray(image).data)
    return found.digest()


def image_keys(dataset: ImageDataset, batch: int) -> list[bytes]:
    """The key of each image; the processes share the work."""
    rank, world = distributed.rank(), distributed.world()
    first, last = (len(dataset) * part // world for part in (rank, rank + 1))
    starts = range(first, last, batch)

    def keys(start: int) -> list[bytes]:
        return [image_key(i) for i in dataset.read(np.arange(start, min(start + batch, last)))]

    def own() -> list[bytes]:
        every: list[bytes] = []
        with progress("comparing", len(dataset), unit="images") as bar:
            for found in ordered_map(keys, starts, cores(), 2 * cores()):
                every += found
                bar.advance(len(found) * world)
        return every

    return [key for part in all_shares(own) for key in part]


def all_shares(share: Callable[[], T]) -> list[T]:
    """What each process makes of its share; the error of one of them is that of all."""
    done: T | None = None
    failure: TesseraError | None = None
    try:
        done = share()
    except TesseraError as error:
        failure = error
    results = distributed.gather((done, None if failure is None else str(failure)))
    if failure is not None:
        raise failure
    for _, text in results:
        if text is not None:
            raise DataError(text)
    return [cast("T", part) for part, _ in results]


class EncodedRows:
    """A file that rows are appended to as they are made, and that is good up to wherever it ends.

    A record is `rows`, their number, which of the two kinds (1: of images, 2: of mirrored ones, 3:
    both), a CRC-32 of what follows; the images' keys; then the rows of each kind.

    Args:
        path: of the file, which need not exist.
        row_bytes: of a row.
        shown: what errors of writing name; by default the file.
    """

    def __init__(self, path: Path, row_bytes: int, shown: Path | None = None) -> None:
        self.path, self._row, self._shown = path, row_bytes, shown or path
        self._data: NDArray[np.uint8] = np.empty(0, np.uint8)
        self.places: dict[Key, int] = {}
        """Where the rows of whole records begin."""
        self._good = 0
        if path.exists() and path.stat().st_size:
            self._data = np.memmap(path, np.uint8, "r")
            self._scan()

    def _scan(self) -> None:
        """Find the records; the first that is torn or damaged ends them."""
        size = len(self._data)
        while self._good + _RECORD.size <= size:
            mark, count, kinds, check = _RECORD.unpack_from(self._data.data, self._good)
            begin = self._good + _RECORD.size
            flips = [flip for flip in (False, True) if kinds & (1 << flip)]
            end = begin + count * (32 + len(flips) * self._row)
            if mark != _MARK or not count or not flips or kinds > 3 or end > size:
                break
            if zlib.crc32(self._data[begin:end].data, count + kinds) != check:
                break
            rows = begin + 32 * count
            keys = [bytes(self._data[begin + 32 * i :][:32]) for i in range(count)]
            for nth, flip in enumerate(flips):
                for i, key in enumerate(keys):
                    self.places[key, flip] = rows + (nth * count + i) * self._row
            self._good = end

    def row(self, key: Key) -> NDArray[np.uint8]:
        """The bytes of a row."""
        return self._data[self.places[key] :][: self._row]

    @contextmanager
    def appending(self) -> Iterator[RowAppender]:
        """Append records; what is torn goes first."""
        with writing(self._shown, opening=True):
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with writing(self._shown):
                os.ftruncate(handle, self._good)
                os.lseek(handle, 0, os.SEEK_END)
                yield RowAppender(handle)
                os.fsync(handle)
        finally:
            os.close(handle)


class RowAppender:
    """Appends records to an open file."""

    def __init__(self, handle: int) -> None:
        self._handle, self._flushed = handle, time.monotonic()

    def add(self, keys: list[bytes], rows: dict[bool, NDArray[np.generic]]) -> None:
        """Append the rows of some images, by whether they are of the mirrored ones."""
        flips = sorted(rows)
        body = b"".join([*keys, *(np.ascontiguousarray(rows[flip]).tobytes() for flip in flips)])
        kinds = sum(1 << flip for flip in flips)
        check = zlib.crc32(body, len(keys) + kinds)
        write_all(self._handle, _RECORD.pack(_MARK, len(keys), kinds, check) + body)
        # A killed process loses nothing by this; a machine that loses power, about a second.
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            os.fsync(self._handle)
            self._flushed = time.monotonic()


def write_all(handle: int, content: bytes) -> None:
    """Write all bytes, however few the system takes at once."""
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view) :]


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Have the set at `path` in the block; the system gives it back when the process ends.

    Raises:
        DataError: another command encodes into it.
    """
    lock = path.with_name(f".{path.name[:180]}.lock")
    handle = _locked(lock, path)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _locked(lock: Path, path: Path) -> int:
    with writing(path, opening=True):
        lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with writing(path, opening=True):
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise DataError(
                f"{path}: another command is encoding into it; wait for that one, or stop it"
            ) from None
        except OSError:  # a file system without locks
            return handle
        # Whoever had it before may have removed the file that was locked here.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(lock)):
                return handle
        os.close(handle)

"""Named files in a ZIP archive or a folder, read from any number of threads at once."""

from __future__ import annotations

import lzma
import os
import stat
import struct
import threading
import weakref
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np

from tessera.errors import DataError

MAX_BYTES = 256 * 2**20
"""Of one file, unpacked; larger ones are not read unless the caller asks for it."""


class Members(Protocol):
    """Files by name; names are relative, `/`-separated and sorted as plain strings."""

    path: Path
    names: list[str]

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """The bytes of a file.

        Args:
            max_bytes: the largest file that is read; None for the limit of the collection.

        Raises:
            DataError: it is larger or cannot be read; the message names the file.
        """
        ...

    def where(self, name: str) -> str:
        """How messages call a file."""
        ...

    def close(self) -> None:
        """Release the open files."""
        ...


class FolderMembers:
    """The files under a folder, at any depth."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self.names = sorted(
            Path(folder, file).relative_to(path).as_posix()
            for folder, _, files in os.walk(path, followlinks=True)
            for file in files
        )

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """The bytes of a file; see `Members.read`."""
        try:
            status = (self.path / name).stat()
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{self.where(name)}: not an ordinary file")
            _check_size(self.where(name), status.st_size, max_bytes or self._max_bytes)
            return (self.path / name).read_bytes()
        except OSError as error:
            raise DataError(f"{self.where(name)}: cannot be read ({error.strerror})") from error

    def where(self, name: str) -> str:
        """How messages call a file."""
        return str(self.path / name)

    def close(self) -> None:
        """Nothing stays open."""


class ZipMembers:
    """The members of a ZIP archive.

    The directory is read once; after that a member costs two positioned reads, without a lock and
    without the bookkeeping of `zipfile`.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes
        try:
            with zipfile.ZipFile(path) as archive:
                entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            self._file = open(path, "rb")  # noqa: SIM115 - lives as long as the object
            self._close = weakref.finalize(self, self._file.close)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        except Exception as error:  # a damaged directory may raise nearly anything
            raise DataError(f"{path}: not a whole ZIP archive ({error})") from error
        self._row = {entry.filename.replace("\\", "/"): i for i, entry in enumerate(entries)}
        # An array, because a million of zipfile's own entries would take a gigabyte.
        self._table = np.array(
            [
                (e.header_offset, e.compress_size, e.file_size, e.CRC, e.compress_type, e.flag_bits)
                for e in entries
                if 0 <= e.header_offset < 2**63 and max(e.compress_size, e.file_size) < 2**63
            ],
            np.int64,
        )
        if len(self._table) != len(entries):
            raise DataError(
                f"{path}: not a whole ZIP archive (members of impossible size or place)"
            )
        self._lock = threading.Lock()
        self.names = sorted(self._row)

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """The bytes of a member, checked against its CRC; see `Members.read`."""
        offset, stored_size, size, checksum, method, flags = self._table[self._row[name]].tolist()
        if flags & 1:
            raise DataError(f"{self.where(name)} is encrypted; unpack the archive first")
        _check_size(self.where(name), size, max_bytes or self._max_bytes)
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            return self._read_other(name, size)
        # Deflating adds five bytes to each 16 KiB at the most.
        if stored_size > size + size // 1000 + 1024:
            raise DataError(f"{self.where(name)} is damaged (more is stored of it than there is)")
        header = self._pread(30, offset)
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise DataError(f"{self.where(name)} is damaged (no header where it should begin)")
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        start = offset + 30 + name_length + extra_length
        data = self._pread(stored_size, start)
        try:
            if method == zipfile.ZIP_DEFLATED:
                # No more than it should be, and one byte to see that it is not.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        except zlib.error as error:
            raise DataError(f"{self.where(name)} is damaged ({error})") from error
        if len(data) != size or zlib.crc32(data) != checksum:
            raise DataError(f"{self.where(name)} is damaged (its checksum does not fit)")
        return data

    def where(self, name: str) -> str:
        """How messages call a file."""
        return f"{self.path}: {name}"

    def _read_other(self, name: str, size: int) -> bytes:
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = [entry for entry in archive.infolist() if not entry.is_dir()]
                with archive.open(entries[self._row[name]]) as member:
                    return member.read(size + 1)
        except (zipfile.BadZipFile, RuntimeError, OSError, EOFError, lzma.LZMAError) as error:
            raise DataError(f"{self.where(name)} cannot be read ({error})") from error

    def _pread(self, size: int, offset: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), size, offset)
        with self._lock:  # systems without positioned reads
            self._file.seek(offset)
            return self._file.read(size)

    def close(self) -> None:
        """Close the archive, which otherwise happens when nobody uses the object any more."""
        self._close()


def _check_size(where: str, size: int, limit: int) -> None:
    if size > limit:
        raise DataError(
            f"{where} has {size / 2**20:,.0f} MiB unpacked, and files of over "
            f"{limit / 2**20:,.0f} MiB are not read. If it is what it should be: "
            "tessera data convert --max-file-size MIB"
        )


def open_members(path: Path, max_bytes: int = MAX_BYTES) -> Members:
    """The files of a folder or a `.zip` archive.

    Args:
        max_bytes: the largest file in it that is read.

    Raises:
        DataError: the path is missing or neither of the two.
    """
    if path.is_dir():
        return FolderMembers(path, max_bytes)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix.lower() == ".zip":
        return ZipMembers(path, max_bytes)
    raise DataError(f"{path}: neither a folder, a .zip archive nor a .safetensors packed set")

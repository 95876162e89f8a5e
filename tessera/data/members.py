"""Named files in a ZIP archive or a folder, read from any number of threads at once."""

from __future__ import annotations

import os
import struct
import threading
import weakref
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np

from tessera.errors import DataError


class Members(Protocol):
    """Files by name; names are relative, `/`-separated and sorted as plain strings."""

    path: Path
    names: list[str]

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises DataError, naming the file, if it cannot be read."""
        ...

    def where(self, name: str) -> str:
        """How messages call a file."""
        ...

    def close(self) -> None:
        """Release the open files."""
        ...


class FolderMembers:
    """The files under a folder, at any depth."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = sorted(
            Path(folder, file).relative_to(path).as_posix()
            for folder, _, files in os.walk(path, followlinks=True)
            for file in files
        )

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        try:
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

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            self._file = open(path, "rb")  # noqa: SIM115 - lives as long as the object
            self._close = weakref.finalize(self, self._file.close)
        except zipfile.BadZipFile as error:
            raise DataError(f"{path}: not a whole ZIP archive ({error})") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        self._row = {entry.filename.replace("\\", "/"): i for i, entry in enumerate(entries)}
        # An array, because a million of zipfile's own entries would take a gigabyte.
        self._table = np.array(
            [
                (e.header_offset, e.compress_size, e.file_size, e.CRC, e.compress_type, e.flag_bits)
                for e in entries
            ],
            np.int64,
        )
        self._lock = threading.Lock()
        self.names = sorted(self._row)

    def read(self, name: str) -> bytes:
        """The bytes of a member, checked against its CRC."""
        offset, stored_size, size, checksum, method, flags = self._table[self._row[name]].tolist()
        if flags & 1:
            raise DataError(f"{self.where(name)} is encrypted; unpack the archive first")
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            return self._read_other(name)
        header = self._pread(30, offset)
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise DataError(f"{self.where(name)} is damaged (no header where it should begin)")
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        start = offset + 30 + name_length + extra_length
        data = self._pread(stored_size, start)
        try:
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompress(data, -zlib.MAX_WBITS)
        except zlib.error as error:
            raise DataError(f"{self.where(name)} is damaged ({error})") from error
        if len(data) != size or zlib.crc32(data) != checksum:
            raise DataError(f"{self.where(name)} is damaged (its checksum does not fit)")
        return data

    def where(self, name: str) -> str:
        """How messages call a file."""
        return f"{self.path}: {name}"

    def _read_other(self, name: str) -> bytes:
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = [entry for entry in archive.infolist() if not entry.is_dir()]
                return archive.read(entries[self._row[name]])
        except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError) as error:
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


def open_members(path: Path) -> Members:
    """The files of a folder or a `.zip` archive.

    Raises:
        DataError: the path is missing or neither of the two.
    """
    if path.is_dir():
        return FolderMembers(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix.lower() == ".zip":
        return ZipMembers(path)
    raise DataError(f"{path}: neither a folder, a .zip archive nor a .safetensors packed set")

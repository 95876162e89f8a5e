"""Files that released training code wrote, opened with nothing run.

Three containers hold the same kinds of objects: a plain pickle (`.pkl`), the ZIP of `torch.save`,
and what `torch.save` wrote before PyTorch 1.6: several pickles in a row, and then all numbers; a
fourth, safetensors, holds tensors only. The file is mapped into memory, and the numbers of a tensor
are read when it is asked for. A file that refers to anything that is not listed in `names` is
refused.
"""

from __future__ import annotations

import io
import mmap
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch

from tessera.convert.names import checkpoint_names
from tessera.convert.records import as_mapping, brief
from tessera.convert.safetensors_file import is_safetensors, read_safetensors
from tessera.errors import CheckpointError, DataError
from tessera.pickles import load_pickle
from tessera.torch_files import Storage, damage, read_torch_zip

# A pickle of the number that files of `torch.save` began with.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PROTOCOL = 1001


class Container(NamedTuple):
    """What is in a file, and how it is packed."""

    data: Any
    kind: str


def read_container(path: Path, classes: Collection[tuple[str, str]] = ()) -> Container:
    """What a checkpoint holds, with nothing run.

    Args:
        classes: (module, name) of further classes that may occur; they become records too.

    Raises:
        CheckpointError: no such file, damaged, of another kind, or it refers to what is not
            allowed; the message names it.
    """
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise DataError("it is empty")
            # Private pages: whatever writes to a tensor does not write to the file.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if mapped[:4] == b"PK\3\4":
            names = checkpoint_names(classes, _nothing_embedded)
            return Container(read_torch_zip(path, mapped, names), "torch ZIP")
        if mapped[: len(_LEGACY)] == _LEGACY:
            return Container(_read_legacy(_Mapped(mapped), classes), "old torch file")
        if is_safetensors(mapped):
            return Container(read_safetensors(mapped), "safetensors")
        return Container(_read_pickle(mapped, classes), "pickle")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except (DataError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be converted: {error}. It is damaged, or no checkpoint of the released "
            "code at all"
        ) from error


class _Mapped(io.RawIOBase):
    """A part of a mapped file as a file that is read without moving it anywhere else."""

    def __init__(self, mapped: mmap.mmap, start: int = 0, end: int | None = None) -> None:
        self.mapped, self._at = mapped, start
        self.end = len(mapped) if end is None else min(end, len(mapped))

    @property
    def stream(self) -> IO[bytes]:
        """Itself, as the type that readers ask for."""
        return cast("IO[bytes]", self)

    def read(self, size: int = -1, /) -> bytes:
        end = self.end if size < 0 else min(self._at + size, self.end)
        data = self.mapped[self._at : end]
        self._at += len(data)
        return data

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readline(self, size: int | None = -1, /) -> bytes:
        end = self.mapped.find(b"\n", self._at, self.end)
        return self.read(self.end - self._at if end < 0 else end + 1 - self._at)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._at = offset + (self._at if whence == 1 else 0)
        return self._at

    def tell(self) -> int:
        return self._at


class _Large(NamedTuple):
    """A string of bytes that stayed in the file."""

    offset: int
    size: int


# ------------------------------------------------------------------------------------ plain pickles


def _read_pickle(mapped: mmap.mmap, classes: Collection[tuple[str, str]]) -> Any:
    def embedded(data: Any) -> Storage:
        if isinstance(data, _Large):
            return _embedded(mapped, data.offset, data.offset + data.size)
        if not isinstance(data, bytes):
            raise DataError("a tensor's numbers that are no bytes")
        small = mmap.mmap(-1, max(len(data), 1))
        small[: len(data)] = data
        return _embedded(small, 0, len(data))

    names = checkpoint_names(classes, embedded)
    return load_pickle(_Mapped(mapped).stream, names, large=_Large)


def _embedded(mapped: mmap.mmap, start: int, end: int) -> Storage:
    """The storage in a whole old file of `torch.save` that is a string of a pickle."""
    if mapped[start : start + 4] == b"PK\3\4":  # which could be a bomb, and is not the old format
        raise DataError("a tensor's numbers in a ZIP of their own")
    with damage("a tensor's numbers"):
        storage = _read_legacy(_Mapped(mapped, start, end), ())
    if not isinstance(storage, Storage):
        raise DataError("something else in place of a tensor's numbers")
    return storage


# ------------------------------------------------------------------------------ old files of torch


def _nothing_embedded(data: Any) -> Storage:
    raise DataError("a tensor's numbers within the pickle of torch.save")


def _read_legacy(file: _Mapped, classes: Collection[tuple[str, str]]) -> Any:
    """Magic number, protocol, system, the object, keys of the storages; then count and numbers."""
    names = checkpoint_names(classes, _nothing_embedded)
    _, protocol, system = (load_pickle(file.stream, {}) for _ in range(3))
    if protocol != _LEGACY_PROTOCOL:
        raise DataError(f"an old file of PyTorch of protocol {brief(protocol)}")
    if not as_mapping(system, "description of the writer's machine").get("little_endian", True):
        raise DataError("its numbers are big-endian")
    storages: dict[str, Storage] = {}

    def storage(pid: Any) -> Storage:
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), str(), int(count), None):
                return storages.setdefault(
                    key, Storage(file.mapped, f"storage {key[:40]} in it", dtype, count)
                )
        raise DataError("it refers to a tensor in a way that this reader does not know")

    value = load_pickle(file.stream, names, persistent=storage)
    keys = load_pickle(file.stream, {})
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise DataError("its list of storages is not that of its tensors")
    for key in keys:
        found = storages[key]
        if int.from_bytes(file.read(8), "little", signed=True) != found.count or found.count < 0:
            raise DataError(f"{found.name} is not as long as its tensors say")
        found.offset = file.tell()
        if found.offset + found.nbytes > file.end:
            raise DataError(f"{found.name} is not whole")
        file.seek(found.nbytes, 1)
    return value

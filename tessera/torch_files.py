"""Files of `torch.save`, of which the tensors are read where they lie and nothing is run.

A tensor is a `StoredTensor`, a view of the file's bytes that is read when it is asked for.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from tessera.errors import DataError
from tessera.pickles import Names, Stand, load_pickle

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORAGES.values()}


class _Stateless:
    """What a pickle cannot change, though it has got hold of it."""

    def __setstate__(self, state: Any) -> NoReturn:
        raise TypeError("not a value with a state")


@dataclass(eq=False)
class Storage(_Stateless):
    """Numbers in a mapped file, little-endian, which tensors are views of.

    Attributes:
        file: mapped.
        name: what messages call them.
        dtype, count: their type and how many there are.
        offset: where in the file they begin; -1 while that is not known.
        checksum: CRC-32 of their bytes; None where the file has none.
    """

    file: mmap.mmap
    name: str
    dtype: torch.dtype
    count: int
    offset: int = -1
    checksum: int | None = None

    @property
    def nbytes(self) -> int:
        """How many bytes of the file they take."""
        return self.count * self.dtype.itemsize

    def read(self) -> Tensor:
        """All of them, one-dimensional, on the CPU: a view of the file.

        Raises:
            DataError: they are damaged or not in the file.
        """
        if self.offset < 0 or self.count < 0 or self.offset + self.nbytes > len(self.file):
            raise DataError(f"{self.name} is not whole")
        if self.count == 0:  # PyTorch makes no tensor of an empty buffer
            return torch.empty(0, dtype=self.dtype)
        if self.checksum is not None:
            with memoryview(self.file) as whole:
                found = zlib.crc32(whole[self.offset : self.offset + self.nbytes])
            if found != self.checksum:
                raise DataError(f"{self.name} cannot be read (Bad CRC-32)")
        return torch.frombuffer(self.file, dtype=self.dtype, count=self.count, offset=self.offset)


@dataclass(frozen=True)
class StoredTensor(_Stateless):
    """A tensor of the file: a view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view_of(self, flat: Tensor) -> Tensor:
        """The tensor, contiguous, on the CPU; a view of `flat`, all of its storage, if it can be.

        Raises:
            DataError: it is not within its storage.
        """
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        if math.prod(self.shape) > len(flat) or (0 not in self.shape and last >= len(flat)):
            raise DataError(f"a tensor of shape {self.shape} is larger than what is stored of it")
        with damage("a tensor"):
            view = flat.as_strided(self.shape, self.stride, self.offset)
            aligned = view.data_ptr() % max(view.itemsize, 1) == 0
            if aligned and view.is_contiguous():
                return view
            return view.clone(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def damage(what: str) -> Iterator[None]:
    """Everything that damaged files make readers raise, as a DataError about `what`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{what} cannot be read ({reason})") from error


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    numbers = [offset, *shape, *stride]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise DataError("a tensor of impossible shape")
    if not isinstance(storage, Storage) or len(shape) != len(stride):
        raise DataError("a tensor without its numbers")
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))


def _size(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values)


TENSOR_NAMES: Names = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): Stand(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Stand(_rebuild_tensor),
    ("torch", "Size"): Stand(_size),
    **{("torch", name): dtype for name, dtype in {**_STORAGES, **_DTYPES}.items()},
    **{("torch.cuda", name): dtype for name, dtype in _STORAGES.items()},
}
"""What the tensors of a file refer to."""


def read_torch_zip(path: Path, mapped: mmap.mmap, names: Names) -> Any:
    """What a file of `torch.save` holds, with nothing run; its tensors are `StoredTensor`.

    Args:
        mapped: the file at `path`.
        names: everything that it may refer to, see `load_pickle`.

    Raises:
        DataError: it is damaged, of another kind, or refers to anything else.
    """
    with damage("the ZIP"), zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise DataError("a ZIP without the one data.pkl that torch.save writes")
        folder = pickles[0].removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.namelist() and _read_member(archive, order).strip() != b"little":
            raise DataError("its numbers are big-endian")
        members: dict[str, Storage] = {}

        def storage(pid: Any) -> Storage:
            match pid:
                case ("storage", torch.dtype() as dtype, str(key), str(), int(count)):
                    if key not in members:
                        name = f"{folder}data/{key}"
                        members[key] = _member(archive, mapped, name, dtype, count)
                    return members[key]
            raise DataError("it refers to a tensor in a way that torch.save does not")

        program = io.BytesIO(_read_member(archive, pickles[0]))
        return load_pickle(program, names, persistent=storage)


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    with damage(f"{name} in it"):
        _stored(archive, name)
        return archive.read(name)


def _stored(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise DataError(f"{name} in it is compressed, which torch.save does not do")
    return info


def _member(
    archive: zipfile.ZipFile, mapped: mmap.mmap, name: str, dtype: torch.dtype, count: int
) -> Storage:
    """The storage that is a member of the ZIP."""
    with damage(f"{name} in it"):
        info = _stored(archive, name)
        # Its own header, whose name and extra field may have other lengths than in the directory.
        header = mapped[info.header_offset : info.header_offset + 30]
        if header[:4] != b"PK\3\4":
            raise DataError(f"{name} in it is not where the ZIP says")
        lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        offset = info.header_offset + 30 + sum(lengths)
    if info.file_size != count * dtype.itemsize:
        raise DataError(f"{name} in it has {info.file_size} bytes, not those of its tensor")
    return Storage(mapped, f"{name} in it", dtype, count, offset, info.CRC)

"""Files that the released training code of EDM and its descendants wrote, as inert values.

Two containers hold the same objects: a network snapshot (`.pkl`) is a plain pickle, a training
state (`.pt`) a ZIP of `torch.save`. Nothing of a file is run. An object becomes a `ClosedObject`
that holds the name of its class and its attributes, a tensor becomes a `StoredTensor` that is read
when it is asked for, and a file that refers to anything that is not listed here is refused.
"""

from __future__ import annotations

import contextlib
import io
import math
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from tessera.errors import CheckpointError, DataError
from tessera.pickles import BYTES, Names, Stand, load_pickle

_DTYPES = {
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

# Classes that are pickled by their import path, beside those with a source text of their own.
_PLAIN_CLASSES = (
    ("torch.nn.modules.container", "ModuleDict"),
    ("torch.nn.modules.container", "ModuleList"),
    ("torch.nn.modules.container", "Sequential"),
    ("torch.nn.modules.activation", "SiLU"),
)

_NESTING = 16  # modules within modules; the released networks have five
_TENSORS = 100_000  # of a network; the largest released one has 1,000


class _Frozen(type):
    """Classes whose attributes a pickle cannot set."""

    def __setattr__(cls, name: str, value: Any) -> NoReturn:
        raise TypeError("not a value with a state")


class ClosedObject(metaclass=_Frozen):
    """An object of the file that stays closed: the name of its class and its attributes.

    Attributes:
        class_name: without the module.
        state: the attributes by name; plain values, records and stored tensors.
    """

    class_name = ""
    state: Mapping[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.state = _mapping(state, "state of an object")


class Storage(Protocol):
    """The numbers that tensors are views of."""

    @property
    def nbytes(self) -> int:
        """How many bytes of the file they take."""
        ...

    def read(self) -> Tensor:
        """All of them, one-dimensional, on the CPU. Raises DataError if they are damaged."""
        ...


@dataclass(frozen=True)
class _Embedded:
    """A storage within the pickle: the bytes of a whole file of `torch.save` in its old format."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def read(self) -> Tensor:
        with _damage("a tensor's numbers"):
            if self.data[:4] == b"PK\3\4":  # which could be a bomb, and is not the old format
                raise DataError("a tensor's numbers in a ZIP of their own")
            storage = torch.load(io.BytesIO(self.data), map_location="cpu", weights_only=True)
            if not isinstance(storage, torch.storage.TypedStorage):
                raise DataError(f"a {type(storage).__name__} in place of a tensor's numbers")
            return torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)


@dataclass(frozen=True)
class _Member:
    """A storage that is a member of the ZIP around the pickle: little-endian numbers."""

    archive: zipfile.ZipFile
    name: str
    dtype: torch.dtype
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def read(self) -> Tensor:
        data = bytearray(_read_member(self.archive, self.name))
        if len(data) != self.count * self.dtype.itemsize:
            raise DataError(f"{self.name} in it has {len(data)} bytes, not those of its tensor")
        empty = torch.empty(0, dtype=self.dtype)  # PyTorch makes no tensor of an empty buffer
        return torch.frombuffer(data, dtype=self.dtype) if data else empty


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: a view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, contiguous, on the CPU.

        Raises:
            DataError: damaged, or not within its storage.
        """
        return self.view_of(self.storage.read())

    def view_of(self, flat: Tensor) -> Tensor:
        """As `read`, where all numbers of the storage have been read."""
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        if math.prod(self.shape) > len(flat) or (0 not in self.shape and last >= len(flat)):
            raise DataError(f"a tensor of shape {self.shape} is larger than what is stored of it")
        with _damage("a tensor"):
            view = flat.as_strided(self.shape, self.stride, self.offset)
            return view.clone(memory_format=torch.contiguous_format)


def read_container(path: Path, classes: Collection[tuple[str, str]] = ()) -> Any:
    """What a network snapshot (`.pkl`) or a training state (`.pt`) holds, with nothing run.

    Args:
        classes: (module, name) of further classes that may occur; they become records too.

    Raises:
        CheckpointError: no such file, damaged, of another kind, or it refers to what is not
            allowed; the message names it.
    """
    names = {**_NAMES, **{key: _record_class(key[1]) for key in classes}}
    try:
        with open(path, "rb") as file:
            if file.read(4) == b"PK\3\4":
                return _read_zip(path, names)
            file.seek(0)
            return load_pickle(file, names)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except (DataError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be converted: {error}. It is damaged, or no checkpoint of the released "
            "code at all"
        ) from error


def module_state(module: ClosedObject) -> dict[str, Tensor]:
    """The state dict of a recorded module: parameters and buffers of it and of its children.

    Raises:
        DataError: it is no module, a tensor is damaged, or tensors repeat what is stored once.
    """
    found: dict[str, StoredTensor] = {}
    _collect(module, "", found)
    storages = {tensor.storage for tensor in found.values()}
    stored = sum(storage.nbytes for storage in storages)
    if sum(math.prod(tensor.shape) for tensor in found.values()) > 2 * stored:
        raise DataError("its tensors have more numbers than are stored of them")
    flat = {storage: storage.read() for storage in storages}
    return {name: tensor.view_of(flat[tensor.storage]) for name, tensor in found.items()}


def _collect(module: Any, prefix: str, result: dict[str, StoredTensor]) -> None:
    if not isinstance(module, ClosedObject) or prefix.count(".") > _NESTING:
        raise DataError(f"{prefix.rstrip('.')[:80] or 'it'} is no module of a network")
    passing = module.state.get("_non_persistent_buffers_set") or ()
    tensors = [
        *_mapping(module.state.get("_parameters", {}), "_parameters").items(),
        *(
            (name, value)
            for name, value in _mapping(module.state.get("_buffers", {}), "_buffers").items()
            if name not in passing
        ),
    ]
    for name, value in tensors:
        if isinstance(value, StoredTensor):
            result[prefix + name] = value
        elif value is not None:
            raise DataError(f"{prefix}{name} is no tensor")
    for name, child in _mapping(module.state.get("_modules", {}), "_modules").items():
        if len(result) > _TENSORS:
            raise DataError(f"a network of more than {_TENSORS:,} tensors")
        if child is not None:
            _collect(child, f"{prefix}{name}.", result)


def _read_zip(path: Path, names: Names) -> Any:
    with _damage("the ZIP"):
        archive = zipfile.ZipFile(path)  # stays open while there are tensors to read from it
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise DataError("a ZIP without the one data.pkl that torch.save writes")
    folder = pickles[0].removesuffix("data.pkl")
    order = f"{folder}byteorder"
    if order in archive.namelist() and _read_member(archive, order).strip() != b"little":
        raise DataError("its numbers are big-endian")

    def storage(pid: Any) -> Storage:
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), str(), int(count)):
                return _Member(archive, f"{folder}data/{key}", dtype, count)
        raise DataError("it refers to a tensor in a way that torch.save does not")

    return load_pickle(io.BytesIO(_read_member(archive, pickles[0])), names, persistent=storage)


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    with _damage(f"{name} in it"):
        if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise DataError(f"{name} in it is compressed, which torch.save does not do")
        return archive.read(name)


@contextlib.contextmanager
def _damage(what: str) -> Iterator[None]:
    """Everything that damaged files make readers raise, as a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{what} cannot be read ({reason})") from error


# --------------------------------------------------------------- what stands for the file's names


def _persistent_object(meta: Any) -> ClosedObject:
    """An object with its class's source text, which is dropped unread."""
    meta = _mapping(meta, "description of an object")
    name = meta.get("class_name")
    if meta.get("type") != "class" or not isinstance(name, str):
        raise DataError("an object without the name of its class")
    record = ClosedObject()
    record.class_name = name
    record.__setstate__(meta.get("state"))
    return record


def _record_class(name: str) -> type[ClosedObject]:
    return cast("type[ClosedObject]", _Frozen(name, (ClosedObject,), {"class_name": name}))


def _rebuild_parameter(data: Any, requires_grad: Any = True, hooks: Any = None) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise DataError("a parameter that is no tensor")
    return data


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any,
    requires_grad: Any = False, hooks: Any = None, metadata: Any = None,
) -> StoredTensor:  # fmt: skip
    numbers = [offset, *shape, *stride]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise DataError("a tensor of impossible shape")
    if not isinstance(storage, _Embedded | _Member) or len(shape) != len(stride):
        raise DataError("a tensor without its numbers")
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))


def _embedded(data: Any) -> _Embedded:
    if not isinstance(data, bytes):
        raise DataError("a tensor's numbers that are no bytes")
    return _Embedded(data)


class _Kind(ClosedObject):
    """The type of a NumPy number, by its code."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", "|", "="):
            raise DataError("its numbers are big-endian")


def _scalar(kind: Any, data: bytes) -> bool | int | float:
    code = kind.code if isinstance(kind, _Kind) else None
    if code not in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "b1"):
        raise DataError("a NumPy number of unknown type")
    (value,) = np.frombuffer(data, np.dtype(f"<{code}")).tolist()
    result: bool | int | float = value
    return result


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise DataError(f"the {what} is not what it should be")
    return value


_NAMES: Names = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Stand(_persistent_object),
    **{key: _record_class(key[1]) for key in _PLAIN_CLASSES},
    ("dnnlib.util", "EasyDict"): OrderedDict,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch._utils", "_rebuild_parameter"): Stand(_rebuild_parameter),
    ("torch._utils", "_rebuild_tensor_v2"): Stand(_rebuild_tensor),
    ("torch.storage", "_load_from_bytes"): Stand(_embedded),
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    ("numpy", "dtype"): _Kind,
    ("numpy.core.multiarray", "scalar"): Stand(_scalar),
    ("numpy._core.multiarray", "scalar"): Stand(_scalar),
    **BYTES,
}

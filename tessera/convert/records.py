"""What stands for the objects of a file: inert records, with the tensors that are theirs.

Nothing here is what its name in the file says. An object is a `ClosedObject` with the name of its
class and its attributes, and a tensor a `StoredTensor` that is read when it is asked for.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any, NoReturn, cast

from torch import Tensor

from tessera.errors import DataError
from tessera.torch_files import StoredTensor

_NESTING = 16  # modules within modules; the released networks have eight
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
        self.state = as_mapping(state, "state of an object")


def record_class(name: str) -> type[ClosedObject]:
    """The class of the records of one class of the file."""
    return cast("type[ClosedObject]", _Frozen(name, (ClosedObject,), {"class_name": name}))


def brief(value: Any) -> str:
    """A value of a file in a message: shortened, whatever is in it."""
    return value[:40] if isinstance(value, str) else reprlib.repr(value)[:80]


def as_mapping(value: Any, what: str) -> Mapping[str, Any]:
    """`value` if it is a dictionary of texts.

    Raises:
        DataError: it is not; the message names it by `what`.
    """
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise DataError(f"the {what} is not what it should be")
    return value


def stored_tensors(module: ClosedObject) -> dict[str, StoredTensor]:
    """The parameters and buffers of a recorded module and of its children, not yet read.

    Raises:
        DataError: it is no module, or one without end.
    """
    found: dict[str, StoredTensor] = {}
    _collect(module, "", found)
    return found


def flat_tensors(values: Mapping[str, Any], what: str) -> dict[str, StoredTensor]:
    """The tensors of a state dict, not yet read.

    Raises:
        DataError: something in it is no tensor; `what` is what it should be.
    """
    if len(values) > _TENSORS:
        raise DataError(f"a network of more than {_TENSORS:,} tensors")
    wrong = [name for name, value in values.items() if not isinstance(value, StoredTensor)]
    if wrong:
        raise DataError(f"{wrong[0][:80]} in the {what} is no tensor")
    return dict(values)


def read_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors themselves, of which those that are whole and aligned are views of the file.

    Raises:
        DataError: one is damaged, or they repeat what is stored once.
    """
    check_stored(tensors)
    storages = {tensor.storage for tensor in tensors.values()}
    flat = {storage: storage.read() for storage in storages}
    return {name: tensor.view_of(flat[tensor.storage]) for name, tensor in tensors.items()}


def check_stored(tensors: Mapping[str, StoredTensor]) -> None:
    """Raise if tensors would be far larger than what is stored of them.

    Raises:
        DataError: they would.
    """
    storages = {tensor.storage for tensor in tensors.values()}
    stored = sum(storage.nbytes for storage in storages)
    numbers = sum(math.prod(t.shape) * t.storage.dtype.itemsize for t in tensors.values())
    if numbers > 2 * stored:
        raise DataError("its tensors have more numbers than are stored of them")


def module_state(module: ClosedObject) -> dict[str, Tensor]:
    """The state dict of a recorded module.

    Raises:
        DataError: see `stored_tensors` and `read_tensors`.
    """
    return read_tensors(stored_tensors(module))


def _collect(module: Any, prefix: str, result: dict[str, StoredTensor]) -> None:
    if not isinstance(module, ClosedObject) or prefix.count(".") > _NESTING:
        raise DataError(f"{prefix.rstrip('.')[:80] or 'it'} is no module of a network")
    passing = module.state.get("_non_persistent_buffers_set") or ()
    tensors = [
        *as_mapping(module.state.get("_parameters", {}), "_parameters").items(),
        *(
            (name, value)
            for name, value in as_mapping(module.state.get("_buffers", {}), "_buffers").items()
            if name not in passing
        ),
    ]
    for name, value in tensors:
        if isinstance(value, StoredTensor):
            result[prefix + name] = value
        elif value is not None:
            raise DataError(f"{prefix}{name} is no tensor")
    for name, child in as_mapping(module.state.get("_modules", {}), "_modules").items():
        if len(result) > _TENSORS:
            raise DataError(f"a network of more than {_TENSORS:,} tensors")
        if child is not None:
            _collect(child, f"{prefix}{name}.", result)

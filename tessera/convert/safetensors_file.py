"""The container of safetensors: a header of JSON, and then all numbers.

Read here and not by its library, because its tensors must be views of a file that is mapped.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import torch

from tessera.convert.records import as_mapping, brief
from tessera.errors import DataError
from tessera.plain import parse_json
from tessera.torch_files import Storage, StoredTensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def is_safetensors(mapped: mmap.mmap) -> bool:
    """Whether a file begins as those of safetensors do: a length, and that much JSON."""
    return mapped[8:9] == b"{" and _start(mapped) <= len(mapped)


def read_safetensors(mapped: mmap.mmap) -> dict[str, StoredTensor]:
    """The tensors by name, none of them read.

    Raises:
        DataError: the file is damaged.
    """
    start = _start(mapped)
    header = as_mapping(parse_json(mapped[8:start], "its header"), "header")
    return {
        name: _tensor(mapped, start, name, entry)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _start(mapped: mmap.mmap) -> int:
    """Where the numbers begin."""
    return 8 + int.from_bytes(mapped[:8], "little")


def _tensor(mapped: mmap.mmap, start: int, name: str, entry: Any) -> StoredTensor:
    match entry:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [int(first), int(last)]}:
            dtype = _DTYPES.get(code)
            whole = all(isinstance(n, int) and n >= 0 for n in shape) and 0 <= first <= last
            if dtype is not None and whole and math.prod(shape) * dtype.itemsize == last - first:
                count = math.prod(shape)
                storage = Storage(mapped, f"{brief(name)} in it", dtype, count, start + first)
                stride = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
                return StoredTensor(storage, 0, tuple(shape), tuple(stride))
    raise DataError(f"its header says of {brief(name)} what no tensor can be")

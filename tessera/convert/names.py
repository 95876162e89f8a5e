"""Everything that a checkpoint may refer to by name, and what stands for it; all else is refused.

Classes become records, functions that build tensors become functions that note where the tensor
is, and containers what they are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from tessera.convert.records import ClosedObject, as_mapping, record_class
from tessera.errors import DataError
from tessera.pickles import BYTES, Names, Stand
from tessera.torch_files import TENSOR_NAMES, Storage, StoredTensor

# Modules that are pickled by their import path, beside those with a source text of their own.
_LAYERS = {
    "activation": ("GELU", "ReLU", "SiLU", "Sigmoid", "Softmax", "Tanh"),
    "container": ("ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Sequential"),
    "conv": ("Conv1d", "Conv2d", "ConvTranspose2d"),
    "dropout": ("Dropout", "Dropout2d"),
    "linear": ("Identity", "Linear"),
    "normalization": ("GroupNorm", "LayerNorm"),
    "pooling": ("AvgPool2d",),
    "sparse": ("Embedding",),
    "upsampling": ("Upsample",),
}
_TIMM = {
    "layers.attention": ("Attention",),
    "layers.drop": ("DropPath",),
    "layers.mlp": ("Mlp",),
    "layers.patch_embed": ("PatchEmbed",),
    "models.layers.drop": ("DropPath",),
    "models.layers.mlp": ("Mlp",),
    "models.layers.patch_embed": ("PatchEmbed",),
    "models.vision_transformer": ("Attention", "Block", "LayerScale"),
}


def checkpoint_names(
    classes: Collection[tuple[str, str]], embedded: Callable[[Any], Storage]
) -> Names:
    """What stands for each name.

    Args:
        classes: (module, name) of further classes that may occur; they become records too.
        embedded: the storage in a string of bytes.
    """
    return {
        **_NAMES,
        ("torch.storage", "_load_from_bytes"): Stand(embedded),
        **{key: record_class(key[1]) for key in classes},
    }


def _persistent_object(meta: Any) -> ClosedObject:
    """An object with its class's source text, which is dropped unread."""
    meta = as_mapping(meta, "description of an object")
    name = meta.get("class_name")
    if meta.get("type") != "class" or not isinstance(name, str):
        raise DataError("an object without the name of its class")
    record = ClosedObject()
    record.class_name = name
    record.__setstate__(meta.get("state"))
    return record


def _rebuild_parameter(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise DataError("a parameter that is no tensor")
    return data


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


def _text(value: Any = "") -> str:
    """What timm's enumerations are called with."""
    if not isinstance(value, str):
        raise DataError("the name of a format that is no text")
    return value


_NAMES: Names = {
    **TENSOR_NAMES,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Stand(_persistent_object),
    **{
        (f"torch.nn.modules.{module}", name): record_class(name)
        for module, names in _LAYERS.items()
        for name in names
    },
    **{
        (f"timm.{module}", name): record_class(name)
        for module, names in _TIMM.items()
        for name in names
    },
    ("timm.layers.format", "Format"): Stand(_text),
    ("argparse", "Namespace"): record_class("Namespace"),
    ("dnnlib.util", "EasyDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch._utils", "_rebuild_parameter"): Stand(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Stand(_rebuild_parameter),
    ("torch", "device"): Stand(_text),
    ("numpy", "dtype"): _Kind,
    ("numpy.core.multiarray", "scalar"): Stand(_scalar),
    ("numpy._core.multiarray", "scalar"): Stand(_scalar),
    **BYTES,
}

"""Checkpoints in the containers of the released code, made here: recorded ones and new ones."""

from __future__ import annotations

import gzip
import pickle
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from golden_cases import GOLDEN
from torch import Tensor

SNAPSHOT, STATE = "container-network-snapshot.pkl", "container-training-state.pt"

# What the original loader would execute.
SOURCE = "open('executed', 'w').close()"


def recorded_file(name: str, folder: Path, new_name: str | None = None) -> Path:
    """A file that the released code wrote, unpacked."""
    path = folder / (new_name or name)
    path.write_bytes(gzip.decompress((GOLDEN / "edm" / f"{name}.gz").read_bytes()))
    return path


def _reconstruct_persistent_obj(meta: Any) -> None:
    raise AssertionError("the pickle ran its own function")


class Persistent:
    """An object that pickles as those of the released code do."""

    def __init__(self, class_name: str, **state: Any) -> None:
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": SOURCE,
            "class_name": class_name,
            "state": {"_init_args": (), "_init_kwargs": {}, **state},
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _reconstruct_persistent_obj, (self.meta,)


@contextmanager
def released_modules() -> Iterator[None]:
    """The names of the released code can be pickled."""
    module = types.ModuleType("torch_utils.persistence")
    _reconstruct_persistent_obj.__module__ = module.__name__
    vars(module)["_reconstruct_persistent_obj"] = _reconstruct_persistent_obj
    sys.modules.update({"torch_utils": types.ModuleType("torch_utils"), module.__name__: module})
    try:
        yield
    finally:
        for name in ("torch_utils.persistence", "torch_utils"):
            del sys.modules[name]


def network(class_name: str, tensors: Mapping[str, Tensor], **arguments: Any) -> Persistent:
    """A preconditioned network with these tensors, made with these arguments."""
    return _module(class_name, tensors, _init_kwargs=arguments)


def write_snapshot(path: Path, ema: Any, **entries: Any) -> Path:
    """A network snapshot."""
    content = {"ema": ema, "loss_fn": None, "augment_pipe": None, "dataset_kwargs": {}, **entries}
    with released_modules():
        path.write_bytes(pickle.dumps(content, 4))
    return path


def write_state(path: Path, net: Any, **entries: Any) -> Path:
    """A training state."""
    with released_modules():
        torch.save({"net": net, "optimizer_state": {}, **entries}, path)
    return path


def _module(class_name: str, tensors: Mapping[str, Tensor], **state: Any) -> Persistent:
    own = {name: value for name, value in tensors.items() if "." not in name}
    children: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name not in own:
            child, rest = name.split(".", 1)
            children.setdefault(child, {})[rest] = value
    return Persistent(
        class_name,
        _parameters={
            **{k: torch.nn.Parameter(v) for k, v in own.items() if k in ("weight", "bias")},
            "absent": None,
        },
        _buffers={k: v for k, v in own.items() if k not in ("weight", "bias")},
        _modules={name: _module("Part", inner) for name, inner in children.items()},
        **state,
    )

"""Checkpoints: a folder for each, whole or absent, with checksums; the newest good one is found.

checkpoints/000000409600/
  model.safetensors  ema-0.safetensors  optimizer.safetensors    tensors of one process, or
  shards/*.safetensors                                           those of each process (FSDP)
  state.json                                                     everything else
  checksums.json                                                 SHA-256 of each file
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from inspect import signature
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from tessera import distributed
from tessera.errors import CheckpointError
from tessera.files import (
    atomic_folder,
    read_json,
    remove_folder,
    sha256,
    write_json,
    writing,
)
from tessera.training.ema import local
from tessera.training.parallel import assign

_VERSION = 1
# The option by which every process writes its own shards; PyTorch 2.8 calls it otherwise.
_EACH_ITS_SHARD = (
    "save_distributed"
    if "save_distributed" in signature(HuggingFaceStorageWriter).parameters
    else "save_sharded"
)
_STATE, _CHECKSUMS, _SHARDS = "state.json", "checksums.json", "shards"

# What readers of PyTorch and safetensors say to files that are not what their checksums promise.
_UNREADABLE = (
    SafetensorError, OSError, LookupError, TypeError, ValueError, AssertionError, RecursionError,
    CheckpointException,
)  # fmt: skip

State = dict[str, Any]


class RunState(BaseModel):
    """The JSON values of a checkpoint.

    Attributes:
        storage: whether the tensors are whole, or in shards.
        images, step, seconds: progress.
        counters: of the learner.
        meter: sum and count of what is being averaged for the next log line.
        recipe: as plain data.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    storage: Literal["files", "shards"]
    images: NonNegativeInt
    step: NonNegativeInt
    seconds: FiniteFloat
    counters: dict[str, FiniteFloat]
    meter: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]]
    recipe: dict[str, Any]


class _NewerError(CheckpointError):
    """Written by a newer version of the library, which is no damage."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: where they are.
        keep: how many of the newest undamaged ones stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep
        self._good: dict[Path, bool] = {}  # those that were looked at or written by this process

    def save(self, images: int, tensors: dict[str, Tensor], state: State, *, sharded: bool) -> Path:
        """Write a checkpoint; all processes take part.

        Args:
            images: images seen; names the folder.
            tensors: `<group>/<name>` to tensor.
            state: JSON values.
            sharded: whether each process holds a part of the tensors.
        """
        target = self.folder / f"{images:012d}"
        with contextlib.ExitStack() as stack:
            part: Path | None = None
            if distributed.is_main():
                part = stack.enter_context(atomic_folder(target))
            part = distributed.broadcast(part)
            assert part is not None
            if sharded:
                with writing(target):
                    _save_shards(part / _SHARDS, tensors)
                distributed.barrier()
            elif distributed.is_main():
                _save_groups(part, tensors)
            if distributed.is_main():
                storage = "shards" if sharded else "files"
                write_json(part / _STATE, {"version": _VERSION, "storage": storage, **state})
                _seal(part)
        if distributed.is_main():
            self._good[target] = True
            self.prune()
        distributed.barrier()
        return target

    def newest(self) -> Path | None:
        """The newest undamaged checkpoint; damaged ones are reported on stderr. None: no one yet.

        Raises:
            CheckpointError: there are checkpoints, but every one is damaged.
        """
        found: Path | str | None = self._find_newest() if distributed.is_main() else None
        found = distributed.broadcast(found)
        if isinstance(found, str):
            raise CheckpointError(found)
        return found

    def _find_newest(self) -> Path | str | None:
        folders = self._complete()
        for folder in reversed(folders):
            damage = damage_of(folder)
            self._good[folder] = damage is None
            if damage is None:
                return folder
            print(f"warning: checkpoint {folder} is damaged: {damage}", file=sys.stderr)
        if not folders:
            return None
        return (
            f"every checkpoint in {self.folder} is damaged. Start the run again in another folder, "
            "or move the checkpoints away to start this one from the beginning"
        )

    def _complete(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if p.name.isdigit() and p.is_dir())

    def prune(self) -> None:
        """Remove what is older than the newest `keep` undamaged checkpoints."""
        folders = self._complete()
        if len(folders) <= self._keep:
            return
        good = 0
        for folder in reversed(folders):
            if good == self._keep:
                remove_folder(folder)
            else:
                good += self._is_good(folder)

    def _is_good(self, folder: Path) -> bool:
        if folder not in self._good:
            self._good[folder] = damage_of(folder) is None
        return self._good[folder]


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words that name the file; None if nothing is."""
    try:
        checksums = read_json(folder / _CHECKSUMS, _CHECKSUMS, error=CheckpointError)
    except FileNotFoundError:
        return f"{_CHECKSUMS} is missing"
    except CheckpointError as error:
        return str(error)
    if not isinstance(checksums, dict) or _STATE not in checksums:
        return f"{_CHECKSUMS} is not a list of this checkpoint's files"
    listed = {_CHECKSUMS, *checksums}
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in listed:
            return f"{path.relative_to(folder)} is not in {_CHECKSUMS}"
    for name, expected in checksums.items():
        damage = _inspect_file(folder, name, expected)
        if damage is not None:
            return damage
    try:
        read_state(folder)
    except _NewerError:
        return None
    except CheckpointError as error:
        return str(error)
    return None


def _inspect_file(folder: Path, name: str, expected: object) -> str | None:
    path = folder / name
    inside = not {"..", "."} & {*name.split("/")} and not PurePosixPath(name).is_absolute()
    try:
        if not inside or not path.is_file():
            return f"{name!r} is missing"
        if sha256(path) != expected:
            return f"{name} has changed since it was written"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except ValueError:  # a name that no file can have
        return f"{name!r} is missing"
    return None


def read_state(folder: Path) -> RunState:
    """The JSON values of a checkpoint.

    Raises:
        CheckpointError: damaged, or written by a newer version of the library.
    """
    try:
        values = read_json(folder / _STATE, _STATE, error=CheckpointError)
    except FileNotFoundError as error:
        raise CheckpointError(f"{_STATE} is missing") from error
    version = values.get("version") if isinstance(values, dict) else None
    if type(version) is int and version > _VERSION:
        raise _NewerError(
            f"checkpoint {folder} has format {version}, and this version of tessera reads "
            f"formats up to {_VERSION}; install a newer one"
        )
    try:
        return RunState.model_validate(values)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise CheckpointError(f"{_STATE} has a wrong value of {where}") from None


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill live tensors from a checkpoint, whole or sharded; it may have been written either way.

    Raises:
        CheckpointError: tensors are missing or have other shapes or types; the message names them.
    """
    try:
        if read_state(folder).storage == "shards":
            _load_shards(folder / _SHARDS, tensors)
        else:
            _load_groups(folder, tensors)
    except _UNREADABLE as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {error}") from error
    weights = [name for name in tensors if name.startswith(("model/", "ema-"))]
    for name, part in zip(weights, local(tensors[name] for name in weights), strict=True):
        if part.is_floating_point() and not part.isfinite().all():
            raise CheckpointError(
                f"checkpoint {folder}: tensor {name!r} holds NaN or infinities, from which no "
                "training goes on. Move that checkpoint away to go on from the one before"
            )


def _groups(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = tensor
    return groups


def _save_groups(folder: Path, tensors: dict[str, Tensor]) -> None:
    for group, members in _groups(tensors).items():
        plain = {name: t.detach().cpu().contiguous() for name, t in members.items()}
        save_file(plain, folder / f"{group}.safetensors")


def _load_groups(folder: Path, tensors: dict[str, Tensor]) -> None:
    for group, members in _groups(tensors).items():
        path = folder / f"{group}.safetensors"
        with safe_open(path, framework="pt") as file:
            _compare(path, members, {k: file.get_slice(k).get_shape() for k in file.keys()})  # noqa: SIM118
            for name, tensor in members.items():
                value = file.get_tensor(name)
                _compare_type(path, name, tensor, value.dtype)
                assign(tensor, value)


def _save_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    # Safetensors shards, because PyTorch's own shard format reads its index with pickle.
    options: dict[str, Any] = {_EACH_ITS_SHARD: True}
    writer = HuggingFaceStorageWriter(str(folder), **options)
    try:
        with _quiet():
            save_distributed(dict(tensors), storage_writer=writer)
    except CheckpointException as error:  # on all processes, whichever failed
        raise next(iter(error.failures.values()))[0] from error


def _load_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    reader = HuggingFaceStorageReader(str(folder))
    found = reader.read_metadata().state_dict_metadata
    stored = {k: v for k, v in found.items() if isinstance(v, TensorStorageMetadata)}
    _compare(folder, tensors, {k: list(v.size) for k, v in stored.items()})
    for name, tensor in tensors.items():
        _compare_type(folder, name, tensor, stored[name].properties.dtype)
    with _quiet():
        load_distributed(dict(tensors), storage_reader=reader)


@contextlib.contextmanager
def _quiet() -> Any:
    """Without PyTorch's remarks that there is one process only and which formats are new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _compare(path: Path, expected: dict[str, Tensor], stored: dict[str, list[int]]) -> None:
    for name, tensor in expected.items():
        if name not in stored:
            raise CheckpointError(f"{path} has no tensor {name!r}, which this recipe's model has")
        if list(tensor.shape) != list(stored[name]):
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {list(stored[name])}, "
                f"and this recipe's model expects {list(tensor.shape)}"
            )


def _compare_type(path: Path, name: str, expected: Tensor, stored: torch.dtype) -> None:
    if stored != expected.dtype:
        raise CheckpointError(
            f"{path}: tensor {name!r} is of type {stored}, "
            f"and this recipe's model expects {expected.dtype}"
        )


def _seal(folder: Path) -> None:
    """Put every file on disk, and its checksum beside it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    write_json(folder / _CHECKSUMS, {p.relative_to(folder).as_posix(): sha256(p) for p in files})

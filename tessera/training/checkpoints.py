"""Checkpoints: a folder for each, whole or absent, with checksums; the newest good one is found.

checkpoints/000000409600/
  model.safetensors  ema-0.safetensors  optimizer.safetensors    tensors of one process, or
  shards/*.safetensors                                           those of each process (FSDP)
  state.json                                                     everything else
  checksums.json                                                 SHA-256 of each file
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import warnings
from inspect import signature
from pathlib import Path
from typing import Any

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
from tessera.files import atomic_folder, sha256, write_json, writing
from tessera.training.parallel import assign

_VERSION = 1
# The option by which every process writes its own shards; PyTorch 2.8 calls it otherwise.
_EACH_ITS_SHARD = (
    "save_distributed"
    if "save_distributed" in signature(HuggingFaceStorageWriter).parameters
    else "save_sharded"
)
_STATE, _CHECKSUMS, _SHARDS = "state.json", "checksums.json", "shards"

State = dict[str, Any]


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: where they are.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

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
                self._sweep()
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
            self._prune()
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
            damage = inspect(folder)
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

    def _prune(self) -> None:
        for folder in self._complete()[: -self._keep]:
            shutil.rmtree(folder, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what a killed process left half written."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith(".") and path.suffix in (".part", ".old"):
                    shutil.rmtree(path, ignore_errors=True)


def inspect(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words that name the file; None if nothing is."""
    try:
        checksums = json.loads((folder / _CHECKSUMS).read_text())
        assert isinstance(checksums, dict)
        assert _STATE in checksums
    except FileNotFoundError:
        return f"{_CHECKSUMS} is missing"
    except (OSError, ValueError, AssertionError):
        return f"{_CHECKSUMS} cannot be read"
    for name, expected in checksums.items():
        try:
            if sha256(folder / name) != expected:
                return f"{name} has changed since it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def read_state(folder: Path) -> State:
    """The JSON values of a checkpoint.

    Raises:
        CheckpointError: written by a newer version of the library.
    """
    state: State = json.loads((folder / _STATE).read_text())
    if state["version"] > _VERSION:
        raise CheckpointError(
            f"checkpoint {folder} has format {state['version']}, and this version of tessera reads "
            f"formats up to {_VERSION}; install a newer one"
        )
    return state


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill live tensors from a checkpoint, whole or sharded; it may have been written either way.

    Raises:
        CheckpointError: tensors are missing or have other shapes; the message names them.
    """
    try:
        if read_state(folder)["storage"] == "shards":
            _load_shards(folder / _SHARDS, tensors)
        else:
            _load_groups(folder, tensors)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {error}") from error


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
                assign(tensor, file.get_tensor(name))


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
    stored = reader.read_metadata().state_dict_metadata
    sizes = {k: list(v.size) for k, v in stored.items() if isinstance(v, TensorStorageMetadata)}
    _compare(folder, tensors, sizes)
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


def _seal(folder: Path) -> None:
    """Put every file on disk, and its checksum beside it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    write_json(folder / _CHECKSUMS, {str(p.relative_to(folder)): sha256(p) for p in files})

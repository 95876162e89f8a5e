"""Every kind of file: all its tensors have a place, and nothing runs that is hidden in it."""

from __future__ import annotations

import os
import pickle
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from released_files import Persistent, released_modules, write_snapshot, write_state
from released_kinds import KINDS, places_of_weights, released
from released_states import write_torch
from typer.testing import CliRunner

from tessera.cli import app
from tessera.convert.assemble import autoencoder_in, plan_conversion
from tessera.convert.checkpoint import CheckpointFile
from tessera.convert.families import find_family, open_checkpoint
from tessera.convert.kl16 import build_autoencoder
from tessera.convert.records import StoredTensor
from tessera.convert.run import read_opened, read_part
from tessera.errors import CheckpointError, RecipeError
from tessera.pipelines.loading import load

AVERAGED_AND_RAW = {"relay.pt", "relay, old", "dit, training", "energy.pth", "mar.pth"}
TRAINED_ONLY = {"edm.pt"}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_becomes_a_pipeline(tmp_path: Path, name: str) -> None:
    """It is known by its content, all of whose tensors are used or listed with the reason."""
    kind, path = KINDS[name], released(name, tmp_path)
    path = path.rename(tmp_path / "some.file")
    source = open_checkpoint(path)
    if kind.family == "kl16":
        assert plan_conversion([path]).kind == "autoencoder"
        return
    assert find_family(source).kind == kind.family
    (part,) = plan_conversion([path], options=kind.options).parts
    states = ["raw"] if name in TRAINED_ONLY else ["ema"]
    assert [*part.states] == [*states, *(["raw"] if name in AVERAGED_AND_RAW else [])]
    ours = part.pipe.networks()[0].state_dict()
    read = read_opened(source, options=kind.options)
    for state, tensors in read.description.weights.items():
        assert part.states[state].keys() == ours.keys()
        left = [name for name in tensors if name in part.ignored]
        constants = [name for name in ours if read.description.constant(name)]
        assert len(tensors) - len(left) >= len(ours) - len(constants)
        assert all(part.ignored[name] for name in left)


# ----------------------------------------------------------------------------- tensors that differ


def plan_opened(source: CheckpointFile, options: tuple[str, ...]) -> None:
    """What `plan_conversion` does with a file that is open."""
    if (found := autoencoder_in(source)) is not None:
        build_autoencoder(found.tensors)
        return
    read_part(read_opened(source, options=options))


def added(tensors: dict[str, Any], key: str) -> None:
    tensors["odd"] = tensors[key]


def removed(tensors: dict[str, Any], key: str) -> None:
    del tensors[key]


def reshaped(tensors: dict[str, Any], key: str) -> None:
    tensor: StoredTensor = tensors[key]
    size = tensor.shape[0] * tensor.stride[0]
    tensors[key] = replace(tensor, shape=(1, 1, 1, size, 1), stride=(size, size, size, 1, 1))


@pytest.mark.parametrize("change", [added, removed, reshaped])
@pytest.mark.parametrize("name", KINDS)
def test_tensors_that_differ(
    tmp_path: Path, name: str, change: Callable[[dict[str, Any], str], None]
) -> None:
    """One more, one less, or one of another shape: the error names it."""
    source = open_checkpoint(released(name, tmp_path))
    places = [
        (tensors, key)
        for tensors, key in places_of_weights(source.data)
        if len(tensors[key].shape) > 1 and min(tensors[key].shape) > 1
    ]
    tensors, key = places[len(places) // 3]
    change(tensors, key)
    word = "odd" if change is added else key.rpartition(".")[2]
    with pytest.raises(CheckpointError, match=r"missing|unknown|shape|does not fit") as error:
        plan_opened(source, KINDS[name].options)
    assert word in str(error.value)
    assert not [*tmp_path.glob("made*")]


# ----------------------------------------------------------------------------------------- attacks


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


ATTACKS = {
    "os.system": (Call(os.system, "touch attacked"), r"(posix|nt)\.system"),
    "builtins.eval": (Call(eval, "open('attacked', 'w')"), r"(builtins|__builtin__)\.eval"),
    "a class": (Call(Path, "attacked"), "pathlib"),
}


def _with_setstate(attack: Any) -> Any:
    """An object whose state, set after it is made, is the attack."""

    class Stateful:
        def __reduce__(self) -> tuple[Any, ...]:
            return Namespace, (), attack

    return Stateful()


HIDDEN: dict[str, Callable[[Any], Any]] = {
    "state": lambda attack: Persistent("EDMPrecond", x=[{"a": attack}]),
    "inner": lambda attack: Persistent("Part", _modules={"a": Persistent("Part", x=(attack,))}),
    "namespace": lambda attack: Namespace(seed=1, device=[{"a": attack}]),
    "setstate": _with_setstate,
    "kind of a number": lambda attack: Call(np.float64(0).__reduce__()[0], attack, b"12345678"),
    "number": lambda attack: Call(np.float64(0).__reduce__()[0], np.dtype("f8"), attack),
    "parameter": lambda attack: Call(torch._utils._rebuild_parameter, attack, True, {}),
}


def _legacy(path: Path, content: Any) -> Path:
    with released_modules():
        return write_torch(path, {"net": content, "optimizer_state": {}}, old=True)


CONTAINERS: dict[str, Callable[[Path, Any], Path]] = {
    "pickle": write_snapshot,
    "zip": write_state,
    "old": _legacy,
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("place", HIDDEN)
def test_attacks_in_each_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str, place: str
) -> None:
    """By the command, looking and converting: refused by name; nothing is run or written."""
    monkeypatch.chdir(tmp_path)
    for attack, message in ATTACKS.values():
        path = CONTAINERS[container](tmp_path / "a.bin", HIDDEN[place](attack))
        for words in ([path, "made"], ["--inspect", path]):
            error = CliRunner().invoke(app, ["convert", *map(str, words)]).exception
            assert isinstance(error, CheckpointError)
            with pytest.raises(CheckpointError, match=rf"{message}.*is refused"):
                raise error
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]
        path.unlink()


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_attacks_of_each_protocol(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.pkl"
    for attack, message in ATTACKS.values():
        path.write_bytes(pickle.dumps({"ema": attack}, protocol))
        with pytest.raises(CheckpointError, match=message):
            plan_conversion([path])


# ------------------------------------------------------------------------ commands name this one


@pytest.mark.parametrize(
    "file", ["model.pkl", "model.pt", "last.pth", "dit.safetensors", "kl16.ckpt"]
)
def test_files_that_are_no_pipelines(tmp_path: Path, file: str) -> None:
    """Alone, or as all that is in a folder: the error says what to do, with its name."""
    folder = tmp_path / "downloaded"
    folder.mkdir()
    path = folder / file
    path.write_bytes(b"x")
    for source in (path, folder):
        with pytest.raises(CheckpointError, match="tessera convert") as error:
            load(source)
        assert f"tessera convert {path}" in str(error.value)
        for words in (["sample", source, "--out", tmp_path / "out"], ["push", source, "a/b"]):
            result = CliRunner().invoke(app, [*map(str, words)], env={"HF_TOKEN": "x"})
            assert f"tessera convert {path}" in str(result.exception)
    assert [entry.name for entry in tmp_path.iterdir()] == ["downloaded"]


def test_a_folder_of_another_tool(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tessera convert CHECKPOINT FOLDER"):
        load(tmp_path)


def test_the_kind_of_the_autoencoder(tmp_path: Path) -> None:
    path = released("kl16.ckpt", tmp_path)
    assert plan_conversion([path], kind="kl16").kind == "autoencoder"
    other = released("dit.pt", tmp_path)
    with pytest.raises(CheckpointError, match="is not of the kind kl16"):
        plan_conversion([other], kind="kl16")
    with pytest.raises(CheckpointError, match=r"Choose patch, .*kl16"):
        plan_conversion([other], kind="magic")


@pytest.mark.parametrize("name", ["guided, enlarging", "pdm, enlarging"])
def test_networks_that_enlarge(tmp_path: Path, name: str) -> None:
    """Their small side is in no file; behind a smaller model they are the second of a cascade."""
    kind, path = KINDS[name], released(name, tmp_path)
    with pytest.raises(CheckpointError, match="low_resolution"):
        plan_conversion([path], options=kind.options[:-1])
    (part,) = plan_conversion([path], options=kind.options).parts
    assert part.recipe.low_resolution == 8
    with pytest.raises(RecipeError, match="low_resolution"):
        plan_conversion([path], options=(*kind.options[:-1], "low_resolution=7"))

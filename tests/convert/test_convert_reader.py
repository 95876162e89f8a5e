"""Old files, training states and attacks in them: exact tensors, and nothing else."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from released_files import Persistent, write_snapshot
from released_states import RECORDED, arguments, write_torch
from torch import nn

from tessera.convert.records import ClosedObject, module_state, read_tensors
from tessera.convert.unpickle import read_container
from tessera.errors import CheckpointError, DataError
from tessera.pickles import LARGE, load_pickle
from tessera.torch_files import StoredTensor

LEGO = RECORDED / "lego-pg-cond-network-snapshot-000128.pkl"


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Own:
    """A class of the attacker's."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("attacked",)


TENSORS = {
    "float": torch.randn(3, 4),
    "whole": torch.arange(6),
    "half": torch.randn(5).bfloat16(),
    "turned": torch.arange(12.0).view(3, 4).T,
    "part": torch.arange(10.0)[3:7],
    "one": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "parameter": nn.Parameter(torch.ones(2)),
}


@pytest.mark.parametrize("old", [True, False])
def test_tensors_of_state_dicts(tmp_path: Path, old: bool) -> None:
    path = write_torch(tmp_path / "a.pt", OrderedDict(TENSORS), old=old)
    data, kind = read_container(path)
    assert kind == ("old torch file" if old else "torch ZIP")
    found = read_tensors(data)
    for name, expected in TENSORS.items():
        assert found[name].dtype == expected.dtype, name
        assert torch.equal(found[name], expected), name
        assert found[name].is_contiguous()


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "a.pt", {"x": torch.zeros(4_000_000)})
    tracemalloc.start()
    found = read_tensors(read_container(path).data)["x"]
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    # What is written to the tensor is not written to the file.
    found += 1
    assert torch.load(path, weights_only=True)["x"].sum() == 0


def test_large_strings_of_pickles_stay_in_the_file(tmp_path: Path) -> None:
    net = Persistent("Part", _buffers={"x": torch.arange(1_000_000.0)})
    path = write_snapshot(tmp_path / "a.pkl", net)
    tracemalloc.start()
    record = read_container(path).data["ema"]
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert torch.equal(module_state(record)["x"], torch.arange(1_000_000.0))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_without_their_large_strings(protocol: int) -> None:
    strings = [bytes([n]) * (LARGE + n - 1) for n in range(1, 4)]
    value = {"a": strings[0], "b": [strings[1], strings[0], "x"], "c": (strings[2], b"small")}
    data = b"before" + pickle.dumps(value, protocol) + b"behind"
    file = io.BytesIO(data)
    file.seek(6)
    names = {("_codecs", "encode"): lambda text, _: text.encode("latin1")}
    found = load_pickle(file, names, large=lambda at, size: data[at : at + size])
    assert found == value
    assert file.read() == b"behind"
    if protocol > 2:
        file.seek(6)
        spared = load_pickle(file, names, large=lambda at, size: size)
        assert spared["c"] == (len(strings[2]), b"small")


def test_namespaces_are_plain(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "a.pt", {"args": arguments(lr_schedule="cosine", seed=3)})
    record = read_container(path).data["args"]
    assert (record.class_name, record.state["seed"], record.state["lr"]) == ("Namespace", 3, None)
    assert not isinstance(record, argparse.Namespace)


def test_recorded_layers_are_records() -> None:
    classes = [
        ("training.lego_models", name)
        for name in (
            "DiTBlock", "FinalLayer", "LEGO", "LEGO_module", "LabelEmbedder",
            "PositionalEmbedding", "TimestepEmbedder",
        )
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"training\.lego_models\.LEGO,? which may run code"):
        read_container(LEGO)
    stack = read_container(LEGO, classes).data["ema"].state["_modules"]["model"]
    brick = stack.state["_modules"]["model"].state["_modules"]["0"]
    embedder = brick.state["_modules"]["x_embedder"]
    assert (embedder.class_name, embedder.state["output_fmt"]) == ("PatchEmbed", "NCHW")
    assert type(embedder).__mro__[1] is ClosedObject


def test_storages_of_other_devices() -> None:
    """A file that was saved on a GPU by an old PyTorch names its class of storages."""
    program = b"ctorch.cuda\nFloatStorage\n."
    Path("a.pkl").write_bytes(program)
    assert read_container(Path("a.pkl")).data is torch.float32


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


ATTACKS = {
    "system": (Call(os.system, "touch attacked"), r"(posix|nt)\.system"),
    "eval": (Call(eval, "open('attacked', 'w')"), r"builtins\.eval|__builtin__\.eval"),
    "reduce": (Own(), r"\.mkdir"),
    "class": (argparse.ArgumentParser, r"argparse\.ArgumentParser"),
}
PLACES = ("tensor", "key", "namespace", "optimizer", "number", "metadata")


def hidden(attack: Any, place: str) -> Any:
    """A training state with an attack in it."""
    rebuild, (storage, *_), *_ = torch.arange(4.0).__reduce_ex__(2)
    numbers: Any = np.float64(0).__reduce__()[0]
    match place:
        case "tensor":
            return {"model": {"x": Call(rebuild, storage, 0, (1,), (1,), False, attack)}}
        case "key":
            return {"model": {(1, attack): 3}}
        case "namespace":
            return {"args": argparse.Namespace(seed=1, device=[{"a": attack}])}
        case "optimizer":
            return {"opt": {"state": {0: {"exp_avg": attack}}, "param_groups": []}}
        case "number":
            return {"epoch": Call(numbers, attack, b"12345678")}
    content: OrderedDict[str, Any] = OrderedDict(x=torch.ones(2))
    content._metadata = attack  # type: ignore[attr-defined]
    return content


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_on_training_states(tmp_path: Path, attack: str, place: str, old: bool) -> None:
    value, message = ATTACKS[attack]
    path = write_torch(tmp_path / "a.pt", hidden(value, place), old=old)
    with pytest.raises(CheckpointError, match=message) as error:
        read_container(path)
    assert "is refused" in str(error.value)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("number", range(5))
def test_attacks_in_each_pickle_of_an_old_file(tmp_path: Path, number: int) -> None:
    """Magic number, protocol, system, object and keys are a pickle each."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, []]
    parts[number] = Call(os.system, "touch attacked")
    path = tmp_path / "a.pt"
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    with pytest.raises(CheckpointError, match=r"system, which may run code"):
        read_container(path)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("parts", "rest", "message"),
    [
        ([1000, {}, {}, []], b"", "protocol 1000"),
        ([1001, {"little_endian": False}, {}, []], b"", "big-endian"),
        ([1001, [], {}, []], b"", "writer's machine"),
        ([1001, {}, {}, ["0"]], b"", "list of storages"),
        ([1001, {}, {}, 3], b"", "list of storages"),
    ],
)
def test_odd_old_files(tmp_path: Path, parts: list[Any], rest: bytes, message: str) -> None:
    path = tmp_path / "a.pt"
    whole = [0x1950A86A20F9469CFC6C, *parts]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in whole) + rest)
    with pytest.raises(CheckpointError, match=message):
        read_container(path)


@pytest.mark.parametrize("cut", [0.001, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("old", [True, False])
def test_truncated(tmp_path: Path, cut: float, old: bool) -> None:
    path = write_torch(tmp_path / "a.pt", {"x": torch.ones(5000)}, old=old)
    data = path.read_bytes()
    (tmp_path / "b.pt").write_bytes(data[: int(cut * len(data))])
    with pytest.raises(CheckpointError, match="It is damaged"):
        read_container(tmp_path / "b.pt")


def test_what_a_pickle_has_got_hold_of_stays_as_it_is() -> None:
    """Tensors and storages have no state that a pickle could set."""
    tensor = StoredTensor.__new__(StoredTensor)
    with pytest.raises(TypeError):
        tensor.__setstate__({"shape": (10**9,)})
    with pytest.raises(DataError):
        load_pickle(io.BytesIO(b"\x80\x02K\x01Q."), {}, large=lambda at, size: size)

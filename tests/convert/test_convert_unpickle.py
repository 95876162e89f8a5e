"""Reading the released containers: exact tensors, and nothing else."""

from __future__ import annotations

import builtins
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import load, weights
from released_files import SNAPSHOT, STATE, Persistent, recorded_file, write_snapshot, write_state

from tessera.convert.records import ClosedObject, module_state
from tessera.convert.unpickle import read_container
from tessera.errors import CheckpointError, DataError


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("file", "entry"), [(SNAPSHOT, "ema"), (STATE, "net")])
def test_recorded_tensors(tmp_path: Path, file: str, entry: str) -> None:
    record = read_container(recorded_file(file, tmp_path)).data[entry]
    expected = weights(load("edm", "train"), f"out.{entry}.")
    state = module_state(record)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert all(state[name].is_contiguous() for name in state)
    assert record.class_name == "EDMPrecond"
    assert record.state["_init_kwargs"]["model_type"] == "SongUNet"


def test_recorded_values(tmp_path: Path) -> None:
    data = read_container(recorded_file(SNAPSHOT, tmp_path)).data
    block = data["ema"].state["_modules"]["model"].state["_modules"]["enc"].state["_modules"]
    assert block["8x8_block0"].state["skip_scale"] == pytest.approx(0.5**0.5)
    assert type(block["8x8_block0"].state["skip_scale"]) is float
    assert data["loss_fn"].state["P_mean"] == -1.2
    assert data["dataset_kwargs"]["max_size"] == 10


def test_the_source_text_is_dropped_unread(tmp_path: Path) -> None:
    for path in (
        write_snapshot(tmp_path / "a.pkl", Persistent("EDMPrecond", x=1)),
        write_state(tmp_path / "a.pt", Persistent("EDMPrecond", x=1)),
    ):
        (record,) = (v for v in read_container(path).data.values() if isinstance(v, ClosedObject))
        assert record.state["x"] == 1
        assert "executed" not in str(vars(record))
        assert not (tmp_path / "executed").exists()


TENSORS = {
    "dtype": torch.arange(6, dtype=torch.int64),
    "bf16": torch.randn(4).bfloat16(),
    "strided": torch.arange(12.0).view(3, 4).T,
    "part": torch.arange(10.0)[3:7],
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
}


@pytest.mark.parametrize("name", TENSORS)
def test_views_and_types(tmp_path: Path, name: str) -> None:
    net = Persistent("Part", _buffers={"weight": TENSORS[name]})
    for path in (write_snapshot(tmp_path / "a.pkl", net), write_state(tmp_path / "a.pt", net)):
        (record,) = (v for v in read_container(path).data.values() if isinstance(v, ClosedObject))
        (found,) = module_state(record).values()
        assert found.dtype == TENSORS[name].dtype
        assert torch.equal(found, TENSORS[name])


def test_buffers_that_are_not_saved(tmp_path: Path) -> None:
    buffers = {"kept": torch.ones(1), "left": torch.ones(1)}
    net = Persistent("Part", _buffers=buffers, _non_persistent_buffers_set={"left"})
    data = read_container(write_snapshot(tmp_path / "a.pkl", net)).data
    assert list(module_state(data["ema"])) == ["kept"]


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


ATTACKS = {
    "system": (Call(os.system, "touch attacked"), r"(posix|nt)\.system"),
    "eval": (Call(eval, "open('attacked', 'w')"), r"builtins\.eval|__builtin__\.eval"),
    "getattr": (Call(getattr, Call(getattr, "", "join"), "__self__"), r"builtin.*\.getattr"),
    "import": (Call(builtins.__import__, "antigravity"), "__import__"),
    "nested": (OrderedDict(a=[{"b": (Call(os.mkdir, "attacked"),)}]), r"\.mkdir"),
    "torch": (Call(torch.load, "attacked"), r"torch\.serialization\.load"),
    "class": (Path("attacked"), "pathlib"),
}


@pytest.mark.parametrize("place", ["entry", "state", "init", "state dict"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused(tmp_path: Path, attack: str, place: str) -> None:
    value, message = ATTACKS[attack]
    net, entries = Persistent("EDMPrecond"), {}
    match place:
        case "entry":
            entries = {"more": value}
        case "state":
            net.meta["state"]["x"] = value
        case "init":
            net.meta["state"]["_init_kwargs"] = {"img_resolution": value}
        case "state dict":
            net.meta["state"]["_parameters"] = {"weight": value}
    for path in (
        write_snapshot(tmp_path / "a.pkl", net, **entries),
        write_state(tmp_path / "a.pt", net, **entries),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            read_container(path)
        assert "is refused" in str(error.value)
        assert str(path) in str(error.value)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    "name",
    [
        "os\nsystem",
        "torch\nstorage._load_from_bytes",
        "collections\nOrderedDict.fromkeys",
        "torch_utils.persistence\n_module_to_src",
        "torch.nn.modules.container\nModuleDict.pop",
    ],
)
def test_names_are_taken_whole(tmp_path: Path, name: str) -> None:
    module, attribute = name.split("\n")
    text = b"".join(b"\x8c" + bytes([len(p)]) + p.encode() for p in (module, attribute))
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04" + text + b"\x93.")
    with pytest.raises(CheckpointError, match="which may run code"):
        read_container(tmp_path / "a.pkl")


def test_an_attack_within_a_tensor(tmp_path: Path) -> None:
    attack = pickle.dumps(Call(os.mkdir, "attacked"), 2)
    storage = Call(torch.storage._load_from_bytes, attack)
    tensor = Call(torch._utils._rebuild_tensor_v2, storage, 0, (1,), (1,), False, OrderedDict())
    path = write_snapshot(tmp_path / "a.pkl", Persistent("Part", _buffers={"x": tensor}))
    with pytest.raises(CheckpointError, match=r"\.mkdir, which may run code"):
        read_container(path)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (3, (2,), (1,)),
        (0, (5,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (100,), (0,)),
        (0, (0, 10**30), (1, 1)),
    ],
)
def test_tensors_stay_within_their_numbers(
    tmp_path: Path, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    real = torch.arange(4.0)
    rebuild, (storage, *_), *_ = real.__reduce_ex__(2)
    tensor = Call(rebuild, storage, offset, shape, stride, False, OrderedDict())
    path = write_snapshot(tmp_path / "a.pkl", Persistent("Part", _buffers={"x": tensor}))
    with pytest.raises(
        DataError, match=r"larger than what is|more numbers than are|cannot be read"
    ):
        module_state(read_container(path).data["ema"])


@pytest.mark.parametrize(
    "arguments",
    [(-1, (1,), (1,)), (0, (1, 1), (1,)), (0, (-1,), (1,)), (0, ("1",), (1,)), (0, 3, 3)],
)
def test_impossible_tensors(tmp_path: Path, arguments: tuple[Any, ...]) -> None:
    rebuild, (storage, *_), *_ = torch.arange(4.0).__reduce_ex__(2)
    tensor = Call(rebuild, storage, *arguments, False, OrderedDict())
    path = write_snapshot(tmp_path / "a.pkl", Persistent("Part", _buffers={"x": tensor}))
    with pytest.raises(CheckpointError, match=r"a\.pkl"):
        read_container(path)


def test_a_module_within_itself(tmp_path: Path) -> None:
    net = Persistent("Part")
    children: dict[str, Any] = {}
    net.meta["state"]["_modules"] = children
    children["again"] = Persistent("Part", _modules=children)
    data = read_container(write_snapshot(tmp_path / "a.pkl", net)).data
    with pytest.raises(DataError, match="no module"):
        module_state(data["ema"])


@pytest.mark.parametrize("file", [SNAPSHOT, STATE])
def test_truncated(tmp_path: Path, file: str) -> None:
    path = recorded_file(file, tmp_path)
    data = path.read_bytes()
    for share in (0, 0.001, 0.3, 0.9, 0.9999):
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(CheckpointError, match="It is damaged"):
            read_container(path)


def test_damaged_members(tmp_path: Path) -> None:
    path = recorded_file(STATE, tmp_path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        numbers = archive.read("archive/data/6")
    data[data.index(numbers) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="CRC"):
        module_state(read_container(path).data["net"])


def repacked(path: Path, compression: int, **changes: bytes) -> Path:
    """A ZIP with other members."""
    made = path.with_name("other.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, changes.get(name.rsplit("/", 1)[1].split(".")[0], old.read(name)))
    return made


def test_other_zips(tmp_path: Path) -> None:
    path = write_state(tmp_path / "a.pt", Persistent("Part", _buffers={"x": torch.ones(9)}))
    with pytest.raises(CheckpointError, match="compressed"):
        read_container(repacked(path, zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="big-endian"):
        read_container(repacked(path, zipfile.ZIP_STORED, byteorder=b"big"))
    with pytest.raises(CheckpointError, match="has 4 bytes"):
        read_container(repacked(path, zipfile.ZIP_STORED, **{"0": b"1234"}))
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.png", b"")
    with pytest.raises(CheckpointError, match=r"without the one data\.pkl"):
        read_container(tmp_path / "photos.zip")


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "text.pkl").write_text("not a pickle")
    with pytest.raises(CheckpointError, match=r"text\.pkl cannot be converted"):
        read_container(tmp_path / "text.pkl")
    with pytest.raises(CheckpointError, match="no such file"):
        read_container(tmp_path / "absent.pkl")


def test_numpy_numbers(tmp_path: Path) -> None:
    numbers = [np.float64(0.1), np.float32(0.5), np.int64(-3), np.bool_(True)]
    path = write_snapshot(tmp_path / "a.pkl", Persistent("Part", numbers=numbers))
    assert read_container(path).data["ema"].state["numbers"] == [0.1, 0.5, -3, True]
    kind = Call(np.dtype, "O")
    attack = Call(np.float64(0).__reduce__()[0], kind, b"12345678")
    path = write_snapshot(tmp_path / "b.pkl", Persistent("Part", numbers=attack))
    with pytest.raises(CheckpointError, match="unknown type"):
        read_container(path)


def test_classes_of_another_family(tmp_path: Path) -> None:
    module = types.ModuleType("training.models")
    kind = type("DiTBlock", (), {"__module__": module.__name__})
    vars(module)["DiTBlock"] = kind
    block = kind()
    vars(block).update(_buffers={"weight": torch.ones(2)})
    sys.modules[module.__name__] = module
    try:
        path = write_snapshot(tmp_path / "a.pkl", Persistent("Part", _modules={"0": block}))
    finally:
        del sys.modules[module.__name__]
    with pytest.raises(CheckpointError, match=r"training\.models\.DiTBlock"):
        read_container(path)
    data = read_container(path, {("training.models", "DiTBlock")}).data
    assert data["ema"].state["_modules"]["0"].class_name == "DiTBlock"
    assert list(module_state(data["ema"])) == ["0.weight"]


def test_the_classes_of_records_stay_as_they_are() -> None:
    """A pickle that sets an attribute of a class that it can name."""
    name = b"ctorch.nn.modules.container\nModuleDict\n"
    state = b"N}X\x0a\x00\x00\x00class_nameK\x01s\x86"
    Path("a.pkl").write_bytes(b"\x80\x02" + name + state + b"b.")
    with pytest.raises(CheckpointError):
        read_container(Path("a.pkl"))
    Path("a.pkl").write_bytes(b"\x80\x02" + name + b".")
    assert read_container(Path("a.pkl")).data.class_name == "ModuleDict"

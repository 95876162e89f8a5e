"""Checkpoints that are damaged, by chance or with intent."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_case import tiny_recipe

from tessera.errors import CheckpointError, TesseraError
from tessera.files import sha256
from tessera.training.checkpoints import Checkpoints, damage_of, load_tensors, read_state
from tessera.training.trainer import Trainer

STATE = {
    "images": 8,
    "step": 1,
    "seconds": 0.5,
    "counters": {"skipped": 0.0},
    "meter": {"loss": [1.0, 8.0]},
    "recipe": {"name": "tiny"},
}


def tensors(value: float) -> dict[str, Tensor]:
    return {
        "model/weight": torch.full((4, 3), value),
        "ema-0/weight": torch.full((4, 3), value),
        "optimizer/weight.step": torch.tensor(value),
    }


def save(folder: Path, *images: int, keep: int = 9, sharded: bool = False) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for number in images:
        checkpoints.save(number, tensors(number), {**STATE, "images": number}, sharded=sharded)
    return checkpoints


def seal(folder: Path) -> None:
    """Checksums of the files as they are, as somebody would who means harm."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "checksums.json"]
    sums = {str(p.relative_to(folder)): sha256(p) for p in files}
    (folder / "checksums.json").write_text(json.dumps(sums))


def names(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.iterdir())


def damage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"damaged")


def test_damaged_checkpoints_do_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 8, 16, 24)
    damage(tmp_path / "000000000024")
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.newest() == tmp_path / "000000000016"
    assert "000000000024 is damaged: model.safetensors has changed" in capsys.readouterr().err
    for number in (18, 20):
        checkpoints.save(number, tensors(number), {**STATE, "images": number}, sharded=False)
        assert Checkpoints(tmp_path, 1).newest() == tmp_path / f"{number:012d}"
    assert names(tmp_path) == [20, 24]
    for number in (24, 28):
        checkpoints.save(number, tensors(number), {**STATE, "images": number}, sharded=False)
    assert names(tmp_path) == [28]


def test_damage_between_good_ones_does_not_count_either(tmp_path: Path) -> None:
    save(tmp_path, 8, 16, 24, 32)
    damage(tmp_path / "000000000024")
    Checkpoints(tmp_path, keep=2).prune()
    assert names(tmp_path) == [16, 24, 32]


DEEP = b'{"a":' * 100_000


@pytest.mark.parametrize("name", ["checksums.json", "state.json"])
@pytest.mark.parametrize("content", [DEEP, b"[" * 100 + b"]" * 100, b"[]", b"", b"\xff"])
def test_json_that_is_nested_or_none_is_damage(name: str, content: bytes, tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 8, 16)
    folder = tmp_path / "000000000016"
    (folder / name).write_bytes(content)
    if name == "state.json":
        seal(folder)
    assert name in str(damage_of(folder))
    assert checkpoints.newest() == tmp_path / "000000000008"


@pytest.mark.parametrize(
    "listed",
    [
        {"/dev/zero": "0"},
        {"../000000000008/state.json": "0"},
        {"./model.safetensors": "0"},
        {"": "0"},
        {"a\0b": "0"},
        {"x" * 5000: "0"},
        {"more": "0"},
        {"model.safetensors": None},
        {"model.safetensors": ["0"]},
    ],
)
def test_checksums_name_files_of_the_checkpoint(listed: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path, 8)
    path = tmp_path / "000000000008" / "checksums.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | listed))
    assert damage_of(tmp_path / "000000000008")


def test_files_without_a_checksum_are_damage(tmp_path: Path) -> None:
    save(tmp_path, 8)
    path = tmp_path / "000000000008" / "checksums.json"
    sums = json.loads(path.read_text())
    del sums["model.safetensors"]
    path.write_text(json.dumps(sums))
    assert damage_of(tmp_path / "000000000008") == "model.safetensors is not in checksums.json"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("images", -1),
        ("images", "8"),
        ("storage", "pickle"),
        ("counters", {"skipped": "x"}),
        ("counters", {"skipped": None}),
        ("meter", {"loss": [1.0]}),
        ("recipe", []),
        ("seconds", float("nan")),
        ("step", None),
    ],
)
def test_states_of_other_values_are_damage(key: str, value: Any, tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 8, 16)
    folder = tmp_path / "000000000016"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {key: value}))
    seal(folder)
    assert f"state.json has a wrong value of {key}" in str(damage_of(folder))
    assert checkpoints.newest() == tmp_path / "000000000008"


def test_a_newer_format_is_no_damage(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 8, 16)
    folder = tmp_path / "000000000016"
    (folder / "state.json").write_text('{"version": 99}')
    seal(folder)
    assert checkpoints.newest() == folder
    with pytest.raises(CheckpointError, match=r"format 99.*install a newer"):
        read_state(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_of_another_type_are_refused(sharded: bool, tmp_path: Path) -> None:
    save(tmp_path, 8, sharded=sharded)
    for dtype in (torch.int32, torch.complex64, torch.bool):
        with pytest.raises(CheckpointError, match=r"'model/weight'|'weight'"):
            load_tensors(
                tmp_path / "000000000008",
                {**tensors(0), "model/weight": torch.zeros(4, 3, dtype=dtype)},
            )


# ------------------------------------------------------------------------------------- fuzzing

FORBIDDEN = (
    "pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn",
    "os.spawn", "socket.connect",
)  # fmt: skip
_guarded: list[list[str]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _guarded and event in FORBIDDEN:
        _guarded[-1].append(f"{event}{arguments}")


sys.addaudithook(_audit)


@contextmanager
def nothing_executed() -> Iterator[None]:
    seen: list[str] = []
    _guarded.append(seen)
    try:
        yield
    finally:
        _guarded.pop()
    assert seen == []


@st.composite
def mutations(draw: st.DrawFn) -> Any:
    """A function of bytes: flipped, cut, repeated or replaced parts; or another file altogether."""
    kind = draw(st.sampled_from(["flip", "cut", "insert", "swap", "whole"]))
    place = draw(st.floats(0, 1))
    piece = draw(
        st.one_of(
            st.binary(min_size=1, max_size=12),
            st.sampled_from(
                [b"\x80\x04cos\nsystem\n(S'true'\ntR.", DEEP, b"NaN", b'"', b"\xff" * 8, b"null"]
            ),
        )
    )
    words = draw(
        st.tuples(
            st.sampled_from([b"F32", b"weight", b"images", b"files", b"version", b"4,3", b"1.0"]),
            st.sampled_from([b"I32", b"C64", b"shards", b"BF16", b"4,4", b"-1", b"1e999", b"[]"]),
        )
    )

    def mutate(content: bytes) -> bytes:
        at = int(place * len(content))
        if kind == "flip":
            return content[:at] + bytes(b ^ 0x55 for b in piece) + content[at + len(piece) :]
        if kind == "cut":
            return content[:at]
        if kind == "insert":
            return content[:at] + piece + content[at:]
        return content.replace(*words) if kind == "swap" else piece

    return mutate


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole checkpoints of both kinds, two of each."""
    folder = tmp_path_factory.mktemp("originals")
    save(folder / "files", 8, 16)
    save(folder / "shards", 8, 16, sharded=True)
    return folder


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    kind=st.sampled_from(["files", "shards"]),
    which=st.integers(0, 9),
    mutate=mutations(),
    sealed=st.booleans(),
)
def test_mutated_checkpoints_are_used_whole_or_refused(
    kind: str,
    which: int,
    mutate: Any,
    sealed: bool,
    originals: Path,
    tmp_path: Path,
) -> None:
    shutil.rmtree(tmp_path)
    shutil.copytree(originals / kind, tmp_path)
    newest = tmp_path / "000000000016"
    files = sorted(p for p in newest.rglob("*") if p.is_file())
    path = files[which % len(files)]
    path.write_bytes(mutate(path.read_bytes()))
    if sealed:
        seal(newest)
    live = tensors(0)
    with nothing_executed():
        try:
            found = Checkpoints(tmp_path, 2).newest()
            assert found is not None
            state = read_state(found)
            load_tensors(found, live)
        except TesseraError:
            assert sealed  # otherwise there is the checkpoint before
            return
    if not sealed:
        assert found.name == f"{state.images:012d}"
        expected = tensors(state.images)
        assert all(torch.equal(live[name], expected[name]) for name in expected)


def test_resuming_a_hostile_checkpoint(tmp_path: Path) -> None:
    """Values that fit their types, and nothing else."""
    trainer = Trainer(tiny_recipe(tmp_path, training={"images": 8}), tmp_path / "run")
    trainer.run()
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    good = json.loads((folder / "state.json").read_text())
    for change, message in (
        ({"counters": {}}, "counter 'loss_scale'"),
        ({"counters": {**good["counters"], "skipped": 1e300}}, "counter 'skipped'"),
        ({"recipe": {}}, "network"),
        ({"recipe": {**good["recipe"], "name": [[1]]}}, "name"),
        ({"recipe": {**good["recipe"], "optimizer": {"lr": 1}}}, "cannot change optimizer"),
    ):
        (folder / "state.json").write_text(json.dumps({**good, **change}))
        seal(folder)
        with nothing_executed(), pytest.raises(TesseraError, match=message):
            Trainer(resume=tmp_path / "run")
    (folder / "state.json").write_text(json.dumps(good))
    model = load_file(folder / "model.safetensors")
    name = next(iter(model))
    save_file({**model, name: model[name].int()}, folder / "model.safetensors")
    seal(folder)
    with pytest.raises(CheckpointError, match=r"of type torch\.int32"):
        Trainer(resume=tmp_path / "run")

"""One job at a time in a run folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from forked import Forked, fork
from training_case import start, tiny_recipe, write_recipe

from tessera import processes
from tessera.errors import TrainingError
from tessera.training import run_lock
from tessera.training.trainer import Trainer

HOLD = """
import sys
from pathlib import Path
from tessera.training import run_lock
with run_lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> Forked:
    """A process that has the lock until its input ends."""
    process = fork([folder], code=HOLD, stdin=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def enter(folder: Path) -> dict[str, Any]:
    """Have the lock for a moment; what it said."""
    with run_lock.hold(folder):
        content: dict[str, Any] = json.loads((folder / run_lock.LOCK).read_text())
    return content


def test_the_lock_names_its_holder_and_goes(tmp_path: Path) -> None:
    content = enter(tmp_path)
    assert (content["host"], content["process"]) == (processes.host(), os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_another_process_is_named_and_kept_out(tmp_path: Path) -> None:
    process = holder(tmp_path)
    before = (tmp_path / run_lock.LOCK).read_bytes()
    with pytest.raises(TrainingError, match=rf"process {process.pid} on .* since .*rm .*run\.lock"):
        enter(tmp_path)
    assert (tmp_path / run_lock.LOCK).read_bytes() == before
    process.communicate()  # ends the block
    assert enter(tmp_path)["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.kill()
    process.communicate()
    assert (tmp_path / run_lock.LOCK).exists()
    assert enter(tmp_path)["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({"started": 1}, True),  # the number was given anew
        ({"process": os.getpid()}, True),  # a training that this process has left
        ({"namespace": "elsewhere", "host": "node7"}, False),
        ({"namespace": "elsewhere", "process": 2**22 + 1}, False),
        ({"process": "1"}, False),
        ({"process": -1}, False),
    ],
)
def test_locks_of_others(change: dict[str, Any], taken: bool, tmp_path: Path) -> None:
    parent = os.getppid()
    lock = {
        "host": processes.host(),
        "process": parent,
        "since": "today",
        "namespace": processes.namespace(),
        "started": processes.started(parent),
        "token": "x",
    }
    path = tmp_path / run_lock.LOCK
    path.write_text(json.dumps(lock | change))
    if taken and (lock["started"] is not None or "started" not in change):
        assert enter(tmp_path)["process"] == os.getpid()
        assert not path.exists()
    else:
        with pytest.raises(TrainingError, match=r"is in use.*rm "):
            enter(tmp_path)
        assert json.loads(path.read_text()) == lock | change


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 4000, b"{" * 5000])
def test_a_lock_that_cannot_be_read_is_one(content: bytes, tmp_path: Path) -> None:
    (tmp_path / run_lock.LOCK).write_bytes(content)
    with pytest.raises(TrainingError, match=r"is in use: process \? on an unknown host"):
        enter(tmp_path)


def test_a_lock_that_others_took_over_is_left_to_them(tmp_path: Path) -> None:
    path = tmp_path / run_lock.LOCK
    with run_lock.hold(tmp_path):
        path.write_text('{"token": "of another"}')
    assert path.exists()


def test_two_trainings_in_one_folder(tmp_path: Path) -> None:
    recipe, run_dir = tiny_recipe(tmp_path, training={"images": 16}), tmp_path / "run"
    Trainer(recipe, run_dir)  # begins the run, and takes no step
    process = holder(run_dir)
    with pytest.raises(TrainingError, match=f"process {process.pid}"):
        Trainer(resume=run_dir)
    command = start("train", "--resume", str(run_dir))
    _, errors = command.communicate()
    assert command.returncode == 2
    assert f"process {process.pid}" in errors
    assert "Traceback" not in errors
    again = start("train", str(write_recipe(tmp_path, recipe)), f"run.dir={run_dir}")
    assert again.wait() == 2
    process.communicate()
    waiting = Trainer(resume=run_dir)
    process = holder(run_dir)
    with pytest.raises(TrainingError, match=f"process {process.pid}"):
        waiting.run()
    assert sorted(p.name for p in run_dir.iterdir()) == ["recipe.yaml", run_lock.LOCK]
    process.communicate()
    waiting.run()
    assert not (run_dir / run_lock.LOCK).exists()


def test_a_run_is_not_saved_while_another_job_has_its_folder(tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(tmp_path, training={"images": 16}), tmp_path / "run")
    trainer.run()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    process = holder(tmp_path / "run")
    with pytest.raises(TrainingError, match=f"process {process.pid}"):
        trainer.save()
    process.communicate()
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert {path: time for path, time in after.items() if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }
    trainer.save()

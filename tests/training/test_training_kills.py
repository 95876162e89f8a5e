"""A run killed at any moment and resumed is, to the last byte, the run that never was."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from crash_states import CrashStates, contents, fingerprint
from training_case import tiny_recipe

import tessera
from tessera.errors import TrainingError
from tessera.recipes.schema import Recipe
from tessera.training import run_folder, tracking, trainer
from tessera.training.trainer import Trainer

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {
    "network": {"model_channels": 4, "channel_mult": [1], "attn_resolutions": []},
    "training": {"images": 16},
    "sampling": {"kind": "edm", "steps": 1},
    "run": {
        "log_every_images": 8,
        "checkpoint_every_images": 8,
        "keep": 1,
        "preview": {"every_images": 16, "rows": 1, "columns": 1},
    },
}

EVERY = 11  # state of a first kill after which the states of a second are looked at


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times and memory are in the files, and are all that may differ."""
    monkeypatch.setattr(trainer.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(tracking, "memory_gb", lambda device: 0.0)


def go_on(recipe: Recipe, run_dir: Path) -> None:
    """What the user does: the same command, or, once there is a run, --resume."""
    if (run_dir / "recipe.yaml").exists():
        Trainer(resume=run_dir).run()
    else:
        Trainer(recipe, run_dir).run()


def test_every_state_that_kills_can_leave_ends_as_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path, **SMALL)
    run_dir = tmp_path / "run"
    states = CrashStates(run_dir, tmp_path / "states")
    with states.watched(monkeypatch):
        go_on(recipe, run_dir)
    whole = contents(run_dir)
    assert states.moments > 100
    assert len(states.found) > 40
    pipeline = [name for name in whole if name.startswith("pipeline/")]
    assert sorted(pipeline) == ["pipeline/config.json", "pipeline/model.safetensors"]

    # Of some, what is left by a second kill, while the run is resumed.
    waiting, done = [*states.found.items()], set(states.found)
    for number, (key, state) in enumerate(waiting):
        shutil.rmtree(run_dir, ignore_errors=True)
        if state.exists():
            shutil.copytree(state, run_dir)
        assert fingerprint(run_dir) == key
        again = CrashStates(run_dir, tmp_path / f"again-{number}")
        twice = number % EVERY == 0 and number < len(states.found)
        with again.watched(monkeypatch) if twice else contextlib.nullcontext():
            go_on(recipe, run_dir)
        assert contents(run_dir).keys() == whole.keys(), state
        assert contents(run_dir) == whole, state
        new = {k: path for k, path in again.found.items() if k not in done}
        waiting += new.items()
        done |= new.keys()


def test_a_pipeline_behind_its_checkpoint_is_mended(tmp_path: Path) -> None:
    recipe, run_dir = tiny_recipe(tmp_path, **SMALL), tmp_path / "run"
    Trainer(recipe, run_dir).run()
    whole = contents(run_dir)
    weights = run_dir / "pipeline" / "model.safetensors"

    shutil.rmtree(run_dir / "pipeline")
    Trainer(resume=run_dir).run()
    assert contents(run_dir) == whole
    weights.write_bytes(b"damaged")
    Trainer(resume=run_dir).run()
    assert contents(run_dir) == whole
    before = weights.stat().st_ino
    Trainer(resume=run_dir).run()
    assert weights.stat().st_ino == before  # what is whole is not written again

    # A recipe that is changed where it may be reaches the pipeline.
    Trainer(run_folder.read_recipe(run_dir, ["sampling.steps=3"]), resume=run_dir).run()
    assert tessera.load(run_dir).recipe.sampling.steps == 3


def test_a_pipeline_ahead_of_a_damaged_checkpoint_stays(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, **{**SMALL, "run": {**SMALL["run"], "keep": 2}})
    run_dir = tmp_path / "run"
    Trainer(recipe, run_dir).run()
    (run_dir / "checkpoints" / "000000000016" / "model.safetensors").write_bytes(b"damaged")
    trainer = Trainer(resume=run_dir)
    assert trainer.images_seen == 8
    steps = trainer.steps()
    assert tessera.load(run_dir).images_seen == 16
    assert next(steps).images == 16
    steps.close()
    assert tessera.load(run_dir).images_seen == 16


def test_left_overs_of_every_kind_go_and_files_of_others_stay(tmp_path: Path) -> None:
    recipe, run_dir = tiny_recipe(tmp_path, **SMALL), tmp_path / "run"
    Trainer(recipe, run_dir).run()
    whole = contents(run_dir)
    tag = "00000000-17.abcdefgh"  # of another machine, and nobody has the lock
    for name in (
        ".recipe.yaml.abcdefgh.part",  # as earlier versions called them
        f".metrics.jsonl.{tag}.part",
        f".run.lock.{tag}.part",
        f"previews/.000000000008.png.{tag}.part",
    ):
        (run_dir / name).write_text("half")
    for name in (".best.abcdefgh.part", f"checkpoints/.000000000008.{tag}.old"):
        (run_dir / name / "within").mkdir(parents=True)
    for name in (".notes.old", ".my.own.part", "checkpoints/notes.part"):
        (run_dir / name).write_text("somebody's")
    Trainer(resume=run_dir).run()
    others = {".notes.old", ".my.own.part", "checkpoints/notes.part"}
    assert contents(run_dir) == whole | dict.fromkeys(others, b"somebody's")


def test_a_folder_with_files_of_others_takes_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.yaml.abcdefgh.part").touch()
    (tmp_path / "run" / "notes.txt").touch()
    before = contents(tmp_path / "run")
    with pytest.raises(TrainingError, match="not empty"):
        Trainer(tiny_recipe(tmp_path, **SMALL), tmp_path / "run")
    assert contents(tmp_path / "run") == before

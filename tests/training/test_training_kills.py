"""A run killed at any moment and resumed is, to the last byte, the run that never was."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from crash_states import CrashStates, contents, fingerprint
from training_case import tiny_recipe

from tessera.recipes.schema import Recipe
from tessera.training import tracking, trainer
from tessera.training.trainer import Trainer

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

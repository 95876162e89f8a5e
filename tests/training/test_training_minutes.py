"""Runs that end by time."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_case import read_metrics, tiny_recipe

from tessera.training import run_folder, trainer
from tessera.training.forecast import Timings
from tessera.training.trainer import Trainer


class SlowClock(trainer.Clock):
    """A minute passes with each look at it."""

    @property
    def seconds(self) -> float:
        self.looks = getattr(self, "looks", -1) + 1
        return self._start_seconds + 60.0 * self.looks

    def __init__(self, seconds: float, images: int) -> None:
        super().__init__(seconds, images)
        self._start_seconds = seconds


def test_a_run_ends_well_when_its_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "Clock", SlowClock)
    recipe = tiny_recipe(tmp_path, training={"minutes": 5})
    run = Trainer(recipe, tmp_path / "run")
    run.run()
    assert 0 < run.images_seen < 96
    assert run.stopped_by is None
    assert read_metrics(run.run_dir)[-1]["images"] == run.images_seen
    assert (run.run_dir / "checkpoints" / f"{run.images_seen:012d}").is_dir()
    assert (run.run_dir / "pipeline").is_dir()
    again = Trainer(resume=run.run_dir)
    again.run()
    assert again.images_seen == run.images_seen
    assert run_folder.longer(recipe) == "training.images=192 training.minutes=10"
    changed = run_folder.read_recipe(run.run_dir, ["training.images=48", "training.minutes=1000"])
    longer = Trainer(changed, resume=run.run_dir)
    longer.run()
    assert longer.images_seen == 48


def test_without_minutes_the_images_count(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    assert run_folder.longer(recipe) == "training.images=192"
    run = Trainer(tiny_recipe(tmp_path, training={"minutes": 1e6}), tmp_path / "run")
    run.run()
    assert run.images_seen == 96


def test_the_forecast_ends_with_the_time(tmp_path: Path) -> None:
    timings = Timings({(8, None, None): 8.0}, 0, 0, 0, 0)  # a second for each image
    from tessera.recipes.build import build_view

    recipe = tiny_recipe(tmp_path, training={"minutes": 1})
    view = build_view(recipe)
    assert timings.forecast(recipe, view, 0).seconds == pytest.approx(60)
    assert timings.forecast(recipe, view, 8, elapsed=50).seconds == pytest.approx(10)
    assert timings.forecast(recipe, view, 8, elapsed=70).seconds == 0

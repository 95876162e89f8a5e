"""Time and memory told beforehand: what counts, and that the run does not notice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from training_case import read_metrics, tiny_recipe, write_recipe
from typer.testing import CliRunner

from tessera.cli import app
from tessera.data.views import FullView, PatchSize, PatchView
from tessera.progress import duration
from tessera.training import probe
from tessera.training.feed import Feed
from tessera.training.forecast import Timings, course, seconds_per_image
from tessera.training.tracking import StatusLines
from tessera.training.trainer import Trainer

CPU = torch.device("cpu")
SIZES = [PatchSize(4, 0.5, 4), PatchSize(8, 0.5, 1)]


def measured(recipe: Any, seconds: float = 0.05) -> Timings:
    return probe.measure(recipe, Feed(recipe, CPU), CPU, seconds)


# --------------------------------------------------------------------------------- the arithmetic


def test_steps_previews_scores_and_checkpoints_are_added(tmp_path: Path) -> None:
    run = {
        "checkpoint_every_images": 32,
        "preview": {"every_images": 40},
    }
    recipe = tiny_recipe(tmp_path, run=run, evaluate={"every_images": 50, "metrics": "fd"})
    parts = Timings(
        {(8, None, None): 2.0}, preview=10.0, scores=100.0, checkpoint=1.0, memory_bytes=7
    )
    whole = parts.forecast(recipe, FullView(8), 0)
    # After 32, 64, 96; 40, 80, 96; 50, 96 of 96 images.
    assert whole.extra_seconds == 3 * 1 + 3 * 10 + 2 * 100
    assert whole.seconds == 12 * 2.0 + whole.extra_seconds
    assert whole.images_per_second == 4
    assert whole.memory_bytes == 7
    rest = parts.forecast(recipe, FullView(8), 64)
    assert (rest.extra_seconds, rest.seconds) == (1 + 2 * 10 + 100, 8 + 121)
    assert parts.forecast(recipe, FullView(8), 96).seconds == 0


@pytest.mark.parametrize("total", [4_000, 4_000_000])
@pytest.mark.parametrize("progressive", [False, True])
def test_every_size_of_patch_counts_as_often_as_it_comes(total: int, progressive: bool) -> None:
    view = PatchView(8, 8, SIZES, seed=1, progressive=progressive, total_images=total)
    windows, plans = course(view, 0, total)
    assert set(plans) == {(32, 4, None), (8, 8, None)}
    assert all(plan.kind == kind for kind, plan in plans.items())
    seconds = {(32, 4, None): 1.0, (8, 8, None): 3.0}
    # By steps, or by images: one second for 32 images and three for 8.
    expected = (1 / 32 + 3 / 8) / 2 if progressive else 4 / 40
    assert seconds_per_image(windows, seconds) == pytest.approx(expected, rel=0.1)
    steps = sum(windows, Counter()).total()
    assert steps <= 10_000 if total < 10**6 else steps == 50 * 200


# ------------------------------------------------------------------------------------- measuring


class Clock:
    """Time passes in `Learner.update` only, a second for each image."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(probe, "time", clock)
    step = probe._Bench._step

    def slow(self: Any, batch: Any) -> float:
        step(self, batch)
        clock.now += 3 + len(batch.numbers)
        counts.append(len(batch.numbers))
        return 3.0 + len(batch.numbers)

    counts: list[int] = []
    clock.counts = counts  # type: ignore[attr-defined]
    monkeypatch.setattr(probe._Bench, "_step", slow)
    monkeypatch.setattr(probe, "_SHARE", 1.0)
    return clock


@pytest.mark.parametrize(("seconds", "tried"), [(150.0, 32), (60.0, 14)])
def test_steps_that_take_too_long_are_told_from_smaller_ones(
    clock: Any, seconds: float, tried: int, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path, training={"batch": 32, "images": 10**5})
    found = measured(recipe, seconds)
    assert (min(clock.counts), max(clock.counts)) == (1, tried)
    assert found.steps == {(32, None, None): pytest.approx(35.0)}


@pytest.mark.parametrize(("others", "alone"), [(0.05, 1.0), (0.5, 0.4), (0.99, 0.4)])
def test_waiting_for_other_programs_is_told_apart(
    others: float, alone: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a step's five seconds its two threads worked two each."""
    watch = Clock()
    monkeypatch.setattr(probe, "time", watch)
    monkeypatch.setattr(watch, "process_time", lambda: 0.8 * watch.now, raising=False)
    monkeypatch.setattr(probe, "cores", lambda: 2)
    monkeypatch.setattr(probe, "_BUSY", 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(probe.OtherPrograms, "share", lambda self: others)
    update = probe.Learner.update

    def slow(self: Any, *arguments: Any) -> Any:
        watch.now += 5
        return update(self, *arguments)

    monkeypatch.setattr(probe.Learner, "update", slow)
    found = measured(tiny_recipe(tmp_path, training={"images": 8}))
    assert (found.others, found.alone) == (others, pytest.approx(alone))
    forecast = found.forecast(tiny_recipe(tmp_path), FullView(8), 0)
    assert forecast.alone == pytest.approx(forecast.images_per_second / alone)


def test_patches_of_each_size_are_measured(clock: Any, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path,
        coords={},
        view={"kind": "patches", "real_p": 0.5},
        training={"images": 10**5},
    )
    view = Feed(recipe, CPU).view
    found = measured(recipe, 400)
    assert found.steps == {
        (8 * size.multiplier, size.side, None): pytest.approx(3.0 + 8 * size.multiplier)
        for size in view.sizes
    }


def test_reading_counts_where_it_is_the_slower_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe._Bench, "_reading", lambda self: (2.0, 0.5))
    monkeypatch.setattr(probe._Bench, "_step_seconds", lambda self, batch, left: 3.0)
    assert measured(tiny_recipe(tmp_path)).steps == {(8, None, None): 16.0}
    alone = tiny_recipe(tmp_path, data={"workers": 0})
    assert measured(alone).steps == {(8, None, None): 19.0}


def test_a_tiny_run_is_hardly_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    step = probe._Bench._step
    monkeypatch.setattr(
        probe._Bench, "_step", lambda self, batch: steps.append(1) or step(self, batch)
    )
    measured(tiny_recipe(tmp_path, training={"images": 8}), 5.0)
    assert len(steps) == 4


def test_previews_scores_and_checkpoints_are_measured(tmp_path: Path) -> None:
    plain = measured(tiny_recipe(tmp_path))
    assert plain.preview == plain.scores == 0
    assert plain.checkpoint > 0
    assert plain.memory_bytes > 10**8, "the libraries alone take that"
    recipe = tiny_recipe(
        tmp_path, run={"preview": {"rows": 1, "columns": 2}}, evaluate={"images": 200}
    )
    found = measured(recipe)
    assert found.scores == pytest.approx(100 * found.preview)
    assert found.preview > 0


# ------------------------------------------------------------------------------- the run after it


@pytest.mark.parametrize("resumed", [False, True])
def test_the_run_does_not_notice(resumed: bool, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, augment={"p": 0.5}, run={"tensorboard": False})
    weights, lines = [], []
    for probed in (False, True):
        folder = tmp_path / str(probed)
        if resumed:
            steps = Trainer(recipe, folder).steps()
            for _ in range(5):
                next(steps)
            steps.close()
            trainer = Trainer(resume=folder, probe=probed)
        else:
            trainer = Trainer(recipe, folder, probe=probed)
        assert (trainer.forecast is not None) == probed
        trainer.run()
        weights.append(trainer.learner.tensors())
        lines.append(read_metrics(folder))
        assert not list(folder.glob(".*"))
    assert lines[0] == lines[1]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_the_table_of_a_run_tells_time_and_memory(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_recipe(tmp_path, training={"images": 16}))
    run = CliRunner().invoke(app, ["train", str(recipe), f"run.dir={tmp_path / 'run'}"])
    assert run.exit_code == 0, run.output
    assert "time here" in run.stdout
    assert "memory here" in run.stdout


@pytest.mark.parametrize("latents", [False, True])
def test_cost_probes_without_data(latents: bool) -> None:
    name = "patch-lsun256-latent" if latents else "quickstart-digits"
    tiny = ["training.images=64", "training.batch=8", "training.micro_batch=null",
            "data.resolution=32", "network.model_channels=32", "network.channel_mult=[1]",
            "network.num_blocks=1", "network.attn_resolutions=[]", "run.preview=null",
            "run.tensorboard=false"]  # fmt: skip
    arguments = ["cost", name, *tiny, "--probe"]
    plain = CliRunner().invoke(app, [*arguments, "--json"])
    assert plain.exit_code == 0, plain.output
    found = json.loads(plain.output)["probe"]  # and nothing else is printed
    assert found["seconds"] > 0
    assert found["memory_bytes"] > 10**8
    if not latents:
        table = CliRunner().invoke(app, arguments)
        assert "from blank images: about" in " ".join(table.stdout.split())


def test_durations() -> None:
    shown = [duration(seconds) for seconds in (1.26, 59, 130, 1800, 3600 * 3, 86400 * 12)]
    assert shown == ["1.3 s", "59 s", "2.2 min", "30 min", "3.0 h", "12 days"]


def test_no_time_is_left_after_the_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"images": 1024, "images_per_second": 8.0, "loss_per_pixel": 0.5, "skipped": 0}
    StatusLines(1000).log(metrics | {"memory_gb": 1.0})
    assert "0:00:00 left" in capsys.readouterr().err

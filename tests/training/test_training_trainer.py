"""Whole runs on one process: resuming, stopping, damaged checkpoints, errors."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_case import read_metrics, start, tiny_recipe, write_recipe

import tessera
from tessera.errors import CheckpointError, RecipeError, TesseraError, TrainingError
from tessera.recipes.loading import dump_recipe, load_recipe, parse_recipe
from tessera.training import run_folder
from tessera.training.trainer import Trainer


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    folder = sorted((run_dir / "checkpoints").iterdir())[-1]
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= {f"{path.stem}/{k}": v for k, v in load_file(path).items()}
    return found


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights, averages, moments and metrics, to the last bit."""
    assert read_metrics(one) == read_metrics(other)
    expected, actual = final_state(one), final_state(other)
    assert expected.keys() == actual.keys()
    assert {name.split("/")[0] for name in expected} == {"model", "ema-0", "ema-1", "optimizer"}
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def recipe(folder: Path):
    # Checkpoints (40 images) fall between log lines (24), and two averages are kept.
    return tiny_recipe(
        folder,
        augment={"p": 0.5, "yflip": 1},
        ema=[{"halflife_images": 50}, {"halflife_images": 20, "rampup_ratio": None}],
        training={"images": 160, "micro_batch": 4},
        run={"log_every_images": 24, "checkpoint_every_images": 40, "keep": 2},
    )


@pytest.fixture(scope="module")
def whole(recipe, folder: Path) -> Path:
    """A run that was never stopped."""
    run_dir = folder / "whole"
    reports = list(Trainer(recipe, run_dir).steps())
    assert [r.images for r in reports] == list(range(8, 161, 8))
    assert [r.images for r in reports if r.metrics] == [8, 24, 48, 72, 96, 120, 144, 160]
    return run_dir


def test_run_folder(whole: Path, recipe) -> None:
    assert load_recipe(whole / "recipe.yaml") == recipe
    assert [p.name for p in sorted((whole / "checkpoints").iterdir())] == [
        "000000000120", "000000000160",
    ]  # fmt: skip
    lines = read_metrics(whole)
    assert [x["images"] for x in lines] == [8, 24, 48, 72, 96, 120, 144, 160]
    assert lines[0]["lr"] == 0
    assert all(x["loss"] == pytest.approx(192 * x["loss_per_pixel"]) for x in lines)
    pipe = tessera.load(whole)
    assert pipe.images_seen == 160
    averaged = load_file(sorted((whole / "checkpoints").iterdir())[-1] / "ema-0.safetensors")
    for name, parameter in pipe.denoiser.named_parameters():
        assert torch.equal(parameter, averaged[f"denoiser.{name}"])


@pytest.mark.parametrize("stop_after", [1, 5, 9])
def test_abandoned_run_resumes_bit_identically(
    stop_after: int, whole: Path, recipe, folder: Path
) -> None:
    run_dir = folder / f"abandoned-{stop_after}"
    steps = Trainer(recipe, run_dir).steps()
    for _ in range(stop_after):
        next(steps)
    steps.close()
    Trainer(resume=run_dir).run()
    assert_same_run(whole, run_dir)


def test_killed_run_resumes_bit_identically(whole: Path, recipe, folder: Path) -> None:
    run_dir = folder / "killed"
    process = start("train", str(write_recipe(folder, recipe)), f"run.dir={run_dir}")
    lines = random.randint(1, 6)
    metrics = run_dir / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= lines:
            process.kill()
            break
        time.sleep(0.002)
    process.communicate()
    (run_dir / "checkpoints" / ".000000000080.x.part").mkdir(parents=True, exist_ok=True)
    resumed = start("train", "--resume", str(run_dir))
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    assert_same_run(whole, run_dir)
    assert not list((run_dir / "checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_says_how_to_go_on(
    number: signal.Signals, whole: Path, recipe, folder: Path
) -> None:
    run_dir = folder / f"stopped-{number.name}"
    process = start("train", str(write_recipe(folder, recipe)), f"run.dir={run_dir}")
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 1):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    output, errors = process.communicate()
    assert process.returncode == 128 + number, errors
    assert f"tessera train --resume {run_dir}" in output
    assert "Traceback" not in errors
    saved = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert saved
    Trainer(resume=run_dir).run()
    assert_same_run(whole, run_dir)


def test_damaged_checkpoint_falls_back(
    whole: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = folder / "damaged"
    shutil.copytree(whole, run_dir)
    newest = run_dir / "checkpoints" / "000000000160"
    path = newest / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    trainer = Trainer(resume=run_dir)
    assert trainer.images_seen == 120
    message = capsys.readouterr().err
    assert "000000000160" in message
    assert "optimizer.safetensors" in message
    trainer.run()
    assert_same_run(whole, run_dir)
    for checkpoint in (run_dir / "checkpoints").iterdir():
        (checkpoint / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        Trainer(resume=run_dir)


def test_finished_run_is_extended(whole: Path, recipe, folder: Path) -> None:
    run_dir = folder / "extended"
    shutil.copytree(whole, run_dir)
    assert list(Trainer(resume=run_dir).steps()) == []
    longer = run_folder.read_recipe(run_dir, ["training.images=200"])
    Trainer(longer, resume=run_dir).run()
    assert read_metrics(run_dir)[-1]["images"] == 200
    assert read_metrics(run_dir)[:8] == read_metrics(whole)
    assert load_recipe(run_dir / "recipe.yaml").training.images == 200


def test_a_recipe_in_memory_continues_its_own_run(whole: Path, recipe) -> None:
    assert recipe.optimizer.final_lr == 0  # the default, which the file gives as 0.0
    trainer = Trainer(recipe, resume=whole)
    assert trainer.images_seen == 160


def test_resume_refuses_what_would_change_the_past(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"optimizer\.lr.*start a new run"):
        run_folder.read_recipe(whole, ["optimizer.lr=0.1", "training.images=500"])
    with pytest.raises(CheckpointError, match=r"not the folder of a run"):
        Trainer(resume=tmp_path)


def test_resume_refuses_to_end_before_where_the_run_is(whole: Path, folder: Path) -> None:
    run_dir = folder / "shorter"
    shutil.copytree(whole, run_dir)
    recorded = (run_dir / "recipe.yaml").read_bytes()
    for images in (100, 159):
        with pytest.raises(RecipeError, match=rf"training\.images={images}.*seen 160 images"):
            Trainer(run_folder.read_recipe(run_dir, [f"training.images={images}"]), resume=run_dir)
    assert (run_dir / "recipe.yaml").read_bytes() == recorded
    # The last step of a run may pass its end.
    (run_dir / "recipe.yaml").write_bytes(recorded.replace(b"images: 160", b"images: 155"))
    assert list(Trainer(resume=run_dir).steps()) == []


def test_run_goes_on_from_another_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    recipe = tiny_recipe(folder, data={"path": "tiny.safetensors"}, training={"images": 8})
    Trainer(recipe, tmp_path / "run").run()
    monkeypatch.chdir(tmp_path)
    assert Trainer(resume="run").images_seen == 8
    path = tmp_path / "run" / "recipe.yaml"
    assert load_recipe(path).data.path == str(folder / "tiny.safetensors")
    assert tessera.load("run").recipe == load_recipe(path)

    # Of a run that recorded it as it was given, or whose images have moved.
    path.write_text(path.read_text().replace(str(folder), "moved"))
    with pytest.raises(RecipeError, match=r"nothing at .*moved/tiny.* data\.path="):
        Trainer(resume="run")
    moved = run_folder.read_recipe("run", [f"data.path={folder / 'tiny.safetensors'}"])
    Trainer(moved, resume="run").run()
    assert load_recipe(path).data.path == str(folder / "tiny.safetensors")


def test_paths_of_scores_are_recorded_absolute(recipe, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = {"metrics": ["fid"], "features": "inception", "weights": "w.pt", "reference": "r.npz"}
    scored = parse_recipe({**dump_recipe(recipe), "evaluate": section})
    found = run_folder.anchored(scored).evaluate
    assert found is not None
    assert (found.weights, found.reference) == (str(tmp_path / "w.pt"), str(tmp_path / "r.npz"))
    assert run_folder.anchored(recipe) == recipe


@pytest.mark.parametrize("content", ["[" * 100_000, "{a: " * 100_000, "a: &a [*a]", "\x00", "- 1"])
def test_a_damaged_recipe_is_an_error_in_words(content: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        Trainer(resume=tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "[[]]", "\x00", ""])
def test_a_damaged_pipeline_is_an_error_in_words(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        tessera.load(tmp_path)


def test_existing_folder_is_not_overwritten(whole: Path, recipe) -> None:
    with pytest.raises(TrainingError, match=r"tessera train --resume .*whole"):
        Trainer(recipe, whole)


def test_default_folder_is_numbered(
    recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny-007").mkdir(parents=True)
    assert Trainer(recipe).run_dir == Path("runs/tiny-008")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"resolution": 16}}, r"8x8 pixels, but data\.resolution is 16"),
        ({"data": {"channels": 1}}, r"3 channels, but data\.channels is 1"),
        ({"data": {"num_classes": 5}}, r"2 classes, but data\.num_classes is 5"),
        ({"data": {"path": None}}, r"data\.path is not set"),
    ],
)
def test_unfit_data_names_the_key(change, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        Trainer(tiny_recipe(folder, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_persistent_failure_stops_and_keeps_the_last_good(folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        folder, training={"images": 400, "max_skipped": 3}, run={"log_every_images": 8}
    )
    trainer = Trainer(recipe, tmp_path / "run")
    steps = trainer.steps()
    while next(steps).images < 40:
        pass
    trainer.learner.step.objective = lambda denoiser, x, cond, draws: {
        "loss": denoiser(x, x.new_ones(len(x)), cond).mean.sum((1, 2, 3)) * torch.nan
    }
    with pytest.raises(TrainingError, match=r"last 4 steps in a row.*000000000032"):
        list(steps)
    # 64 images: a checkpoint is due, in the middle of bad steps.
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [p.name for p in checkpoints.iterdir()] == ["000000000032"]
    assert tessera.load(tmp_path / "run").images_seen == 32
    lines = read_metrics(tmp_path / "run")
    assert (lines[-1]["skipped"], lines[-1]["loss"], lines[-1]["grad_norm"]) == (3, None, None)


def test_bad_steps_delay_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(folder, run={"keep": 9}), tmp_path / "run")
    good = trainer.learner.step.objective

    def bad(denoiser, x, cond, draws):
        return {"loss": good(denoiser, x, cond, draws)["loss"] * torch.inf}

    for report in trainer.steps():
        trainer.learner.step.objective = bad if report.images in (24, 32) else good
    saved = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["000000000048", "000000000064", "000000000096"]


def test_weights_that_are_not_finite_are_not_saved(folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(folder), tmp_path / "run")
    steps = trainer.steps()
    while next(steps).images < 56:
        pass
    with torch.no_grad():
        trainer.learner.parameters[0].fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"weights are not finite.*000000000032"):
        list(steps)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["000000000032"]


def test_previews_and_tensorboard(folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        folder,
        training={"images": 32},
        run={"tensorboard": True, "preview": {"every_images": 16, "rows": 2, "columns": 3}},
    )
    Trainer(recipe, tmp_path / "run").run()
    assert [p.name for p in sorted((tmp_path / "run" / "previews").iterdir())] == [
        "000000000016.png", "000000000032.png",
    ]  # fmt: skip
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_steps_between_log_lines_never_wait(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(folder, run={"log_every_images": 64})
    waits: list[str] = []
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        real = getattr(torch.Tensor, name)

        def counted(self, *args, real=real, name=name):
            waits.append(name)
            return real(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    silent = []
    before = len(waits)
    for report in Trainer(recipe, tmp_path / "run").steps():
        if report.images > 8 and report.images % 32:
            silent.append(len(waits) - before)
        before = len(waits)
    assert silent == [0] * len(silent)
    assert len(silent) == 8
    assert waits


def test_command_describes_the_run(folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_recipe(folder, training={"images": 16}))
    process = start("train", str(recipe), f"run.dir={tmp_path / 'run'}", "optimizer.lr=1e-3")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    output = " ".join(output.split())
    for words in ("tiny", "30 images, 8x8, colour, 2 classes", "fp32", "tessera sample"):
        assert words in output
    again = start("train", str(recipe), f"run.dir={tmp_path / 'run'}")
    output, errors = again.communicate()
    assert again.returncode == 2
    assert "--resume" in errors
    assert "Traceback" not in errors


def test_a_recipe_or_a_run_is_needed() -> None:
    with pytest.raises(TesseraError):
        Trainer()


def test_training_starts_from_the_weights_of_a_pipeline(recipe, whole: Path, folder: Path) -> None:
    later = tiny_recipe(
        folder,
        augment={"p": 0.5, "yflip": 1},
        training={"initial_weights": str(whole), "seed": 9},
    )
    trainer = Trainer(later, folder / "warm")
    average = trainer.learner.average(0)
    expected = load_file(whole / "pipeline" / "model.safetensors")
    actual = trainer.learner.step.model.network.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name
        assert torch.equal(tensor, average[f"network.{name}"]), name


def test_initial_weights_of_another_network_are_refused(whole: Path, folder: Path) -> None:
    other = tiny_recipe(folder, network={"num_blocks": 2}, training={"initial_weights": str(whole)})
    with pytest.raises(CheckpointError, match=r"training\.initial_weights.*missing"):
        Trainer(other, folder / "other-network")

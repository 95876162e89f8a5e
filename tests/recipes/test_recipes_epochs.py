"""Numbers of images in epochs, and learning rates that follow the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_files import random_images, write_packed
from hypothesis import given
from hypothesis import strategies as st
from own_parts import dataset as own_dataset
from training_case import start, tiny_recipe, write_recipe

from tessera.errors import RecipeError
from tessera.recipes.loading import dump_recipe, load_recipe, parse_recipe
from tessera.recipes.parts import Parts
from tessera.recipes.schema import OptimizerConfig, TrainingConfig
from tessera.training import run_folder
from tessera.training.learner import fresh_model, learner_of
from tessera.training.trainer import Trainer

KEYS = (
    "training.images",
    "run.log_every_images",
    "run.checkpoint_every_images",
    "run.histograms_every_images",
    "run.preview.every_images",
    "evaluate.every_images",
    "validation.every_images",
    "optimizer.rampup_images",
    "optimizer.decay_start_images",
    "ema.0.halflife_images",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("epochs") / "images.safetensors"
    return write_packed(path, random_images(30), labels=[i % 2 for i in range(30)])


def value(recipe: Any, key: str) -> Any:
    for part in key.split("."):
        recipe = recipe[int(part)] if part.isdecimal() else getattr(recipe, part)
    return recipe


def load(data: Path, *changes: str) -> Any:
    keys = [f"data.path={data}", "data.resolution=8", "data.channels=3", "data.num_classes=2"]
    return load_recipe("quickstart-digits", [*keys, *changes])


@pytest.mark.parametrize("key", KEYS)
def test_every_number_of_images_of_a_run_may_be_in_epochs(data: Path, key: str) -> None:
    assert value(load(data, f"{key}=20 epochs"), key) == 600


@pytest.mark.parametrize(
    ("text", "images"),
    [("1 epoch", 30), ("2epochs", 60), ("0.5 epochs", 15), (".1 epochs", 3), ("1.05 epochs", 32)],
)
def test_how_epochs_are_written(data: Path, text: str, images: int) -> None:
    assert load(data, f"training.images={text}").training.images == images


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        (["data.xflip=true"], 30),
        (["data.max_images=12"], 12),
        (["data.max_images=20", "data.held_out=0.25", "data.xflip=true"], 15),
    ],
)
def test_an_epoch_is_what_is_trained_on_once(data: Path, changes: list[str], images: int) -> None:
    assert load(data, *changes, "training.images=1 epoch").training.images == images


def test_recipe_files_and_own_data_sets(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "base: quickstart-digits\ntraining: {images: 3 epochs}\n"
        f"data: {{path: {data}, resolution: 8, channels: 3, num_classes: 2}}\n"
    )
    assert load_recipe(path).training.images == 90
    own = Parts(dataset=own_dataset)
    changes = [
        "data.resolution=8",
        "data.channels=3",
        "data.num_classes=2",
        "training.images=2 epochs",
    ]
    recipe = load_recipe("quickstart-digits", changes, own)
    assert recipe.training.images == 2 * len(own_dataset(recipe))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.images=2 epoks", "training.images: expected a whole number"),
        ("training.images=-1 epochs", "training.images: expected a whole number"),
        ("training.images=0 epochs", "training.images: must be greater than 0"),
        ("evaluate.images=2 epochs", "evaluate.images: expected a whole number"),
    ],
)
def test_what_is_no_number_of_epochs(data: Path, change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(data, change)


def test_epochs_need_data() -> None:
    with pytest.raises(RecipeError, match=r"as long as the data set, and data\.path is not set"):
        load_recipe("quickstart-digits", ["training.images=2 epochs"])
    with pytest.raises(ValueError, match="load_recipe"):
        TrainingConfig.model_validate({"images": "2 epochs"})


def test_runs_record_images_and_may_be_extended_by_epochs(tmp_path: Path) -> None:
    data = dump_recipe(tiny_recipe(tmp_path))
    data["training"]["images"] = "0.8 epochs"
    Trainer(parse_recipe(data), tmp_path / "run").run()
    assert load_recipe(tmp_path / "run" / "recipe.yaml").training.images == 24
    longer = run_folder.read_recipe(tmp_path / "run", ["training.images=1.6 epochs"])
    assert longer.training.images == 48


@pytest.mark.slow
def test_on_the_command_line(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_recipe(tmp_path))
    process = start("train", str(recipe), f"run.dir={tmp_path / 'run'}", "training.images=1epoch")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "0 of 30 seen" in output


# ------------------------------------------------------------------------------- learning rates


@given(lr=st.floats(1e-6, 1.0), batch=st.integers(1, 2**20), of=st.integers(1, 2**20))
def test_learning_rates_follow_the_batch(lr: float, batch: int, of: int) -> None:
    config = OptimizerConfig(lr=lr, lr_batch=of).for_batch(batch)
    assert config.lr == pytest.approx(lr * batch / of)
    assert config.for_batch(2 * batch) == config
    plain = OptimizerConfig(lr=lr)
    assert plain.for_batch(batch) == plain


def test_a_step_has_the_scaled_rate(tmp_path: Path) -> None:
    # The rates of MAR: 1e-4 for 256, 8e-4 for 2048; here 2e-3 for 32, so 5e-4 for 8.
    optimizer = {"lr_batch": 32, "rampup_images": 0}
    trainer = Trainer(tiny_recipe(tmp_path, optimizer=optimizer), tmp_path / "run")
    first = next(trainer.steps())
    assert first.update.lr == pytest.approx(5e-4)
    assert trainer.learner.optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)


def test_the_published_course(tmp_path: Path) -> None:
    """base rate x batch / 256, a warm-up of an epoch, then a cosine to min_lr (DiT energies)."""
    import math

    optimizer = {
        "lr": 1e-4,
        "lr_batch": 256,
        "rampup_images": "1 epoch",
        "decay_start_images": "1 epoch",
        "decay": "cosine",
        "final_lr": 1e-7,
    }
    data = dump_recipe(tiny_recipe(tmp_path)) | {}
    data["optimizer"] |= optimizer
    data["training"]["images"] = "4 epochs"
    recipe = parse_recipe(data)
    trainer = Trainer(recipe, tmp_path / "run")
    peak, rates = 1e-4 * 8 / 256, {}
    for report in trainer.steps():
        rates[(report.images - 8) / 30] = report.update.lr
    for epoch, lr in rates.items():
        expected = peak * epoch
        if epoch > 1:
            expected = 1e-7 + (peak - 1e-7) / 2 * (1 + math.cos(math.pi * (epoch - 1) / 3))
        assert lr == pytest.approx(expected)


def test_the_table_tells_the_rate(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, optimizer={"lr_batch": 256}, training={"images": 8})
    process = start("train", str(write_recipe(tmp_path, recipe)), f"run.dir={tmp_path / 'run'}")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "8, learning rate 6.25e-05 (0.002 for 256)" in " ".join(output.split())


def test_learners_by_themselves_scale_too(tmp_path: Path) -> None:
    import torch

    recipe = tiny_recipe(tmp_path, optimizer={"lr_batch": 4})
    cpu = torch.device("cpu")
    learner = learner_of(recipe, fresh_model(recipe, cpu), cpu)
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(4e-3)

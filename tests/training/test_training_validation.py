"""The loss on images that are not trained on: a set of its own, or a share held out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import random_images, write_packed
from test_training_parallel import in_processes
from tiny_vae import latent_recipe, save_vae
from training_case import read_metrics, tiny_recipe

from tessera.data.codec import VaeCodec
from tessera.data.dataset import open_dataset
from tessera.data.encoding import write_latents
from tessera.errors import RecipeError
from tessera.recipes.datasets import open_training_set, open_validation_set
from tessera.training import run_folder
from tessera.training.learner import Learner
from tessera.training.trainer import Trainer
from tessera.training.validation import Validation, validation_images

SECTION = {"every_images": 32, "images": 13}


def second_set(folder: Path, count: int = 20) -> str:
    path = folder / "second.safetensors"
    if not path.exists():
        labels = [i % 2 for i in range(count)]
        write_packed(path, random_images(count, seed=5), labels=labels)
    return str(path)


def validated(folder: Path, **changes: Any) -> Any:
    data = {"validation": second_set(folder), **changes.pop("data", {})}
    return tiny_recipe(folder, validation=SECTION, data=data, **changes)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run_dir) if "validation/loss" in line]


def measured(trainer: Trainer) -> dict[str, Any]:
    """A validation of this moment."""
    assert trainer._validated is not None
    return Validation(trainer.recipe, trainer._validated, []).make(trainer.learner, 0)


def test_the_loss_is_that_of_the_averaged_weights_at_the_same_levels(tmp_path: Path) -> None:
    recipe = validated(tmp_path)
    trainer = Trainer(recipe, tmp_path / "run")
    trainer.run()
    found = lines(tmp_path / "run")
    assert [line["images"] for line in found] == [32, 64, 96]
    final = found[-1]

    images = validation_images(recipe, trainer.device, trainer._feed)
    assert images is not None
    assert images.count == 13
    pipe = trainer.pipeline()
    losses, quarters, numbers = [], [], []
    for batch in images.feed.load(images.plans()):
        for micro in images.feed.micro_batches(batch):
            assert micro.cond.augment is None
            with torch.no_grad():
                model = pipe.denoiser.eval()
                terms = trainer.learner.step.objective(model, micro.x, micro.cond, micro.draws)
            losses += terms["loss"].tolist()
            quarters += terms["quartile"].tolist()
            numbers += batch.numbers.tolist()
    assert numbers == list(range(13))
    assert final["validation/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert final["validation/loss_per_pixel"] == pytest.approx(np.mean(losses) / 192, rel=1e-5)
    for quarter in range(4):
        part = [x for x, q in zip(losses, quarters, strict=True) if q == quarter]
        expected = pytest.approx(np.mean(part), rel=1e-5) if part else None
        assert final[f"validation/loss_q{quarter}"] == expected


def test_the_same_weights_have_the_same_loss(tmp_path: Path) -> None:
    trainer = Trainer(validated(tmp_path), tmp_path / "run")
    steps = trainer.steps()
    next(steps)
    first = measured(trainer)
    assert measured(trainer) == first
    for _ in range(3):
        next(steps)
    assert measured(trainer) != first
    steps.close()


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    weights = []
    for name, recipe in (("with", validated(tmp_path)), ("without", tiny_recipe(tmp_path))):
        trainer = Trainer(recipe, tmp_path / name)
        trainer.run()
        weights.append(trainer.learner.average(0))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
    shared = [x for x in read_metrics(tmp_path / "with") if "validation/loss" not in x]
    assert shared == read_metrics(tmp_path / "without")


def test_a_resumed_run_has_the_same_lines(tmp_path: Path) -> None:
    recipe = validated(tmp_path, run={"checkpoint_every_images": 40})
    Trainer(recipe, tmp_path / "whole").run()
    steps = Trainer(recipe, tmp_path / "left").steps()
    for _ in range(9):
        next(steps)
    steps.close()
    assert len(lines(tmp_path / "left")) == 2
    Trainer(resume=tmp_path / "left").run()
    assert read_metrics(tmp_path / "left") == read_metrics(tmp_path / "whole")


def test_the_set_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    Trainer(tiny_recipe(tmp_path, training={"images": 16}), tmp_path / "run").run()
    changes = [f"data.validation={second_set(tmp_path)}", "validation.every_images=16"]
    longer = run_folder.read_recipe(tmp_path / "run", [*changes, "training.images=32"])
    Trainer(longer, resume=tmp_path / "run").run()
    assert [line["images"] for line in lines(tmp_path / "run")] == [32]
    with pytest.raises(RecipeError, match=r"cannot change data\.held_out"):
        run_folder.read_recipe(tmp_path / "run", ["data.validation=null", "data.held_out=0.5"])


@pytest.mark.parametrize("xflip", [False, True])
def test_images_that_are_held_out_are_not_trained_on(tmp_path: Path, xflip: bool) -> None:
    recipe = tiny_recipe(tmp_path, data={"held_out": 0.2, "xflip": xflip})
    training, held_out = open_training_set(recipe), open_validation_set(recipe)
    assert held_out is not None
    assert (len(training), len(held_out)) == (48 if xflip else 24, 6)

    def pictures(dataset: Any) -> set[bytes]:
        return {image.tobytes() for image in dataset.read(np.arange(len(dataset)))}

    assert recipe.data.path is not None
    everything = pictures(open_dataset(recipe.data.path, xflip=xflip))
    assert pictures(training) < everything
    mirrored = {image[:, :, ::-1].tobytes() for image in held_out.read(np.arange(6))}
    assert not pictures(training) & (pictures(held_out) | mirrored)
    assert training.labels is not None
    assert len(training.labels) == len(training)
    again = open_validation_set(recipe)
    assert again is not None
    assert pictures(again) == pictures(held_out)
    other = open_validation_set(
        recipe.model_copy(update={"training": recipe.training.model_copy(update={"seed": 4})})
    )
    assert other is not None
    assert pictures(other) != pictures(held_out)


def test_a_run_with_a_share_held_out(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, data={"held_out": 0.2}, validation=SECTION)
    trainer = Trainer(recipe, tmp_path / "run")
    assert len(trainer.dataset) == 24
    assert trainer._validated is not None
    assert trainer._validated.count == 6
    trainer.run()
    assert len(lines(tmp_path / "run")) == 3


DISCRETE = {
    "preconditioning": {"kind": "discrete", "schedule": "cosine", "timesteps": 8},
    "objective": {"kind": "discrete", "timesteps": "loss_second_moment"},
}


@pytest.mark.parametrize(
    "changes",
    [
        DISCRETE,
        {"view": {"kind": "patches", "real_p": 0.5}, "coords": {}},
        {"snr_splits": [1.0], "expert": 1},
        {"low_resolution": 4},
        {"augment": {"p": 0.5, "yflip": 1}},
        {"training": {"micro_batch": 4, "images": 32}},
    ],
)
def test_of_every_method(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = Trainer(
        validated(tmp_path, **({"training": {"images": 32}} | changes)), tmp_path / "r"
    )
    trainer.run()
    (line,) = lines(tmp_path / "r")
    assert measured(trainer) == {k: v for k, v in line.items() if k.startswith("validation/")}
    assert math.isfinite(line["validation/loss"])
    if changes is DISCRETE:
        assert math.isfinite(line["validation/mse"])


def test_discrete_steps_do_not_follow_the_losses_of_training(tmp_path: Path) -> None:
    trainer = Trainer(validated(tmp_path, **DISCRETE), tmp_path / "run")
    objective = trainer.learner.step.objective
    assert isinstance(objective, torch.nn.Module)
    before = measured(trainer)
    history = objective.history
    with torch.no_grad():
        history.counts.fill_(10)  # type: ignore[union-attr]
        history.losses[3].fill_(9.0)  # type: ignore[index,union-attr]
        kept = history.losses.clone()  # type: ignore[union-attr]
    assert measured(trainer) == before
    assert torch.equal(history.losses, kept)  # type: ignore[union-attr]
    assert objective.training


def test_of_latents(tmp_path: Path) -> None:
    vae = save_vae(tmp_path / "vae")
    paths = []
    for name, count in (("train", 12), ("second", 7)):
        labels = [i % 2 for i in range(count)]
        write_packed(tmp_path / f"{name}.safetensors", random_images(count, size=16), labels)
        made = tmp_path / f"{name}-latents.safetensors"
        images = open_dataset(tmp_path / f"{name}.safetensors")
        write_latents(images, VaeCodec(str(vae)), made, batch=4)
        paths.append(made)
    recipe = latent_recipe(
        vae,
        paths[0],
        data={"validation": str(paths[1])},
        validation=SECTION,
        training={"images": 32},
        run={"preview": None},
    )
    trainer = Trainer(recipe, tmp_path / "run")
    trainer.run()
    assert len(lines(tmp_path / "run")) == 1
    images_path = {"validation": str(tmp_path / "second.safetensors")}
    data = recipe.data.model_copy(update=images_path)
    with pytest.raises(RecipeError, match="holds no latents"):
        Trainer(recipe.model_copy(update={"data": data}), tmp_path / "other")


def _run(folder: Path, run_dir: Path, changes: dict[str, Any]) -> None:
    Trainer(validated(folder, **changes), run_dir).run()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_several_processes_measure_the_same(tmp_path: Path, parallel: str) -> None:
    changes = {"training": {"images": 32, "parallel": parallel}, "network": {"dropout": 0.0}}
    _run(tmp_path, tmp_path / "one", changes)
    in_processes(2, _run, tmp_path, tmp_path / "two", changes)
    (one,), (two,) = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert one == {k: pytest.approx(v, rel=1e-4) for k, v in two.items()}


def test_a_loss_that_is_not_finite_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(validated(tmp_path), tmp_path / "run")
    real = Learner.evaluate

    def broken(self: Learner, *arguments: Any) -> Any:
        sums, quartiles = real(self, *arguments)
        return {name: value * torch.inf for name, value in sums.items()}, quartiles

    monkeypatch.setattr(Learner, "evaluate", broken)
    assert measured(trainer)["validation/loss"] is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"validation": "missing.zip"}, r"data\.validation: there is nothing at .*missing"),
        ({"held_out": 0.99}, r"data\.held_out=0\.99 takes all of the 30"),
        ({"held_out": 0.1, "validation": "a.zip"}, "held_out, a share of this one"),
        ({"held_out": 1.0}, r"data\.held_out: must be less than 1"),
        ({"validation": "large.safetensors"}, r"large[^$]*16x16 pixels, but data\.resolution is 8"),
        ({"validation": "many.safetensors"}, r"many[^$]*3 classes, but data\.num_classes is 2"),
        ({"validation": "bare.safetensors"}, r"bare[^$]*no labels, but data\.num_classes is 2"),
    ],
)
def test_sets_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_packed(tmp_path / "large.safetensors", random_images(4, size=16), labels=[0, 1, 0, 1])
    write_packed(tmp_path / "many.safetensors", random_images(3), labels=[0, 1, 2])
    write_packed(tmp_path / "bare.safetensors", random_images(3))
    with pytest.raises(RecipeError, match=message):
        Trainer(tiny_recipe(tmp_path, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_classes_must_mean_the_same(tmp_path: Path) -> None:
    names = {"a": ("cat", "dog"), "b": ("ant", "dog"), "c": ("cat",)}
    for name, classes in names.items():
        labels = [i % len(classes) for i in range(4)]
        write_packed(tmp_path / name, random_images(4), labels, classes).rename(
            tmp_path / f"{name}.safetensors"
        )
    data = {f: str(tmp_path / f"{n}.safetensors") for f, n in (("path", "a"), ("validation", "b"))}
    with pytest.raises(RecipeError, match=r"class 0 of .*b.safetensors is 'ant', but 'cat'"):
        Trainer(tiny_recipe(tmp_path, data=data), tmp_path / "run")
    some = data | {"validation": str(tmp_path / "c.safetensors")}
    assert Trainer(tiny_recipe(tmp_path, data=some), tmp_path / "run")._validated is not None


@pytest.mark.slow
def test_the_forecast_counts_validation(tmp_path: Path) -> None:
    seconds = [
        Trainer(recipe, tmp_path / name, probe=True).forecast
        for name, recipe in (
            ("a", validated(tmp_path, training={"images": 10**6})),
            ("b", tiny_recipe(tmp_path, training={"images": 10**6})),
        )
    ]
    assert seconds[0] is not None
    assert seconds[1] is not None
    assert seconds[0].extra_seconds > seconds[1].extra_seconds

"""Averages as they are sampled while training, and as checkpoints name them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from training_case import tiny_recipe

from tessera.training.preview import ema_pipeline
from tessera.training.trainer import Trainer


def test_previews_share_the_tensors_of_the_averages(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, ema=[{"halflife_images": 50}, {"halflife_images": 90}])
    trainer = Trainer(recipe, tmp_path / "run")
    next(iter(trainer.steps()))
    learner = trainer.learner
    pipe = ema_pipeline(recipe, learner, 8, None)
    assert pipe is not None
    shown = dict(pipe.model.named_parameters())
    average = {n.removeprefix("model."): t for n, t in learner.emas[0].weights.items()}
    assert shown.keys() >= average.keys() > set()
    for name, tensor in average.items():
        assert shown[name].data_ptr() == tensor.data_ptr()
    other = {n.removeprefix("model.network."): t for n, t in learner.emas[1].weights.items()}
    saved = pipe._states()
    assert list(saved) == list(recipe.ema_names)
    for name, tensor in other.items():
        assert saved[recipe.ema_names[1]][name].data_ptr() == tensor.data_ptr()
    # The trained weights themselves stay where they are.
    for name, tensor in learner.step.model.named_parameters():
        assert shown[name].data_ptr() != tensor.data_ptr()


def test_checkpoints_call_the_model_a_denoiser(tmp_path: Path) -> None:
    """As the first ones did, so that each can be resumed by the other."""
    recipe = tiny_recipe(tmp_path, training={"images": 32})
    whole = Trainer(tiny_recipe(tmp_path), tmp_path / "whole")
    whole.run()
    Trainer(recipe, tmp_path / "run").run()
    names = set()
    for file in (tmp_path / "run" / "checkpoints" / "000000000032").rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:  # type: ignore[no-untyped-call]
            names |= {f"{file.stem}/{name}" for name in opened.keys()}  # noqa: SIM118
    assert {name.partition(".")[0] for name in names} == {
        "model/denoiser", "ema-0/denoiser",
        "optimizer/exp_avg/denoiser", "optimizer/exp_avg_sq/denoiser", "optimizer/step/denoiser",
    }  # fmt: skip
    resumed = Trainer(tiny_recipe(tmp_path), resume=tmp_path / "run")
    assert resumed.images_seen == 32
    resumed.run()
    for name, tensor in whole.learner.tensors().items():
        assert torch.equal(resumed.learner.tensors()[name], tensor), name

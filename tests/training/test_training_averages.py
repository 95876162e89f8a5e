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
    (file,) = (tmp_path / "run" / "checkpoints").rglob("*.safetensors")
    with safe_open(file, "pt") as opened:  # type: ignore[no-untyped-call]
        names = set(opened.keys())
    groups = {name.partition("denoiser.")[0] for name in names if "denoiser." in name}
    assert groups >= {"model/", "ema-0/"}
    assert len(groups) == 2 + len({name.split("/")[1].split(".")[0] for name in names
                                   if name.startswith("optimizer/") and "denoiser." in name})  # fmt: skip
    assert not [name for name in names if "/model." in name]
    resumed = Trainer(tiny_recipe(tmp_path), resume=tmp_path / "run")
    assert resumed.images_seen == 32
    resumed.run()
    for name, tensor in whole.learner.tensors().items():
        assert torch.equal(resumed.learner.tensors()[name], tensor), name

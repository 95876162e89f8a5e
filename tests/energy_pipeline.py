"""Tiny pipelines of energies with random weights."""

from __future__ import annotations

from typing import Any

import torch

from tessera.pipelines.diffusion import DiffusionPipeline
from tessera.pipelines.loading import build_pipeline
from tessera.recipes.build import build_denoiser
from tessera.recipes.loading import parse_recipe
from tessera.recipes.overrides import merge

RECIPE: dict[str, Any] = {
    "name": "tiny-energy",
    "data": {"resolution": 8, "num_classes": 3},
    "network": {
        "kind": "energy_dit", "size": "S/2", "depth": 1, "width": 16, "heads": 2,
        "step_size": 0.02,
    },
    "objective": {"kind": "edm", "label_dropout": 0.1},
    "ema": [{"halflife_images": 1000}],
    "sampling": {"kind": "edm", "steps": 3},
}  # fmt: skip


def energy_pipeline(**changes: Any) -> DiffusionPipeline:
    """8x8 RGB images, three steps; the weights are the same each time."""
    recipe = parse_recipe(merge(RECIPE, changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = build_denoiser(recipe)
        for name, parameter in denoiser.named_parameters():
            if not name.endswith("alpha"):
                torch.nn.init.normal_(parameter, std=0.2)
    pipe = build_pipeline(recipe, denoiser, images_seen=5000)
    assert isinstance(pipe, DiffusionPipeline)
    return pipe

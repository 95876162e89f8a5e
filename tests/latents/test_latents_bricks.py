"""LEGO bricks on latents: skipped, guided, and beyond the trained size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_vae import latent_recipe, save_vae

from tessera.pipelines.bricks import brick_picture
from tessera.pipelines.loading import build_pipeline
from tessera.pipelines.plans import SampleOptions
from tessera.recipes.build import build_denoiser
from tessera.recipes.loading import load_recipe, shipped


def test_bricks_make_images_of_latents(tmp_path: Path) -> None:
    network = {
        "kind": "lego",
        "width": 16,
        "heads": 2,
        "bricks": [{"size": 4, "depth": 1}, {"size": 8, "depth": 1}],
    }
    recipe = latent_recipe(
        save_vae(tmp_path / "vae"), tmp_path / "none", network=network, sampling={"steps": 4}
    )
    torch.manual_seed(0)
    pipe = build_pipeline(recipe, build_denoiser(recipe))
    options: dict[str, Any] = {"guidance": 2.0, "guidance_interval": (0.1, 10), "skip": 0.5}
    assert pipe.sample([0, 1], **options).shape == (2, 16, 16, 3)
    # Sizes are those of the latents, of half the side of the images here.
    wide = pipe.sample([0], size=(9, 21), layout="windows", **options)
    assert wide.shape == (1, 18, 42, 3)
    assert brick_picture(pipe, 0, rows=2).shape[1] > 3 * 112


def test_the_published_recipes_on_latents_are_complete() -> None:
    names = [name for name in shipped() if name.startswith("lego") and name.endswith("latent")]
    assert len(names) == 10
    for name in names:
        recipe = load_recipe(name)
        assert recipe.codec.kind == "vae"
        assert recipe.shape == (4, recipe.data.resolution // 8, recipe.data.resolution // 8)
        assert recipe.objective.label_dropout == 0.1
        assert recipe.sampling.model_dump(include={"steps", "s_churn", "s_max"}) == {
            "steps": 256, "s_churn": 10, "s_max": 10,
        }  # fmt: skip


def test_estimates_of_latents_are_not_cut_as_pixels_are(tmp_path: Path) -> None:
    latents = latent_recipe(tmp_path / "vae", tmp_path / "none")
    pixels = load_recipe("cifar10-small-pdm")
    for recipe, given, wanted in (
        (latents, {}, "none"),
        (latents, {"clip": "dynamic"}, "dynamic"),
        (pixels, {}, "auto"),
    ):
        sampler = SampleOptions.choose(recipe, sampler="ddim", **given).sampler
        assert sampler.model_dump()["clip"] == wanted

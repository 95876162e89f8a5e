"""A pipeline that is small enough to sample from in a test, with random weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tessera.pipelines.base import Pipeline
from tessera.pipelines.loading import build_pipeline
from tessera.recipes.build import build_denoiser
from tessera.recipes.loading import parse_recipe

CLASS_NAMES = ("ant", "bee", "cat")


def tiny_pipeline(
    num_classes: int = 3, label_dropout: float = 0.1, emas: Sequence[float] = (1000,)
) -> Pipeline:
    """8x8 RGB images, three steps; the weights are the same each time."""
    recipe = parse_recipe(
        {
            "name": "tiny",
            "data": {"resolution": 8, "num_classes": num_classes},
            "network": {
                "kind": "song_unet", "model_channels": 8, "channel_mult": [1, 2],
                "num_blocks": 1, "attn_resolutions": [4],
            },
            "objective": {"kind": "edm", "label_dropout": label_dropout},
            "ema": [{"halflife_images": halflife} for halflife in emas],
            "sampling": {"kind": "edm", "steps": 3},
        }
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = build_denoiser(recipe)
        # The last layers begin at zero; random ones make the images differ.
        for parameter in denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        others = [
            {name: value + 0.1 for name, value in denoiser.network.state_dict().items()}
            for _ in emas[1:]
        ]
    names = CLASS_NAMES[:num_classes] if num_classes else None
    return build_pipeline(recipe, denoiser, images_seen=5000, class_names=names, other_emas=others)

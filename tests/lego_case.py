"""The networks that the recorded LEGO cases describe, and a tiny recipe."""

from __future__ import annotations

from typing import Any

import torch
from golden_cases import case, load, weights
from torch import Tensor

from tessera.diffusion.preconditioning import Edm, Preconditioned
from tessera.networks.lego import Lego
from tessera.pipelines.base import Pipeline
from tessera.pipelines.loading import build_pipeline
from tessera.recipes.build import build_denoiser
from tessera.recipes.loading import load_recipe


def recorded(name: str, **changes: Any) -> tuple[Preconditioned, dict[str, Tensor], dict[str, Any]]:
    """(denoiser with the recorded weights, in evaluation mode; tensors; description) of a case."""
    golden, described = load("lego", name), case("lego", name)
    c = described["config"]
    bricks = zip(c["brick_resolutions"], c["patch_sizes"], c["depths"], strict=True)
    options = {"width": c["hidden"], "heads": c["heads"], "joint": c["joint"], **changes}
    network = Lego(c["channels"], c["label_dim"], c["augment_dim"], bricks=list(bricks), **options)
    network.load_state_dict(
        {k.removeprefix("model."): v for k, v in weights(golden).items()}, strict=True
    )
    side = c["trained_canvas"]
    denoiser = Preconditioned(network, Edm(), (c["channels"], side, side), c["label_dim"])
    return denoiser.eval(), golden, described


def tiny_pipeline(*overrides: str) -> Pipeline:
    """An untrained model of quickstart size with random weights."""
    recipe = load_recipe("quickstart-digits-lego", ["sampling.steps=5", *overrides])
    torch.manual_seed(0)
    denoiser = build_denoiser(recipe)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return build_pipeline(recipe, denoiser)

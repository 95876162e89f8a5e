"""Tiny stages of relays for tests: 4x4 to 8x8 pixels, in two classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from data_files import random_images
from numpy.typing import NDArray
from training_case import BASE
from typer.testing import CliRunner

from tessera.cli import app
from tessera.pipelines.diffusion import DiffusionPipeline
from tessera.pipelines.loading import build_pipeline
from tessera.recipes.build import build_denoiser
from tessera.recipes.loading import parse_recipe
from tessera.recipes.overrides import merge
from tessera.recipes.schema import Recipe

SECOND: dict[str, Any] = {
    "objective": {"kind": "blur", "block": 2, "label_dropout": 0.1},
    "sampling": {"kind": "relay", "steps": 4},
}
FIRST: dict[str, Any] = {"data": {"resolution": 4, "shrink": 2}}


def recipe(*changes: dict[str, Any], **more: Any) -> Recipe:
    """The tiny recipe with changed sections."""
    made = BASE
    for change in (*changes, more):
        made = merge(made, change)
    return parse_recipe(made)


def pipeline(*changes: dict[str, Any], **more: Any) -> DiffusionPipeline:
    """With random weights, which make all images differ."""
    own = recipe(*changes, **more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = build_denoiser(own)
        for parameter in denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    made = build_pipeline(
        own, denoiser, images_seen=100, class_names=("ant", "bee")[: own.data.num_classes] or None
    )
    assert isinstance(made, DiffusionPipeline)
    return made


def small(count: int = 3, side: int = 4) -> NDArray[np.uint8]:
    """Random pictures to start from, uint8 [N, h, w, 3]."""
    return np.ascontiguousarray(random_images(count, size=side).transpose(0, 2, 3, 1))


def run(*arguments: Any) -> str:
    """What a command prints; its errors are raised."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output

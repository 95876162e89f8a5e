"""A tiny autoencoder with random weights, saved as diffusers does, and a recipe for its latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.recipes.loading import parse_recipe
from tessera.recipes.overrides import merge
from tessera.recipes.schema import Recipe


def save_vae(folder: Path, *, channels: int = 4, levels: int = 2, safe: bool = True) -> Path:
    """Latents of `channels` at 1 / 2^(levels - 1) of the images' side; skips without diffusers."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=(8,) * levels,
            layers_per_block=1,
            latent_channels=channels,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.5,
        )
    vae.save_pretrained(folder, safe_serialization=safe)
    return folder


def latent_recipe(vae: Path, latents: Path, **changes: Any) -> Recipe:
    """A tiny model of 8x8 latents of 16x16 images in two classes, trained on patches."""
    base: dict[str, Any] = {
        "name": "tiny-latent",
        "data": {"path": str(latents), "resolution": 16, "num_classes": 2, "workers": 1},
        "codec": {"kind": "vae", "model": str(vae), "downsample": 2, "scale": 0.5},
        "view": {"kind": "patches"},
        "network": {
            "kind": "song_unet",
            "model_channels": 8,
            "channel_mult": [1, 1],
            "channel_mult_emb": 2,
            "num_blocks": 1,
            "attn_resolutions": [],
        },
        "objective": {"kind": "edm", "label_dropout": 0.2},
        "optimizer": {"lr": 2e-3, "rampup_images": 0},
        "ema": [{"halflife_images": 50}],
        "training": {"images": 48, "batch": 8, "seed": 3},
        "sampling": {"kind": "edm", "steps": 2},
        "run": {
            "log_every_images": 16,
            "checkpoint_every_images": 48,
            "preview": {"every_images": 24, "rows": 1, "columns": 2},
            "tensorboard": False,
        },
    }
    return parse_recipe(merge(base, changes))

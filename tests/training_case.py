"""A tiny training run for tests: 8x8 images, two classes, seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_files import random_images, write_packed
from forked import Forked, fork

from tessera.recipes.loading import dump_recipe, parse_recipe
from tessera.recipes.overrides import merge
from tessera.recipes.schema import Recipe

BASE: dict[str, Any] = {
    "name": "tiny",
    "data": {"resolution": 8, "num_classes": 2, "workers": 1},
    "network": {
        "kind": "song_unet",
        "model_channels": 8,
        "channel_mult": [1, 1],
        "channel_mult_emb": 2,
        "num_blocks": 1,
        "attn_resolutions": [4],
        "dropout": 0.1,
    },
    "objective": {"kind": "edm", "label_dropout": 0.2},
    "optimizer": {"lr": 2e-3, "rampup_images": 40},
    "ema": [{"halflife_images": 50}],
    "training": {"images": 96, "batch": 8, "seed": 3, "precision": "fp32"},
    "sampling": {"kind": "edm", "steps": 2},
    "run": {
        "log_every_images": 16,
        "checkpoint_every_images": 32,
        "preview": None,
        "tensorboard": False,
    },
}


def tiny_recipe(folder: Path, **changes: Any) -> Recipe:
    """The tiny recipe with changed sections, on a random data set in `folder`."""
    path = folder / "tiny.safetensors"
    if not path.exists():
        write_packed(path, random_images(30), labels=[i % 2 for i in range(30)])
    return parse_recipe(merge(merge(BASE, {"data": {"path": str(path)}}), changes))


def write_recipe(folder: Path, recipe: Recipe) -> Path:
    """The recipe as a file for the command."""
    path = folder / "tiny.json"
    path.write_text(json.dumps(dump_recipe(recipe)))
    return path


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timings = ("seconds", "images_per_second", "memory_gb")
    return [{k: v for k, v in x.items() if k not in timings} for x in lines]


def start(*arguments: str) -> Forked:
    """`tessera ARGUMENTS` in a process of its own."""
    return fork(arguments)

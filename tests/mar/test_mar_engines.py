"""Models of masked tokens on several processes, and on latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import random_images, write_packed
from processes_case import in_processes
from test_mar_pipeline import MAR, random_pipeline
from tiny_vae import latent_recipe, save_vae
from training_case import read_metrics, tiny_recipe

import tessera
from tessera import distributed
from tessera.data.codec import VaeCodec
from tessera.data.dataset import open_dataset
from tessera.data.encoding import write_latents
from tessera.pipelines.editing import choose_edit
from tessera.pipelines.mar import MarPipeline
from tessera.training.trainer import Trainer

SAMPLING = {"guidance": 2.0, "batch": 3}


def process(folder: Path) -> None:
    """Train, and make every second image."""
    recipe = tiny_recipe(folder, **MAR, training={"images": 24, "parallel": "ddp"})
    Trainer(recipe, folder / "two").run()
    rank = distributed.rank()
    seeds = range(rank, 6, 2)
    images = random_pipeline().sample(seeds, [s % 2 for s in seeds], **SAMPLING)
    np.save(folder / f"{rank}.npy", images)


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    Trainer(tiny_recipe(tmp_path, **MAR, training={"images": 24}), tmp_path / "one").run()
    in_processes(2, process, tmp_path)
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) > 0
    for ours, theirs in zip(one, two, strict=True):
        for name in ("loss", "mse", "vb", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    together = random_pipeline().sample(range(6), [s % 2 for s in range(6)], **SAMPLING)
    for rank in range(2):
        apart = np.load(tmp_path / f"{rank}.npy").astype(int)
        assert np.abs(apart - together[rank::2]).max() <= 1


def test_latents_are_trained_on_sampled_and_edited(tmp_path: Path) -> None:
    vae = save_vae(tmp_path / "vae")
    images = write_packed(
        tmp_path / "images.safetensors", random_images(8, size=16), labels=[i % 2 for i in range(8)]
    )
    write_latents(open_dataset(images), VaeCodec(str(vae)), tmp_path / "latents.safetensors")
    changes: dict[str, Any] = {**MAR, "view": {"kind": "full"}, "training": {"images": 16}}
    recipe = latent_recipe(vae, tmp_path / "latents.safetensors", **changes)
    assert recipe.fitted_sampling.clip == "none"
    Trainer(recipe, tmp_path / "run").run()
    assert list((tmp_path / "run" / "previews").glob("*.png"))
    pipe = tessera.load(tmp_path / "run", device="cpu")
    assert isinstance(pipe, MarPipeline)
    assert pipe.sample([0, 1], [0, 1]).shape == (2, 16, 16, 3)
    # Tokens of 2x2 latents of 2x2 pixels: what is kept are latents, to the bit.
    picture = random_images(1, size=16)[0].transpose(1, 2, 0)
    edit = choose_edit([picture], (3, 16, 16), box=(4, 4, 4, 8))
    plan = pipe.plan([0], [1], edit=edit)
    *_, (_, last) = pipe.states(plan, [0])
    given = pipe.codec.encode_mean(torch.from_numpy(edit.pictures).permute(0, 3, 1, 2))
    kept = torch.ones(8, 8, dtype=torch.bool)
    kept[2:6, 2:4] = False
    assert torch.equal(last.x[0][:, kept].float(), given[0][:, kept])
    assert not torch.equal(last.x[0][:, ~kept].float(), given[0][:, ~kept])

"""Relays of latents: both stages from one set, their hand-over, pictures to start from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import random_images, write_packed
from relay_tiny import run
from tiny_vae import latent_recipe, save_vae

import tessera
from tessera.data.codec import VaeCodec, sample_posterior
from tessera.data.dataset import open_dataset
from tessera.data.encoding import write_latents
from tessera.data.latents import open_latents
from tessera.errors import DataError, RecipeError, TesseraError
from tessera.randomness import AddressedDraws
from tessera.recipes.schema import Recipe
from tessera.training.feed import Feed
from tessera.training.trainer import Trainer

FIRST: dict[str, Any] = {"data": {"resolution": 8, "shrink": 2}, "view": {"kind": "full"}}
SECOND: dict[str, Any] = {
    "view": {"kind": "patches", "sizes": [4, 8]},
    "objective": {"kind": "blur", "block": 2},
    "sampling": {"kind": "relay", "steps": 3},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vae/, latents.safetensors of 8x8, the runs a and b, and their relay r."""
    folder = tmp_path_factory.mktemp("latents")
    vae = save_vae(folder / "vae")
    images = write_packed(
        folder / "images.safetensors", random_images(10, size=16), labels=[i % 2 for i in range(10)]
    )
    write_latents(open_dataset(images), VaeCodec(str(vae)), folder / "latents.safetensors")
    for name, changes in (("a", FIRST), ("b", SECOND)):
        Trainer(stage(folder, changes), folder / name).run()
        assert list((folder / name / "previews").glob("*.png"))
    run("relay", folder / "a", folder / "b", folder / "r")
    return folder


def stage(folder: Path, changes: dict[str, Any]) -> Recipe:
    made = latent_recipe(folder / "vae", folder / "latents.safetensors", **changes)
    return made.model_copy(update={"training": made.training.model_copy(update={"images": 24})})


def test_shrunk_latents_are_means_of_blocks(made: Path) -> None:
    whole = open_latents(made / "latents.safetensors")
    small = whole.shrunk(2)
    assert (small.shape, small.info.resolution, len(small)) == ((4, 4, 4), 8, 10)
    rows, draws = np.array([3, 1]), AddressedDraws(0, torch.arange(2))
    mean, log_variance = np.split(whole.read(rows).astype(np.float64), 2, axis=1)
    blocks = (2, 4, 4, 2, 4, 2)
    ours, variance = np.split(small.read(rows), 2, axis=1)
    np.testing.assert_allclose(ours, mean.reshape(blocks).mean((3, 5)), atol=1e-3)
    # A sample of the whole posterior, shrunk, has a quarter of the variance of one of its numbers.
    expected = np.exp(log_variance).reshape(blocks).mean((3, 5)) / 4
    np.testing.assert_allclose(np.exp(variance), expected, rtol=1e-2)
    assert sample_posterior(torch.from_numpy(small.read(rows)), draws, 0.5).shape == (2, 4, 4, 4)
    with pytest.raises(DataError, match="8x8 have no whole number of blocks of 3x3"):
        whole.shrunk(3)
    with pytest.raises(RecipeError, match=r"data\.resolution"):
        Feed(stage(made, {**FIRST, "data": {"resolution": 8, "shrink": 4}}), torch.device("cpu"))


def test_stages_hand_latents_over(made: Path) -> None:
    relay = tessera.load(made / "r", device="cpu")
    images = relay.sample("0-1")
    assert images.shape == (2, 16, 16, 3)
    assert images.std() > 0
    assert relay.sample("0", stages="first").shape == (1, 8, 8, 3)
    states = [state for _, state in relay.states(relay.plan([0]), [0])]
    assert (states[1].x.shape, states[-1].x.shape) == ((1, 4, 4, 4), (1, 4, 8, 8))
    assert relay.cost().evaluations == sum(cost.evaluations for cost in relay.costs().values())


def test_small_pictures_are_encoded_and_latents_taken_as_they_are(made: Path) -> None:
    second = tessera.load(made / "b", device="cpu")
    pictures = np.ascontiguousarray(random_images(2, size=8).transpose(0, 2, 3, 1))
    encoded = second.codec.encode_mean(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    assert encoded.shape == (2, 4, 4, 4)
    images = second.sample("0-1", start_from=pictures)
    np.testing.assert_array_equal(images, second.sample("0-1", start_from=encoded))
    assert not np.array_equal(images, second.sample("0-1", start_from=255 - pictures))
    with pytest.raises(TesseraError, match=r"starts from pictures of shape \(8, 8, 3\)"):
        second.check("0", None, start_from=pictures.repeat(2, 1).repeat(2, 2))


def test_a_folder_of_samples_goes_on_wherever_the_pipeline_lies(made: Path, tmp_path: Path) -> None:
    tessera.load(made / "r", device="cpu").save(tmp_path / "one", codec=True)
    sample = ["--out", tmp_path / "s", "--device", "cpu", "--seeds"]
    run("sample", tmp_path / "one", *sample, "0")
    facts = json.loads((tmp_path / "s" / "sampling.json").read_text())
    assert str(tmp_path) not in json.dumps(facts)
    shutil.move(tmp_path / "one", tmp_path / "other")
    run("sample", tmp_path / "other", *sample, "0-1")
    assert len(list((tmp_path / "s").glob("*.png"))) == 2
    # The same weights elsewhere are the same VAE, others are not.
    run("sample", made / "r", *sample, "0-2", "--vae", made / "vae")
    pytest.importorskip("diffusers")
    torch.manual_seed(1)
    other = tessera.load(made / "r", device="cpu")
    assert isinstance(other.codec, VaeCodec)
    before = other.codec.describe()
    next(iter(other.codec._load().parameters())).data.add_(1)
    assert other.codec.describe() != before

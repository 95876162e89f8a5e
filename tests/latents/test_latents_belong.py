"""A recipe, its set of latents and its VAE belong together; the set may say how it is scaled."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import safetensors.numpy
from data_files import random_images, write_packed
from tiny_vae import latent_recipe, save_vae

import tessera
from tessera.data.codec import VaeCodec
from tessera.data.dataset import open_dataset
from tessera.data.encoding import write_latents
from tessera.data.latents import channel_statistics, open_latents
from tessera.errors import CheckpointError, RecipeError
from tessera.recipes.latents import measured_scaling, with_latents_told
from tessera.training.run_folder import read_recipe
from tessera.training.trainer import Trainer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vae/, another one of the same sizes, and latents.safetensors of the first."""
    folder = tmp_path_factory.mktemp("belong")
    vae, other = save_vae(folder / "vae"), save_vae(folder / "other")
    weights = other / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    tensors["quant_conv.bias"] += 1
    safetensors.numpy.save_file(tensors, weights, {"format": "pt"})
    images = write_packed(
        folder / "images.safetensors", random_images(8, size=16), labels=[0, 1] * 4
    )
    write_latents(open_dataset(images), VaeCodec(str(vae)), folder / "latents.safetensors")
    return folder


def test_another_vae_is_refused_before_training_and_before_decoding(
    made: Path, tmp_path: Path
) -> None:
    latents = made / "latents.safetensors"
    with pytest.raises(CheckpointError, match="has other weights than the one that made"):
        Trainer(latent_recipe(made / "other", latents), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    wrong = latent_recipe(made / "gone", latents, codec={"weights": "0" * 64})
    with pytest.raises(RecipeError, match="made by a VAE of other weights"):
        Trainer(wrong, tmp_path / "run")
    Trainer(latent_recipe(made / "vae", latents, run={"preview": None}), tmp_path / "run").run()
    digest = VaeCodec(str(made / "vae")).weights_digest()
    assert read_recipe(tmp_path / "run").codec.weights == digest
    # Its folder changes under the run: decoding says so; one that is named is taken at its word.
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    pipe = tessera.load(tmp_path / "run", vae=made / "other")
    assert pipe.sample([0], steps=2).shape == (1, 16, 16, 3)
    codec = VaeCodec(str(made / "other"), weights=digest)
    with pytest.raises(CheckpointError, match=r"codec\.weights in the recipe"):
        codec.prepare()
    assert "weights:" in text


def test_the_set_says_how_it_is_scaled(made: Path, tmp_path: Path) -> None:
    latents = made / "latents.safetensors"
    recipe = latent_recipe(
        made / "vae", latents, codec={"scale": "data", "shift": "data"}, run={"preview": None}
    )
    Trainer(recipe, tmp_path / "run").run()
    codec = read_recipe(tmp_path / "run").codec
    data = open_latents(latents)
    mean, std = (values / 0.5 for values in channel_statistics(data))
    assert codec.shift == pytest.approx(mean.mean(), rel=1e-5)
    variance = (std**2 + mean**2).mean() - mean.mean() ** 2
    assert codec.scale == pytest.approx(variance**-0.5, rel=1e-5)
    # Without the set: the numbers are those of the run. With it, the recipe goes on.
    assert tessera.load(tmp_path / "run").sample([0], steps=2).shape == (1, 16, 16, 3)
    assert Trainer(recipe, resume=tmp_path / "run").images_seen >= 48
    assert Trainer(resume=tmp_path / "run").recipe.codec == codec
    # Measured where the set has no statistics.
    data.info = type(data.info)(scale=0.5)
    assert measured_scaling(data) == pytest.approx((codec.scale, codec.shift), rel=1e-4)
    images = latent_recipe(made / "vae", made / "images.safetensors", codec={"scale": "data"})
    with pytest.raises(RecipeError, match=r"codec\.scale=data is measured on a set of latents"):
        Trainer(images, tmp_path / "other")


def test_a_set_that_does_not_say_its_vae_is_taken_with_a_note(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("tessera.recipes.latents.note", told.append)
    with safetensors.safe_open(made / "latents.safetensors", "np") as file:
        metadata = {k: v for k, v in file.metadata().items() if k != "weights"}
    silent = tmp_path / "silent.safetensors"
    tensors = safetensors.numpy.load_file(made / "latents.safetensors")
    safetensors.numpy.save_file(tensors, silent, metadata)
    recipe = with_latents_told(latent_recipe(made / "other", silent))
    assert recipe.codec.weights is None
    assert [str(silent) in text for text in told] == [True]
    with_latents_told(latent_recipe(made / "vae", made / "latents.safetensors"))
    assert len(told) == 1

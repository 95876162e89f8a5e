"""Every shipped recipe of latents from images to images, small, with an autoencoder made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_files import random_images, write_packed
from PIL import Image
from relay_tiny import run
from tiny_recipes import small_copy
from tiny_vae import save_vae

from tessera.recipes.loading import load_recipe, shipped
from tessera.training.trainer import Trainer

pytestmark = pytest.mark.slow

# (channels, downsample) of the autoencoders of Stable Diffusion and of MAR.
KL8, KL16 = (4, 8), (16, 16)
LATENT = {
    name: (codec.channels, codec.downsample)
    for name, made in shipped().items()
    if (codec := made().codec).kind == "vae"
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each kind of autoencoder a folder with vae/, images and latents, in two classes."""
    folder = tmp_path_factory.mktemp("recipes")
    for channels, downsample in (KL8, KL16):
        place = folder / f"{channels}-{downsample}"
        vae = save_vae(place / "vae", channels=channels, levels=downsample.bit_length())
        pictures = random_images(4, size=8 * downsample)
        images = write_packed(place / "images.safetensors", pictures, labels=[0, 1] * 2)
        run("data", "latents", images, place / "latents.safetensors", "--vae", vae,
            "--device", "cpu")  # fmt: skip
    return folder


def test_all_families_have_recipes_of_latents() -> None:
    assert set(LATENT.values()) == {KL8, KL16}
    families = {name.split("-")[0] for name in LATENT}
    assert families == {"lego", "patch", "dit", "energy", "mar", "photos"}


def train_and_sample(name: str, made: Path, out: Path, encode: str = "cached") -> list[float]:
    """The losses of a small copy of a recipe; its samples are checked."""
    channels, downsample = LATENT[name]
    place = made / f"{channels}-{downsample}"
    data = "images" if encode == "online" else "latents"
    recipe = load_recipe(
        name,
        [*small_copy(name), f"data.path={place / data}.safetensors", f"codec.model={place / 'vae'}",
         "codec.scale=0.5", f"codec.encode={encode}", "training.batch=2", "training.images=4",
         "training.micro_batch=null",
         "training.precision=fp32", "run.log_every_images=2", "run.preview=null",
         "run.tensorboard=false", "data.workers=0", "data.xflip=false",
         *(["data.num_classes=2"] if shipped()[name]().data.num_classes else [])],
    )  # fmt: skip
    Trainer(recipe, out / "run").run()
    run("sample", out / "run", "--seeds", "0", "--out", out / "png", "--device", "cpu")
    (png,) = (out / "png").glob("*.png")
    with Image.open(png) as image:
        assert (image.size, image.mode) == ((8 * downsample, 8 * downsample), "RGB")
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("name", LATENT)
def test_from_images_to_images(name: str, made: Path, tmp_path: Path) -> None:
    losses = train_and_sample(name, made, tmp_path)
    assert len(losses) == 2
    assert all(loss is not None and loss > 0 for loss in losses)


def test_encoded_in_the_step(made: Path, tmp_path: Path) -> None:
    name = "lego-s-u-imagenet256-latent"
    cached = train_and_sample(name, made, tmp_path / "cached")
    online = train_and_sample(name, made, tmp_path / "online", "online")
    assert online == pytest.approx(cached, rel=5e-3)  # the set holds float16

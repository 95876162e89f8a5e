"""Latents decoded beside the images that they were made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import random_images, write_packed
from PIL import Image
from tiny_vae import save_vae
from typer.testing import CliRunner

from tessera.cli import app
from tessera.data.codec import VaeCodec
from tessera.data.dataset import open_dataset
from tessera.data.encoding import write_latents
from tessera.data.latent_convert import convert_latents
from tessera.data.latent_inspect import decode_some, psnr
from tessera.data.latents import open_latents
from tessera.errors import DataError, TesseraError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vae/, images.safetensors, the same turned round, and latents of the former."""
    folder = tmp_path_factory.mktemp("inspect")
    save_vae(folder / "vae")
    images = random_images(7, size=16)
    write_packed(folder / "images.safetensors", images)
    write_packed(folder / "turned.safetensors", images[::-1])
    write_latents(
        open_dataset(folder / "images.safetensors"),
        VaeCodec(str(folder / "vae")),
        folder / "latents.safetensors",
        xflip=True,
    )
    return folder


def test_decoded_latents_stand_beside_their_own_images(place: Path) -> None:
    latents, codec = open_latents(place / "latents.safetensors"), VaeCodec(str(place / "vae"))
    images = open_dataset(place / "images.safetensors")
    pixels = images.read(np.arange(7))
    expected = codec.decode(codec.encode_mean(torch.from_numpy(pixels)))
    turned = decode_some(latents, codec, 4, images=open_dataset(place / "turned.safetensors"))
    shown = decode_some(latents, codec, 4, images=images)
    assert len({latent.row for latent in shown}) == 4
    for latent, other in zip(shown, turned, strict=True):
        assert latent.source is not None
        assert (latent.source == pixels[latent.row].transpose(1, 2, 0)).all()
        assert other.source is not None
        assert (other.source == latent.source).all()
        target = expected[latent.row].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(latent.image - target).max() <= 2  # of float16
        assert latent.psnr == psnr(latent.image, latent.source)
    assert [latent.psnr for latent in decode_some(latents, codec, 2)] == [None, None]


def test_sets_that_do_not_know_their_images_go_by_order(place: Path, tmp_path: Path) -> None:
    convert_latents(place / "latents.safetensors", tmp_path / "npz", form="npz")
    latents, codec = open_latents(tmp_path / "npz"), VaeCodec(str(place / "vae"))
    assert latents.keys is None
    shown = decode_some(latents, codec, 7, images=open_dataset(place / "images.safetensors"))
    known = decode_some(
        open_latents(place / "latents.safetensors"),
        codec,
        7,
        images=open_dataset(place / "images.safetensors"),
    )
    for one, other in zip(shown, known, strict=True):
        assert one.source is not None
        assert (one.source == other.source).all()


def test_other_images_are_refused(place: Path, tmp_path: Path) -> None:
    latents, codec = open_latents(place / "latents.safetensors"), VaeCodec(str(place / "vae"))
    others = write_packed(tmp_path / "others.safetensors", random_images(7, size=16, seed=9))
    with pytest.raises(DataError, match="lacks 7 of the 7 images"):
        decode_some(latents, codec, 7, images=open_dataset(others))
    small = write_packed(tmp_path / "small.safetensors", random_images(7, size=8))
    with pytest.raises(DataError, match="16x16 RGB"):
        decode_some(latents, codec, 7, images=open_dataset(small))


def test_on_the_command_line(place: Path, tmp_path: Path) -> None:
    def run(*words: object) -> str:
        ran = CliRunner().invoke(app, ["data", "inspect", *map(str, words)], catch_exceptions=False)
        assert ran.exit_code == 0
        return ran.output

    out = tmp_path / "seen.png"
    latents, images = place / "latents.safetensors", place / "images.safetensors"
    told = run(latents, "--vae", place / "vae", "--images", images, "--out", out, "--columns", 3)
    assert "dB in the mean" in told
    assert f"samples: {out}" in told
    both = Image.open(out).size
    run(latents, "--vae", place / "vae", "--out", out, "--columns", 3, "--overwrite")
    assert Image.open(out).size[1] < both[1]
    with pytest.raises(TesseraError, match="needs the VAE"):
        run(latents, "--images", images)
    with pytest.raises(TesseraError, match="holds images"):
        run(images, "--vae", place / "vae")

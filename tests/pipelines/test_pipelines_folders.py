"""Folders with parts: a codec saved along, and those that earlier versions wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_pipeline import tiny_pipeline
from tiny_vae import latent_recipe, save_vae

import tessera
from tessera.errors import CheckpointError, TesseraError
from tessera.pipelines.diffusion import DiffusionPipeline
from tessera.pipelines.experts import ExpertsPipeline
from tessera.pipelines.loading import build_pipeline


def test_a_codec_is_saved_along(tmp_path: Path) -> None:
    vae = save_vae(tmp_path / "vae")
    pipe = build_pipeline(latent_recipe(vae, tmp_path / "latents.safetensors"))
    expected = pipe.sample(range(2))
    pipe.save(tmp_path / "with", codec=True)
    pipe.save(tmp_path / "without")
    shutil.rmtree(vae)
    # Elsewhere, and by nothing but the folder.
    (tmp_path / "with").rename(tmp_path / "moved")
    again = tessera.load(tmp_path / "moved", device="cpu")
    assert expected.shape == (2, 16, 16, 3)
    assert np.array_equal(again.sample(range(2)), expected)
    with pytest.raises(CheckpointError, match="there is no VAE folder"):
        tessera.load(tmp_path / "without", device="cpu").sample(range(2))
    # Saved along once more, from the copy, and in the place of itself.
    again.save(tmp_path / "again", codec=True)
    again.save(tmp_path / "again", codec=True)
    shutil.rmtree(tmp_path / "moved")
    once_more = tessera.load(tmp_path / "again", device="cpu")
    assert np.array_equal(once_more.sample(range(2)), expected)
    files = {path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*")}
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]
    assert Path("codec/config.json") in files


def test_pixels_have_no_codec_to_save(tmp_path: Path) -> None:
    with pytest.raises(TesseraError, match="a model of pixels has no autoencoder to save along"):
        tiny_pipeline().save(tmp_path / "p", codec=True)
    assert not list(tmp_path.iterdir())


def as_version_1(folder: Path, experts: list[str]) -> None:
    """Rewrite `config.json` as the first version had it: no parts, but a list of experts."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("parts") == dict.fromkeys(experts, "pipeline")
    config["version"] = 1
    if experts:
        config["experts"] = experts
    path.write_text(json.dumps(config))


def test_folders_of_version_1(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.save(tmp_path / "one")
    as_version_1(tmp_path / "one", [])
    one = tessera.load(tmp_path / "one", device="cpu")
    assert isinstance(one, DiffusionPipeline)
    assert np.array_equal(one.sample([3]), pipe.sample([3]))

    assert isinstance(pipe, DiffusionPipeline)
    other = tiny_pipeline()
    assert isinstance(other, DiffusionPipeline)
    for parameter in other.model.parameters():
        parameter.data.mul_(0.9)
    pair = ExpertsPipeline([pipe, other], [0.25])
    pair.save(tmp_path / "pair")
    names = ["expert-0", "expert-1"]
    as_version_1(tmp_path / "pair", names)
    for name in names:
        as_version_1(tmp_path / "pair" / name, [])
    again = tessera.load(tmp_path / "pair", device="cpu")
    assert isinstance(again, ExpertsPipeline)
    assert np.array_equal(again.sample([3]), pair.sample([3]))
    # Written anew, it is a folder of today.
    again.save(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["parts"] == dict.fromkeys(names, "pipeline")
    shutil.rmtree(tmp_path / "pair" / "expert-1")
    with pytest.raises(CheckpointError, match="expert-1 is missing"):
        tessera.load(tmp_path / "pair", device="cpu")

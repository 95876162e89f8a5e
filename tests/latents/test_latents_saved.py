"""Autoencoders that are saved along with what a run writes, once, and move with it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import random_images, write_packed
from numpy.typing import NDArray
from relay_tiny import run
from tiny_vae import latent_recipe, save_vae

import tessera
from tessera.data.codec import VaeCodec
from tessera.errors import CheckpointError, RecipeError
from tessera.recipes.loading import load_recipe
from tessera.recipes.schema import Recipe
from tessera.sharing.portable import copy_pipeline
from tessera.training import evaluation
from tessera.training.trainer import Trainer

FULL: dict[str, Any] = {"kind": "full"}
STAGES: dict[str, dict[str, Any]] = {
    "first": {"data": {"resolution": 8, "shrink": 2}},
    "second": {
        "objective": {"kind": "blur", "block": 2},
        "sampling": {"kind": "relay", "steps": 3},
    },
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def recipe(folder: Path, **changes: Any) -> Recipe:
    """A tiny recipe on the images of `folder`, which saves the autoencoder."""
    own = {"save_vae": True, "preview": None, "checkpoint_every_images": 8}
    base: dict[str, Any] = {
        "view": FULL,
        "codec": {"encode": "online"},
        "training": {"images": 16},
    }
    given = base | {k: v for k, v in changes.items() if k != "run"}
    return latent_recipe(
        folder / "vae", folder / "images.safetensors", run=own | changes.get("run", {}), **given
    )


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs whole, first and second, which no autoencoder lies beside any more."""
    made = tmp_path_factory.mktemp("made")
    save_vae(made / "vae")
    write_packed(
        made / "images.safetensors", random_images(10, size=16), labels=[i % 2 for i in range(10)]
    )
    Trainer(recipe(made), made / "whole").run()
    for name, changes in STAGES.items():
        Trainer(recipe(made, **changes), made / name).run()
    (made / "vae").rename(made / "gone")
    return made.rename(made.parent / "moved")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def pixels(folder: Path) -> NDArray[np.uint8]:
    images: NDArray[np.uint8] = tessera.load(folder, device="cpu").sample([0, 1])
    assert images.shape == (2, 16, 16, 3)
    assert images.std() > 0
    return images


def test_a_folder_of_a_run_makes_images_wherever_it_lies(moved: Path, tmp_path: Path) -> None:
    expected = pixels(moved / "whole")
    shutil.copytree(moved / "whole" / "pipeline", tmp_path / "alone")
    assert (pixels(tmp_path / "alone") == expected).all()
    run("sample", tmp_path / "alone", "--seeds", "0", "--out", tmp_path / "png", "--device", "cpu")
    # What is saved from there has it, too, unless that is not wanted.
    pipe = tessera.load(tmp_path / "alone", device="cpu")
    pipe.save(tmp_path / "again")
    assert (pixels(tmp_path / "again") == expected).all()
    pipe.save(tmp_path / "without", codec=False)
    with pytest.raises(CheckpointError, match="Name a folder that holds"):
        pixels(tmp_path / "without")


def test_experts_of_such_folders_have_it_once(moved: Path, tmp_path: Path) -> None:
    whole = moved / "whole"
    run("experts", tmp_path / "experts", whole, whole, "--thresholds", "0.25")
    assert [p.parent.name for p in (tmp_path / "experts").rglob(WEIGHTS)] == ["codec"]
    pixels(tmp_path / "experts")
    # One of the parts is enough.
    tessera.load(whole).save(tmp_path / "bare", codec=False)
    run("experts", tmp_path / "mixed", tmp_path / "bare", whole, "--thresholds", "0.25")
    pixels(tmp_path / "mixed")


def test_relays_of_such_folders_have_it_once(moved: Path, tmp_path: Path) -> None:
    run("relay", moved / "first", moved / "second", tmp_path / "relay")
    assert [p.parent.name for p in (tmp_path / "relay").rglob(WEIGHTS)] == ["codec"]
    pixels(tmp_path / "relay")
    run("relay", tmp_path / "relay" / "stage-0", moved / "second", tmp_path / "mixed")
    pixels(tmp_path / "mixed")


def test_stages_may_come_by_their_latents_differently(moved: Path, tmp_path: Path) -> None:
    first = tessera.load(moved / "first")
    codec = first.recipe.codec.model_copy(update={"encode": "cached"})
    first.recipe = first.recipe.model_copy(update={"codec": codec})
    first.save(tmp_path / "cached")
    run("relay", tmp_path / "cached", moved / "second", tmp_path / "relay")
    pixels(tmp_path / "relay")


def test_what_is_pushed_has_it(moved: Path, tmp_path: Path) -> None:
    copy_pipeline(moved / "whole" / "pipeline", tmp_path / "sent")
    pixels(tmp_path / "sent")


def inode(folder: Path) -> int:
    return (folder / "codec" / WEIGHTS).stat().st_ino


def test_it_is_written_once(moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(moved / "gone", tmp_path / "vae")
    shutil.copy(moved / "images.safetensors", tmp_path)
    build = evaluation.build_reference
    monkeypatch.setattr(
        evaluation, "build_reference", lambda data, **how: build(data, training_images=16, **how)
    )
    scores = {"every_images": 8, "images": 4}
    folder = tmp_path / "run"
    trainer = Trainer(recipe(tmp_path, evaluate=scores), folder)
    steps, seen = trainer.steps(), set()
    for _ in steps:
        seen |= {inode(folder / "pipeline"), inode(folder / "best" / "pipeline")}
    assert len(seen) == 1
    (number,) = seen
    # A process that goes on trusts no files but its own.
    Trainer(recipe(tmp_path, training={"images": 24}), resume=folder).run()
    assert inode(folder / "pipeline") != number
    shutil.rmtree(tmp_path / "vae")
    assert (pixels(folder / "best") == pixels(shutil.move(folder / "best", tmp_path / "b"))).all()


def test_only_own_files_are_linked_to(moved: Path, tmp_path: Path) -> None:
    codec, other = VaeCodec(str(moved / "gone")), VaeCodec(str(moved / "gone"))
    codec.save(tmp_path / "a")
    codec.save(tmp_path / "b", [tmp_path / "nowhere", tmp_path / "a"])
    other.save(tmp_path / "c", [tmp_path / "a"])
    a, b, c = (tmp_path / name / WEIGHTS for name in "abc")
    assert (a.samefile(b), a.samefile(c)) == (True, False)
    assert a.read_bytes() == c.read_bytes()
    os.utime(a, ns=(0, 0))  # as of a file that something else has written
    codec.save(tmp_path / "d", [tmp_path / "a"])
    assert not a.samefile(tmp_path / "d" / WEIGHTS)


def test_where_files_cannot_be_linked_they_are_written(
    moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    codec = VaeCodec(str(moved / "gone"))
    codec.save(tmp_path / "a")
    monkeypatch.setattr(os, "link", refuse)
    codec.save(tmp_path / "b", [tmp_path / "a"])
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (tmp_path / "a" / WEIGHTS).read_bytes()


def test_what_cannot_be_saved_is_refused_before_the_run(moved: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"run\.save_vae: a model of pixels has no VAE"):
        load_recipe("cifar10-small", ["run.save_vae=true"])
    with pytest.raises(CheckpointError, match="there is no VAE folder"):
        Trainer(recipe(moved, codec={"encode": "online"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()

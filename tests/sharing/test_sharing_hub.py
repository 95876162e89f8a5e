"""What is on the hub: pipelines by an id in every command, and autoencoders at their revision."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from energy_pipeline import energy_pipeline
from hub_server import FakeHub, hub_of_this_process
from lego_case import tiny_pipeline as lego_pipeline
from PIL import Image
from relay_tiny import FIRST, SECOND
from relay_tiny import pipeline as relay_stage
from tiny_pipeline import tiny_pipeline
from tiny_vae import latent_recipe, save_vae
from training_case import BASE, tiny_recipe
from typer.testing import CliRunner

import tessera
from tessera.cli import app
from tessera.errors import CheckpointError, TesseraError
from tessera.pipelines.base import Pipeline
from tessera.pipelines.loading import build_pipeline
from tessera.recipes.loading import parse_recipe
from tessera.recipes.overrides import merge
from tessera.training.trainer import Trainer

pytestmark = pytest.mark.slow

pytest.importorskip("huggingface_hub")

NAME = "ada/tiny@trial"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with hub_of_this_process(tmp_path, monkeypatch) as server:
        yield server


def put(hub: FakeHub, name: str, pipe: Pipeline, branch: str = "trial") -> None:
    """A pipeline on a branch, of a repository whose `main` is empty."""
    folder = Path(f"put-{name.replace('/', '-')}")
    pipe.save(folder)
    commit = hub.put(name, folder)
    hub.branches[name] = {"main": next(iter(hub.commits[name])), branch: commit}


# ---------------------------------------------------------------------- ids in every command


def discrete() -> Pipeline:
    """A model that has a counterpart in other code."""
    return relay_stage(
        network={"kind": "dit", "patch": 2, "depth": 1, "width": 32, "heads": 2},
        preconditioning={"kind": "discrete", "prediction": "eps"},
        objective={"kind": "discrete"},
        sampling={"kind": "ddpm", "steps": "2"},
    )


def masked() -> Pipeline:
    """A model that edits pictures."""
    network = {"kind": "mar", "patch": 2, "width": 16, "depth": 1, "heads": 2, "head_depth": 1}
    own: dict[str, Any] = {
        "network": {**network, "decoder_depth": 1, "buffer": 2, "head_width": 16},
        "preconditioning": {"kind": "discrete", "schedule": "linear0.002", "prediction": "eps"},
        "objective": {"kind": "mar", "label_dropout": 0.2},
        "sampling": {"kind": "mar", "num_iter": 2, "head_steps": "3"},
    }
    return build_pipeline(parse_recipe(merge({**BASE, "network": {}}, own)))


COMMANDS: dict[str, tuple[str, Any]] = {
    "sample": ("sample NAME --seeds 0-1 --out made", tiny_pipeline),
    "guide": ("sample put-ada-tiny --guide NAME --guidance 2 --seeds 0 --out made", tiny_pipeline),
    "cost": ("cost NAME", tiny_pipeline),
    "edit": ("edit NAME a.png box=0,0,4,4 --out made", masked),
    "bricks": ("bricks NAME made.png", lego_pipeline),
    "energy": ("energy NAME images --num 2", energy_pipeline),
    "nll": ("eval nll NAME images --num 2 --steps 2", discrete),
    "score": ("eval score NAME images --metrics fd --num 2 --training-images 8", tiny_pipeline),
    "experts": ("experts made NAME NAME --thresholds 1", tiny_pipeline),
    "export": ("export NAME made.safetensors --to dit", discrete),
    "push": ("push NAME ada/copy --samples 0", tiny_pipeline),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_takes_an_id_with_its_revision(hub: FakeHub, command: str) -> None:
    words, make = COMMANDS[command]
    put(hub, "ada/tiny", make())
    Path("images").mkdir()
    for place in ("a.png", *(f"images/{i}.png" for i in range(12))):
        Image.fromarray(np.full((8, 8, 3), 100, np.uint8)).save(place)
    arguments = [NAME if word == "NAME" else word for word in words.split()]
    if command not in ("cost", "experts", "export"):
        arguments += ["--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None, result.exception
    # Nothing else of that name would do.
    arguments = [word.replace("trial", "main") for word in arguments]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, TesseraError)


def test_stages_by_their_ids(hub: FakeHub) -> None:
    put(hub, "ada/first", relay_stage(FIRST))
    put(hub, "ada/second", relay_stage(SECOND))
    result = CliRunner().invoke(app, ["relay", "ada/first@trial", "ada/second@trial", "made"])
    assert result.exception is None, result.exception
    assert tessera.load("made", device="cpu").kind == "relay"


def test_training_from_an_id(hub: FakeHub, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, training={"initial_weights": NAME})
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        Trainer(recipe, tmp_path / "none")
    pipe = build_pipeline(tiny_recipe(tmp_path))
    put(hub, "ada/tiny", pipe)
    trainer = Trainer(recipe, tmp_path / "run")
    ours = {k: v.cpu() for k, v in trainer.learner.step.model.network.state_dict().items()}
    theirs = pipe.networks()[0].state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


# ------------------------------------------------------------------------------- autoencoders


def latent_pipeline(vae: Path | str) -> Pipeline:
    """A tiny model of latents whose recipe names this autoencoder."""
    recipe = latent_recipe(Path("vae"), Path("nowhere"), codec={"model": str(vae)})
    pipe = build_pipeline(recipe)
    for parameter in pipe.model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    return pipe


def push(*words: object) -> None:
    command = ["push", *map(str, words), "--samples", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    if result.exception is not None:
        raise result.exception


def offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the cache is left."""
    from huggingface_hub import constants

    hub.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def other_vae(folder: Path) -> Path:
    """An autoencoder that decodes otherwise."""
    from safetensors.torch import load_file, save_file

    save_vae(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["decoder.conv_out.bias"] += 0.7
    save_file(state, path)
    return folder


@pytest.mark.parametrize("case", ["local", "id", "included"])
def test_the_autoencoder_of_what_is_pushed(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """A local one goes along; one on the hub stays there, unless it is asked for."""
    revision = hub.put("ada/vae", save_vae(tmp_path / "vae"))
    hub.put("ada/vae", other_vae(tmp_path / "newer"))
    pinned = f"ada/vae@{revision}"
    pipe = latent_pipeline(tmp_path / "vae" if case == "local" else pinned)
    ours = pipe.sample([3])
    assert ours.shape == (1, 16, 16, 3)
    pipe.save(tmp_path / "pipe")
    push(tmp_path / "pipe", "ada/latent", *(["--include-vae"] if case == "included" else []))
    files = hub.files("ada/latent")
    along = {"codec/config.json", "codec/diffusion_pytorch_model.safetensors"}
    assert along & {*files} == (set() if case == "id" else along)
    assert not any(str(tmp_path).encode() in content for content in files.values())
    card = files["README.md"].decode()
    place = f"`ada/vae` on the hub, at the revision `{revision}`"
    assert f"| autoencoder | {place if case == 'id' else ''}" in card
    assert ("in the folder `codec`" in card) == (case != "id")

    name = f"ada/latent@{hub.branches['ada/latent']['main']}"
    np.testing.assert_array_equal(tessera.load(name, device="cpu").sample([3]), ours)
    offline(hub, monkeypatch)
    again = tessera.load(name, device="cpu")
    np.testing.assert_array_equal(again.sample([3]), ours)
    assert again.recipe.codec.model == ("vae" if case == "local" else pinned)  # type: ignore[union-attr]


def test_an_autoencoder_without_revision(hub: FakeHub, tmp_path: Path) -> None:
    """Is the newest one, and the card says so; of a revision that is not there, nothing else is."""
    hub.put("ada/vae", save_vae(tmp_path / "vae"))
    latent_pipeline("ada/vae").save(tmp_path / "pipe")
    push(tmp_path / "pipe", "ada/latent")
    assert "names no revision" in hub.files("ada/latent")["README.md"].decode()
    before = tessera.load("ada/latent", device="cpu").sample([3])
    hub.put("ada/vae", other_vae(tmp_path / "newer"))
    assert (tessera.load("ada/latent", device="cpu").sample([3]) != before).any()
    with pytest.raises(CheckpointError, match="ada/vae@v9"):
        latent_pipeline("ada/vae@v9").sample([3])


def test_models_of_pixels_have_none(hub: FakeHub, tmp_path: Path) -> None:
    tiny_pipeline().save(tmp_path / "pipe")
    with pytest.raises(TesseraError, match="model of pixels; leave out --include-vae"):
        push(tmp_path / "pipe", "ada/tiny", "--include-vae")
    assert "ada/tiny" not in hub.private

"""Recipes by name and from files, with overrides, and what the errors say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.conditioning import Conditioning
from tessera.errors import RecipeError
from tessera.recipes.build import build_denoiser
from tessera.recipes.loading import dump_recipe, load_recipe, parse_recipe, shipped
from tessera.recipes.schema import (
    AdmUNetConfig,
    EdmObjectiveConfig,
    EdmSamplerConfig,
    SongUNetConfig,
)
from tessera.recipes.text import read_yaml, write_yaml


def message(source: str | Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_valid_and_survive_text(name: str) -> None:
    recipe = shipped()[name]()
    assert recipe.name == name
    assert recipe.description
    assert len(recipe.description) <= 30, "the table of recipes fits 80 columns"
    data = dump_recipe(recipe)
    assert parse_recipe(json.loads(json.dumps(data, allow_nan=False))) == recipe
    assert parse_recipe(read_yaml(write_yaml(data), "text")) == recipe


def test_numbers_as_people_write_them() -> None:
    recipe = load_recipe(
        "cifar10-small",
        [
            "training.images=2e6", "optimizer.lr=1e-4", "optimizer.eps=1E-8",
            "training.batch=1_024", "sampling.s_max=inf", "run.keep=010",
        ],
    )  # fmt: skip
    assert recipe.training.images == 2_000_000
    assert recipe.optimizer.lr == 1e-4
    assert recipe.training.batch == 1024
    assert recipe.run.keep == 10
    assert isinstance(recipe.sampling, EdmSamplerConfig)
    assert recipe.sampling.s_max == math.inf


@pytest.mark.parametrize("text", ["1,2,4", "[1,2,4]", "[1, 2, 4]", "1, 2, 4"])
def test_lists(text: str) -> None:
    recipe = load_recipe("cifar10-small", [f"network.channel_mult={text}"])
    assert recipe.network.channel_mult == (1, 2, 4)


def test_single_and_empty_lists() -> None:
    recipe = load_recipe("cifar10-small", ["network.attn_resolutions=16", "optimizer.betas=0.8,1"])
    assert recipe.network.attn_resolutions == (16,)
    assert recipe.optimizer.betas == (0.8, 1)
    recipe = load_recipe("cifar10-small", ["network.attn_resolutions=[]"])
    assert recipe.network.attn_resolutions == ()


def test_words_true_and_null() -> None:
    recipe = load_recipe(
        "edm-cifar10-cond-vp",
        ["training.compile=yes", "data.xflip=true", "augment=null", "run.dir=2024-01-01",
         "run.wandb=no", "data.path=a=b.zip", "description=12"],
    )  # fmt: skip
    assert recipe.training.compile
    assert recipe.data.xflip
    assert recipe.augment is None
    assert recipe.augment_dim == 0
    assert (recipe.run.dir, recipe.run.wandb, recipe.data.path) == ("2024-01-01", "no", "a=b.zip")
    assert recipe.description == "12"


def test_elements_of_lists_by_index() -> None:
    recipe = load_recipe(
        "cifar10-small", ["ema.0.halflife_images=1e6", "ema.1.halflife_images=2e6"]
    )
    assert [ema.halflife_images for ema in recipe.ema] == [1e6, 2e6]
    assert "ema is a list of 1" in message("cifar10-small", "ema.2.halflife_images=1")
    assert "ema is a list of 1" in message("cifar10-small", "ema.halflife_images=1")


def test_sections_that_were_absent() -> None:
    recipe = load_recipe("cifar10-small", ["augment.p=0.3"])
    assert recipe.augment is not None
    assert recipe.augment.p == 0.3
    assert recipe.augment_dim == 9


@pytest.mark.parametrize("swap", [False, True])
def test_a_new_kind_replaces_its_section(swap: bool) -> None:
    overrides = ["network.kind=adm_unet", "network.model_channels=64"]
    recipe = load_recipe("edm-cifar10-cond-ve", overrides[::-1] if swap else overrides)
    assert recipe.network == AdmUNetConfig(model_channels=64)


def test_the_same_kind_keeps_its_section() -> None:
    recipe = load_recipe("edm-cifar10-cond-ve", ["network.kind=song_unet"])
    assert isinstance(recipe.network, SongUNetConfig)
    assert recipe.network.encoder == "residual"


def test_true_vp_and_ve_are_reachable() -> None:
    for kind in ("vp", "ve"):
        recipe = load_recipe(
            f"edm-cifar10-uncond-{kind}", [f"preconditioning.kind={kind}", f"objective.kind={kind}"]
        )
        assert recipe.preconditioning.kind == recipe.objective.kind == kind


def test_all_mistakes_are_listed_with_the_nearest_key() -> None:
    text = message(
        "cifar10-small",
        "training.batc=3", "lr=1", "network.dropout=2", "network.embedding=fourrier",
        "data.order=3", "objective.kind=emd", "training.batch=abc", "optimizer.lr=-1",
        "ema.0.halflife=3", "training.compile=7", "data.num_classes=1.5", "zzz=1",
        "network.channel_mult=1,x", "codec=3",
    )  # fmt: skip
    for line in (
        "training.batc: unknown key; did you mean training.batch?",
        "lr: unknown key; did you mean optimizer.lr?",
        "network.dropout: must be at most 1, got 2",
        "network.embedding: 'fourrier' is not one of positional or fourier; did you mean fourier?",
        "data.order: 3 is not one of epochs or windowed",
        "objective.kind: 'emd' is not one of edm, vp, ve, discrete, blur, mar, external; did you "
        "mean edm?",
        "training.batch: expected a whole number, got 'abc'",
        "optimizer.lr: must be greater than 0, got -1",
        "ema.0.halflife: unknown key; did you mean ema.0.halflife_images?",
        "training.compile: expected true or false, got 7",
        "data.num_classes: expected a whole number, got 1.5",
        "zzz: unknown key; a recipe has name, description, data",
        "network.channel_mult.1: expected a whole number, got 'x'",
        "codec: expected a section (keys and values), got 3",
    ):
        assert f"\n  {line}" in text
    assert len(text.splitlines()) == 15
    for noise in ("song_unet", "union", "pydantic", "Input should", "needs at least"):
        assert noise not in text


def test_one_mistake_is_one_line() -> None:
    text = message("cifar10-small", "network.model_chanels=64")
    assert text == (
        "cifar10-small: network.model_chanels: unknown key; did you mean network.model_channels?"
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.resolution=30", "data.resolution (30) must be a multiple of 4"),
        ("training.micro_batch=7", "training: batch (32) must be a multiple of micro_batch (7)"),
        ("training.batch", "is not of the form key.path=value"),
        ("=3", "is not of the form key.path=value"),
        ("a..b=3", "is not of the form key.path=value"),
        ("training.batch.x=3", "training.batch is the value 32"),
        ("training.batch=[1", "training.batch=[1, line 1"),
        ("ema=[]", "ema: needs at least 1 element(s)"),
        ("network.kind=null", "network.kind: "),
        ("data=null", "data: expected a section"),
        ("training.batch=", "training.batch: expected a whole number, got null"),
        ("sampling.sigma_min=90", "sampling: `sigma_min=90` must be less than `sigma_max=80`"),
    ],
)
def test_messages(override: str, words: str) -> None:
    assert words in message("cifar10-small", override)


def test_unknown_names() -> None:
    assert "did you mean edm-ffhq64-vp?" in message("edm-ffhq-vp")
    assert "did you mean" not in message("x")
    assert "no such recipe file" in message("missing.yaml")
    assert "no such recipe file" in message("folder/missing")


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {resolution: 8}\nnetwork: {kind: song_unet, channel_mult: [1, 2]}\n")
    recipe = load_recipe(path, ["training.seed=3"])
    assert recipe.name == "mine"
    assert recipe.data.resolution == 8
    assert recipe.training.seed == 3


@pytest.mark.parametrize(
    "key",
    ["data.path", "run.dir", "training.initial_weights", "evaluate.reference", "evaluate.weights"],
)
def test_home_folders(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = [f"{key}=~/x", "evaluate.features=inception"]
    value: Any = load_recipe("edm-cifar10-cond-ve", overrides)
    for part in key.split("."):
        value = getattr(value, part)
    assert value == str(tmp_path / "x")
    (tmp_path / "base.yaml").write_text("base: cifar10-small\n")
    (tmp_path / "mine.yaml").write_text(f"base: ~/base.yaml\n{overrides[1].split('.')[0]}: null\n")
    assert load_recipe("~/mine.yaml").name == "mine"


def test_vae_in_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe("patch-imagenet256-latent", ["codec.model=~/vae"])
    assert recipe.codec.model == str(tmp_path / "vae")
    assert load_recipe("patch-imagenet256-latent").codec.model == "stabilityai/sd-vae-ft-ema"


@pytest.mark.parametrize(
    ("width", "mults", "wrong"),
    [
        (96, "1,2", ""),  # 1 and 3 heads
        (160, "1,1", ""),  # 2 heads of 80
        (32, "1,3", "there is attention at 16, where the ADM network is 32 channels wide, and"),
        (224, "1,1", "which 3 heads do not divide"),
    ],
)
def test_heads_of_adm(width: int, mults: str, wrong: str) -> None:
    overrides = [
        "network.kind=adm_unet", f"network.model_channels={width}", "network.num_blocks=1",
        f"network.channel_mult={mults}", "data.resolution=16",
    ]  # fmt: skip
    everywhere = [*overrides, "network.attn_resolutions=16,8"]
    if wrong:
        assert wrong in message("edm-cifar10-cond-ve", *everywhere)
        return
    for chosen in (everywhere, [*overrides, "network.attn_resolutions=[]"]):
        denoiser = build_denoiser(load_recipe("edm-cifar10-cond-ve", chosen)).eval()
        x = torch.zeros(1, 3, 16, 16)
        with torch.no_grad():
            assert denoiser(x, torch.ones(1), Conditioning()).mean.shape == x.shape


def test_attention_between_the_halves_of_adm() -> None:
    """There it cannot be left out, but is absent where the network is narrow."""
    overrides = ["network.kind=adm_unet", "network.attn_resolutions=[]", "data.resolution=16"]
    narrow = [*overrides, "network.model_channels=32", "network.channel_mult=1,1"]
    assert load_recipe("edm-cifar10-cond-ve", narrow)
    wide = [*overrides, "network.model_channels=32", "network.channel_mult=1,7"]
    text = message("edm-cifar10-cond-ve", *wide)
    assert "224 channels wide, which 3 heads do not divide" in text
    assert "leave" not in text


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(dump_recipe(shipped()["edm-imagenet64-adm"]())))
    assert load_recipe(path) == shipped()["edm-imagenet64-adm"]()


def test_sections_with_a_default_kind_need_none(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "data: {resolution: 8}\nnetwork: {kind: song_unet}\nobjective: {label_dropout: 0.1}\n"
    )
    assert load_recipe(path).objective == EdmObjectiveConfig(label_dropout=0.1)
    path.write_text("data: {resolution: 8}\nnetwork: {model_channels: 64}\n")
    assert "network.kind: is missing; choose one of song_unet, adm_unet" in message(path)


def test_inheritance(tmp_path: Path) -> None:
    (tmp_path / "mid.yaml").write_text(
        "base: cifar10-small\ntraining: {batch: 32}\nobjective: {label_dropout: 0.1}\n"
    )
    (tmp_path / "leaf.yaml").write_text(
        "base: mid.yaml\nname: my-leaf\nnetwork: {kind: adm_unet, model_channels: 64}\n"
    )
    recipe = load_recipe(tmp_path / "leaf.yaml")
    small = shipped()["cifar10-small"]()
    assert recipe.name == "my-leaf"
    assert recipe.training == small.training.model_copy(update={"batch": 32})
    assert recipe.objective == small.objective.model_copy(update={"label_dropout": 0.1})
    assert recipe.network == AdmUNetConfig(model_channels=64)
    assert load_recipe(tmp_path / "mid.yaml").name == "mid"


def test_inheritance_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    assert "is built on this file itself" in message(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("base: cifar10-smal\n")
    assert "c.yaml: base: no recipe is called" in message(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: {resolution: 8\n", "line 2"),
        ("- 1\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("data: {}\ndata: {}\n", "line 2, column 1: the key 'data' stands there twice"),
        ("base: [a]\n", "base: expected the name of a recipe or a file"),
        ("!!python/object/apply:os.system ['true']\n", "which recipes do not have"),
        ("1: 2\n", "1: unknown key"),
        ("[a]: 2\n", "mine.yaml"),
    ],
)
def test_damaged_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert words in message(path)


def test_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in message(path)


def test_text_that_looks_like_a_number_stays_text() -> None:
    for value in ("1e4", "2024-01-01", "true", "null", "1,2", "007"):
        assert read_yaml(write_yaml({"name": value}), "text") == {"name": value}


def test_a_run_folder_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("base: cifar10-small\n")
    text = message(tmp_path)
    assert "the folder of a run" in text
    assert f"--resume {tmp_path}" in text
    assert str(tmp_path / "recipe.yaml") in text

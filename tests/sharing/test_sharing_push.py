"""`tessera push` to a hub on this machine, and loading from it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from forked import fork
from hub_server import FakeHub, hub_of_this_process
from PIL import Image
from tiny_pipeline import tiny_pipeline
from typer.testing import CliRunner

import tessera
from tessera.cli import app
from tessera.errors import CheckpointError, DataError, TesseraError
from tessera.images import grid
from tessera.recipes.loading import parse_recipe
from tessera.sharing.portable import portable_recipe
from tessera.sharing.push import check_repository

huggingface_hub = pytest.importorskip("huggingface_hub")

NAME = "ada/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with hub_of_this_process(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline with two averages, of which a run with scores has told, and local paths."""
    pipe = tiny_pipeline(emas=(1000, 2000))
    data = pipe.recipe.model_dump()
    data["data"]["path"] = "/home/ada/secret/bugs.zip"
    data["run"]["dir"] = "/home/ada/secret/runs/bugs"
    data["evaluate"] = {"metrics": ["fd", "pr"], "images": 100, "reference": "../secret/real.npz"}
    pipe.recipe = parse_recipe(data)
    pipe.save(tmp_path / "runs" / "bugs" / "pipeline")
    lines = [
        {"images": 2000, "evaluate/fd": 80.0, "evaluate/precision": 0.25, "evaluate/recall": 0.5},
        {"images": 4000, "evaluate/fd": 12.5, "evaluate/precision": 0.5, "evaluate/recall": 0.75},
        {"images": 5000, "loss": 0.5},
        {"images": 6000, "evaluate/fd": 1.0, "evaluate/precision": 0.5, "evaluate/recall": 0.75},
    ]
    log = "".join(f"{json.dumps(line)}\n" for line in lines)
    (tmp_path / "runs" / "bugs" / "metrics.jsonl").write_text(log)
    return tmp_path / "runs" / "bugs"


def run(command: str, *words: object) -> str:
    """What a command prints; the user's errors are raised."""
    result = CliRunner().invoke(app, [command, *map(str, words)])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def push(*words: object) -> str:
    """What a push of four samples prints."""
    return run("push", *words, "--samples", "4", "--device", "cpu")


def front_matter(card: str) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return found


# --------------------------------------------------------------------------------- there and back


def test_pushed_and_loaded(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    printed = push(folder, NAME, "--licence", "apache-2.0", "--message", "The first")
    commit = hub.branches[NAME]["main"]
    assert f"tessera sample {NAME}@{commit}" in printed
    assert f'tessera.load("{NAME}", revision="{commit}")' in printed
    assert hub.messages[-1] == "The first"
    assert not hub.private[NAME]
    assert sorted(hub.files(NAME)) == [
        ".gitattributes", "README.md", "config.json", "model-2000.safetensors",
        "model.safetensors", "samples.png",
    ]  # fmt: skip

    ours = tessera.load(folder, device="cpu")
    # A newer model under the same name.
    tiny_pipeline(num_classes=0).save(tmp_path / "other")
    push(tmp_path / "other", NAME)
    assert "model-2000.safetensors" not in hub.files(NAME)
    assert hub.branches[NAME]["main"] != commit
    assert tessera.load(NAME, device="cpu").model.num_classes == 0
    for pipe in (
        tessera.load(NAME, revision=commit, device="cpu"),
        tessera.load(f"{NAME}@{commit}", device="cpu"),
    ):
        np.testing.assert_array_equal(pipe.sample(range(3)), ours.sample(range(3)))
    assert tessera.load(f"{NAME}@{commit}", ema=2000, device="cpu").ema == "2000"


def test_every_command_takes_an_id(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    push(folder, NAME, "--revision", "trial")
    assert sorted(hub.files(NAME)) == [".gitattributes"]
    name = f"{NAME}@trial"
    run("sample", name, "--seeds", "0-1", "--out", tmp_path / "images", "--device", "cpu")
    assert len([*(tmp_path / "images").rglob("*.png")]) == 2
    assert json.loads(run("cost", name, "--json"))["parameters"] > 0
    run("experts", tmp_path / "both", name, folder, "--thresholds", "1")
    assert tessera.load(tmp_path / "both", device="cpu").kind == "experts"


def test_experts_are_sent_with_their_parts(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    run("experts", tmp_path / "both", folder, folder, "--thresholds", "1")
    push(tmp_path / "both", NAME)
    files = hub.files(NAME)
    assert {"config.json", "expert-0/config.json", "expert-1/model.safetensors"} <= files.keys()
    assert not any(b"secret" in content for content in files.values())
    ours, theirs = (tessera.load(source, device="cpu") for source in (tmp_path / "both", NAME))
    np.testing.assert_array_equal(ours.sample([5]), theirs.sample([5]))


def test_as_a_program(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    """With nothing but the environment that a user sets."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(Path(tessera.__file__).parents[1]),
    }  # fmt: skip
    words = ["push", folder, NAME, "--samples", "0", "--private", "--device", "cpu"]
    done = fork(words, env=environment)
    _, errors = done.communicate()
    assert done.returncode == 0, errors
    assert hub.private[NAME]
    assert "samples.png" not in hub.files(NAME)
    assert tessera.load(NAME, device="cpu").images_seen == 5000


# ------------------------------------------------------------------------------------- resuming


def test_it_goes_on_after_the_network_went(hub: FakeHub, folder: Path) -> None:
    second = hashlib.sha256((folder / "pipeline" / "model-2000.safetensors").read_bytes())
    hub.fails = {second.hexdigest()}
    with pytest.raises(TesseraError, match=r"connection broke off.*same command goes on"):
        push(folder, NAME)
    assert sorted(hub.files(NAME)) == [".gitattributes"]
    before = set(hub.received)
    assert second.hexdigest() not in before
    hub.fails = set()
    push(folder, NAME)
    assert set(hub.received.values()) == {1}
    assert len(hub.received) == 3
    commit = hub.branches[NAME]["main"]
    printed = push(folder, NAME)  # nothing is new
    assert set(hub.received.values()) == {1}
    assert hub.branches[NAME]["main"] == commit
    assert commit in printed


# ------------------------------------------------------------------------------------- the card


def test_the_card(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    tool = {
        "results": [
            {
                "metric": "is", "convention": "adm", "values": {"is": 7.25, "std": 0.5},
                "rule": "logits without bias",
            }
        ],
        "samples": {"name": "/home/ada/secret/out", "n": 50000},
        "reference": {"name": "/home/ada/secret/bugs.npz", "n": 600},
        "features": {"extractor": "inception", "dim": 2048, "weights": "f58cb9b6"},
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(tool))
    own = {
        "fd_classifier": 3.5, "n": 100, "n_reference": 200, "extractor": "classifier", "dim": 64,
        "accuracy": 0.9, "recognised": 0.8,
    }  # fmt: skip
    (tmp_path / "b.json").write_text(json.dumps(own))
    push(
        folder, NAME, "--licence", "cc-by-4.0",
        "--score", tmp_path / "a.json", "--score", tmp_path / "b.json",
    )  # fmt: skip
    files = hub.files(NAME)
    assert not [path for path, content in files.items() if b"secret" in content]
    card = files["README.md"].decode()
    front = front_matter(card)
    assert front["license"] == "cc-by-4.0"
    assert front["library_name"] == "tessera"
    assert front["pipeline_tag"] == "unconditional-image-generation"
    assert "song-unet" in front["tags"]  # type: ignore[operator]
    pipe = tessera.load(folder, device="cpu")
    cost = pipe.cost()
    for line in (
        "| images seen in training | 5,000 |",
        f"| parameters | {cost.parameters:,} |",
        "| averages of the weights | 1000, 2000 |",
        "| set | bugs.zip |",
        "| resolution | 8 x 8, 3 channels |",
        "| classes | 3: ant, bee, cat |",
        f"{cost.evaluations} evaluations |",
        "Measured while training, after 4,000 of them: 100 samples against real.npz, "
        "features: classifier.",
        "| fd | 12.5 | edm | float64 statistics |",
        "| precision | 0.5 | adm | k = 3, these features, exact distances (the tool: float16) |",
        "| recall | 0.75 |  |  |",
        "50,000 samples against bugs.npz (600 images), features: inception, weights f58cb9b6.",
        "| is | 7.25 | adm | logits without bias |",
        "| fd_classifier | 3.5 | edm |",
        "| recognised | 80.0% |",
        f'tessera.load("{NAME}", revision="main")',
    ):
        assert line in card, line
    recipe = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card, re.S)[0])
    assert parse_recipe(recipe).data.path == "bugs.zip"
    assert recipe["run"]["dir"] is None
    assert json.loads(files["config.json"])["recipe"] == recipe
    (tmp_path / "grid.png").write_bytes(files["samples.png"])
    drawn = np.asarray(Image.open(tmp_path / "grid.png"))
    np.testing.assert_array_equal(drawn, grid(pipe.sample(range(4))))
    assert "--seeds 0-3" in card


def test_without_licence_scores_and_grid(hub: FakeHub, tmp_path: Path) -> None:
    tiny_pipeline().save(tmp_path / "p")
    printed = run("push", tmp_path / "p", NAME, "--samples", "0", "--device", "cpu")
    card = hub.files(NAME)["README.md"].decode()
    assert front_matter(card)["license"] == "other"
    assert "keep the licence of their authors" in " ".join(card.split())
    assert "None were measured." in card
    assert "samples.png" not in card
    assert "--licence" in printed


def test_the_best_of_a_run_has_its_own_scores(hub: FakeHub, folder: Path) -> None:
    best = folder / "best"
    tessera.load(folder, device="cpu").save(best / "pipeline")
    (best / "score.json").write_text('{"images": 5000, "by": "evaluate/fd", "evaluate/fd": 7.5}')
    push(best, NAME)
    card = hub.files(NAME)["README.md"].decode()
    assert "of these weights: 100 samples" in card
    assert "| fd | 7.5 | edm |" in card


def test_a_card_of_ones_own(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "card"
    printed = push(folder, NAME, "--out", out)
    assert f"tessera push {out} {NAME}" in printed
    assert not hub.private
    assert not any(path.is_symlink() for path in out.rglob("*"))
    card = (out / "README.md").read_text() + "\nMine.\n"
    (out / "README.md").write_text(card)
    push(out, NAME)
    assert hub.files(NAME)["README.md"].decode() == card
    assert hub.files(NAME)["samples.png"] == (out / "samples.png").read_bytes()
    with pytest.raises(TesseraError, match=r"is sent as it is"):
        push(out, NAME, "--licence", "mit")
    with pytest.raises(TesseraError, match=r"exists already"):
        push(folder, NAME, "--out", out)


@pytest.mark.parametrize(
    ("section", "key", "value", "left"),
    [
        ("data", "path", "~/a/b.zip", "b.zip"),
        ("data", "validation", "rel/val", "val"),
        ("training", "initial_weights", "/a/runs/b/", "b"),
        ("training", "initial_weights", "user/name@v1", "user/name@v1"),
        ("codec", "model", "C:\\models\\vae", "vae"),
        ("codec", "model", "user/vae", "user/vae"),
        ("codec", "model", "here/vae", "vae"),
    ],
)
def test_paths_in_recipes(
    section: str, key: str, value: str, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    data = tiny_pipeline().recipe.model_dump()
    if section == "codec":
        data |= {"codec": {"kind": "vae", "downsample": 1, "channels": 3}}
    data[section][key] = value
    recipe = parse_recipe(data)
    found = portable_recipe(recipe)
    assert found[section][key] == left
    assert parse_recipe(found).model_dump() | {section: 0} == recipe.model_dump() | {section: 0}


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "name", ["tiny", "a/b/c", "ada/", "/tiny", "ada/ti ny", "ada/-tiny", "ada/a..b", "ada/x@main"]
)
def test_names_of_a_wrong_form(name: str) -> None:
    with pytest.raises(TesseraError, match=r"is no name on the hub. Give one as user/name"):
        check_repository(name)


def test_without_a_token(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(TesseraError, match=r"needs a token.*hf auth login.*HF_TOKEN"):
        push(folder, NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(TesseraError, match=r"your token is not valid"):
        push(folder, NAME)
    assert not hub.private


def test_without_permission(hub: FakeHub, folder: Path) -> None:
    with pytest.raises(TesseraError, match=r"may not do that with grace/tiny \(403\)"):
        push(folder, "grace/tiny")


def test_a_public_one_is_not_private(hub: FakeHub, folder: Path) -> None:
    hub.create(NAME, private=False)
    with pytest.raises(TesseraError, match=r"is there already, and public.*leave out --private"):
        push(folder, NAME, "--private")
    assert sorted(hub.files(NAME)) == [".gitattributes"]


def test_what_is_not_there(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(folder, NAME, "--private")
    with pytest.raises(CheckpointError, match=r"ada/tiny has no revision 'v9'"):
        tessera.load(f"{NAME}@v9")
    with pytest.raises(CheckpointError, match=r"there is no ada/other, or it is private"):
        tessera.load("ada/other")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match=r"or it is private.*hf auth login"):
        tessera.load(f"{NAME}@{'0' * 40}")
    hub.close()
    with pytest.raises(CheckpointError, match=r"cannot be reached"):
        tessera.load(NAME)


def test_files_that_are_no_scores(hub: FakeHub, folder: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file.*tessera eval score"):
        push(folder, NAME, "--score", "nowhere.json")
    for text in ("[1]", "{}", '{"results": 3, "samples": {"n": 1}}', "3"):
        Path("x.json").write_text(text)
        with pytest.raises(DataError, match=r"x.json holds no scores"):
            push(folder, NAME, "--score", "x.json")
    assert not hub.private


def test_damaged_weights_are_not_sent(hub: FakeHub, folder: Path) -> None:
    path = folder / "pipeline" / "model-2000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match=r"model-2000\.safetensors is damaged"):
        push(folder, NAME)
    assert not hub.private

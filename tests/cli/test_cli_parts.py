"""`--with MODULE`: a user's own parts on the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from training_case import start, tiny_recipe, write_recipe
from typer.testing import CliRunner

from tessera.cli import app
from tessera.cli.parts import import_parts
from tessera.errors import RecipeError, TesseraError

EXTERNAL = {
    "network": {"kind": "external", "name": "two convolutions"},
    "objective": {"kind": "external"},
    "sampling": {"kind": "external"},
}
WITH = ("--with", "own_parts")


def run(*arguments: Any) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    recipe = tiny_recipe(folder, training={"images": 32}, **EXTERNAL)
    write_recipe(folder, recipe.model_copy(update={"data": recipe.data}))
    text = json.loads((folder / "tiny.json").read_text())
    text["data"]["path"] = None
    (folder / "tiny.json").write_text(json.dumps(text))
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    output = run("train", *WITH, folder / "tiny.json", f"run.dir={folder / 'run'}")
    assert "own parts" in output
    assert "network, objective, sampler, refine, dataset, of own_parts" in output
    assert "two convolutions" in output
    assert "mine: 30 images" in output
    assert f"tessera sample --with own_parts {folder / 'run'}" in output
    assert f"tessera train --with own_parts --resume {folder / 'run'}" in output
    return folder / "run"


def test_every_command_that_opens_a_model_takes_parts() -> None:
    root: Any = typer.main.get_command(app)
    takes = {
        name
        for name, command in [*root.commands.items(), *root.commands["eval"].commands.items()]
        if any("--with" in parameter.opts for parameter in command.params)
    }
    assert takes == {
        "train", "sample", "cost", "experts", "relay", "bricks", "edit", "energy", "nll",
        "export", "push", "features", "reference", "report", "score",
    }  # fmt: skip


def test_a_resumed_run_names_its_parts_again(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(RecipeError, match=r"network\.kind and objective\.kind .*--with MODULE"):
        run("train", "--resume", tmp_path / "run", "training.images=48")
    run("train", *WITH, "--resume", tmp_path / "run", "training.images=48")
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())[-1].endswith("48")


def test_samples(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"network\.kind is external.*--with MODULE"):
        run("sample", trained, "--out", tmp_path / "none")
    output = run(
        "sample", *WITH, trained, "options.steps=3", "--seeds", "0-1", "--out", tmp_path / "s"
    )
    assert "3 network evaluations" in output
    facts = json.loads((tmp_path / "s" / "sampling.json").read_text())
    assert facts["sampler"]["options"] == {"steps": 3}
    output = run(
        "sample", *WITH, trained, "sampler=edm", "steps=2", "refine.options.shift=0.5",
        "--seeds", "0-1", "--out", tmp_path / "edm",
    )  # fmt: skip
    assert "3 network evaluations" in output
    assert "options" in run("sample", *WITH, trained, "--options")
    with pytest.raises(TesseraError, match=r"options\.steps, if at all"):
        run("sample", *WITH, trained, "--steps", "3", "--out", tmp_path / "no")
    with pytest.raises(RecipeError, match=r"'sampler' raised TypeError: .*unexpected.*'stepz'"):
        run("sample", *WITH, trained, "options.stepz=3", "--out", tmp_path / "no")


def test_costs(folder: Path) -> None:
    plain = json.loads(run("cost", *WITH, folder / "tiny.json", "--json"))
    assert plain["parameters"] > 0
    assert plain["evaluations"] == 2
    probed = json.loads(run("cost", *WITH, folder / "tiny.json", "--json", "--probe"))
    assert probed["probe"]["seconds"] > 0
    with pytest.raises(RecipeError, match="--with MODULE"):
        run("cost", folder / "tiny.json")


def test_experts_and_likelihoods_and_bricks_take_parts(trained: Path, tmp_path: Path) -> None:
    run("experts", *WITH, tmp_path / "e", trained, trained, "--thresholds", "1")
    run("sample", *WITH, tmp_path / "e", "--seeds", "0", "--out", tmp_path / "s")
    arguments = ["--noise-schedule", "linear", "--steps", "3", "--num", "2", "--device", "cpu"]
    images = trained.parent / "tiny.safetensors"
    assert "bits" in run("eval", "nll", *WITH, trained, images, *arguments)
    with pytest.raises(TesseraError, match=r"(?i)brick"):
        run("bricks", *WITH, trained, tmp_path / "b.png")


@pytest.mark.slow
def test_the_command_finds_modules_of_the_current_folder(folder: Path, tmp_path: Path) -> None:
    """As it is installed, where Python does not look there by itself; and under torchrun."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "parts.py").write_text("from own_parts import *\n")
    command = "import sys; sys.path.pop(0); from tessera.cli import main; main()"
    paths = [os.getcwd(), str(Path(__file__).parents[1])]
    arguments = ["train", "--with", "mine.parts", str(folder / "tiny.json"), "run.dir=run"]
    result = subprocess.run(
        [sys.executable, "-c", command, *arguments], cwd=tmp_path, text=True, check=False,
        capture_output=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "pipeline").is_dir()


@pytest.mark.slow
def test_two_processes(folder: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [os.getcwd(), str(Path(__file__).parents[1])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    arguments = ["train", *WITH, str(folder / "tiny.json"), "objective.kind=edm"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.run(
        [sys.executable, *launcher, "-m", "tessera", *arguments, f"run.dir={folder / 'two'}"],
        cwd=Path(__file__).parents[1], text=True, check=False, capture_output=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    run(*arguments, f"run.dir={folder / 'one'}")
    one, two = (load_file(folder / n / "pipeline" / "model.safetensors") for n in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


def test_relays_and_scores_take_parts(trained: Path, tmp_path: Path) -> None:
    images = trained.parent / "tiny.safetensors"
    for arguments in (["score", trained, images], ["features", trained, tmp_path / "f.npz"]):
        with pytest.raises(RecipeError, match="--with MODULE"):
            run("eval", *arguments, "--num", "4", "--device", "cpu")
    score = ["eval", "score", *WITH, trained, images]
    told = run(*score, "--features", "classifier", "--num", "8", "--training-images", "64",
               "--device", "cpu", "--json")  # fmt: skip
    assert json.loads(told[told.index("{") :])
    # Both are of the same size, so the parts were found, and it is said what is wrong.
    with pytest.raises(TesseraError, match="starts from noise"):
        run("relay", *WITH, trained, trained, tmp_path / "r")
    with pytest.raises(RecipeError, match="--with MODULE"):
        run("relay", trained, trained, tmp_path / "r")


# ---------------------------------------------------------------------------------------- mistakes


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("nowhere_at_all", None, r"no Python module nowhere_at_all, neither in .*nor among"),
        ("one.two", "", "no Python module one.two"),
        ("mine/parts.py", None, r"name of a Python module, as in `import`, like mine\.parts"),
        ("..mine", None, r"like mine"),
        ("empty", "x = 1", r"empty\.py has none of the functions network, objective, .*`parts`"),
        ("broken", "import nothing_like_that", r"raised ModuleNotFoundError: No module "
         r"named 'nothing_like_that' \(.*broken\.py:1\)"),
        ("wrong", "1 / 0", r"raised ZeroDivisionError: division by zero \(.*wrong\.py:1\)"),
        ("script", "import sys\nsys.exit(3)", "raised SystemExit: 3"),
        ("typo", "def network(:", r"raised SyntaxError: .*typo\.py"),
        ("listed", "dataset = [1, 2]", "'dataset' is a list"),
    ],
)  # fmt: skip
def test_mistakes_in_modules(here: Path, name: str, source: str | None, words: str) -> None:
    if source is not None:
        (here / f"{name.split('.')[0]}.py").write_text(source)
    try:
        with pytest.raises(TesseraError, match=words):
            import_parts(name)
    finally:
        sys.modules.pop(name.split(".")[0], None)


def test_modules_with_one_object_and_packages(here: Path) -> None:
    (here / "whole_parts.py").write_text(
        "import tessera\nnetwork = 3\n"
        "parts = tessera.Parts(sampler=lambda: None, refine=lambda: None)\n"
    )
    assert import_parts("whole_parts").names == ["sampler", "refine"]
    package = here / "kit_of_parts"
    package.mkdir()
    (package / "__init__.py").write_text("from . import dataset\ndef network(recipe): ...\n")
    (package / "dataset.py").write_text("")
    assert import_parts("kit_of_parts").names == ["network"]


def test_files_cause_no_import(here: Path, folder: Path) -> None:
    """Whatever a recipe calls its parts."""
    (here / "trap.py").write_text("raise SystemExit('imported')\n")
    recipe = json.loads((folder / "tiny.json").read_text())
    for section in ("network", "objective", "sampling"):
        recipe[section] |= {"name": "trap", "options": {"module": "trap", "parts": "trap.network"}}
    (here / "trap.json").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match="--with MODULE"):
        run("train", "trap.json", "run.dir=run")
    assert "trap" not in sys.modules
    assert not (here / "run").exists()


def test_mistakes_end_with_code_2(folder: Path, tmp_path: Path) -> None:
    for arguments in (["--with", "nowhere_at_all"], []):
        process = start("train", *arguments, str(folder / "tiny.json"), f"run.dir={tmp_path / 'r'}")
        _, errors = process.communicate()
        assert process.returncode == 2
        assert "--with" in errors
        assert "Traceback" not in errors

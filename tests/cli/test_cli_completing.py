"""What the shell offers after Tab, by the protocol that the printed scripts speak."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tessera.cli import app
from tessera.cli.completing import SHELLS, offer_changes
from tessera.errors import TesseraError
from tessera.recipes.keys import recipe_keys
from tessera.recipes.loading import load_recipe, shipped


def offered(line: str) -> dict[str, str]:
    """What is offered at the end of a line, with its meaning."""
    environment = {
        "COLUMNS": "9999",
        "_TESSERA_COMPLETE": "complete_fish",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_TYPER_COMPLETE_ARGS": line,
    }
    result = CliRunner(env=environment).invoke(app, [], prog_name="tessera")
    assert result.exit_code == 0, result.output
    lines = [text.partition("\t") for text in result.stdout.splitlines() if text]
    return {value: meaning for value, _, meaning in lines}


def test_commands_and_options() -> None:
    assert {"train", "sample", "data", "completion"} <= offered("tessera ").keys()
    assert offered("tessera da").keys() == {"data"}
    assert {"convert", "inspect"} <= offered("tessera data ").keys()
    assert offered("tessera train --re").keys() == {"--resume"}
    assert all(value.startswith("--") for value in offered("tessera data convert --"))
    assert "Train a model" in offered("tessera tra")["train"]
    assert set(offered("tessera completion ")) == set(SHELLS)


def test_recipes_and_what_lies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "photographs", ".hidden"):
        (tmp_path / folder / "cats").mkdir(parents=True)
    (tmp_path / "mine.yaml").touch()
    found = offered("tessera train ")
    assert found.keys() >= {*shipped(), "photos/", "photographs/", "mine.yaml"}
    assert ".hidden/" not in found
    assert found["photos-64"] == load_recipe("photos-64").description
    assert offered("tessera train photo").keys() == {
        "photos/", "photographs/", *(name for name in shipped() if name.startswith("photo")),
    }  # fmt: skip
    assert offered("tessera train photos/").keys() == {"photos/cats/"}
    assert set(offered("tessera recipes show cifar10-small-le")) == {"cifar10-small-lego"}
    assert "mine.yaml" in offered("tessera compare training.batch=8 mi")


def test_keys_come_section_by_section() -> None:
    sections = offered("tessera train cifar10-small ")
    assert {"training.", "network.", "name="} <= sections.keys()
    assert len(sections) < 30
    assert "network=" not in sections
    assert "training.batch=" in offered("tessera train cifar10-small training.ba")
    assert offered("tessera train cifar10-small ema.0.half").keys() == {"ema.0.halflife_images="}
    assert offered("tessera cost photos-64 data.xfl")["data.xflip="]
    assert "training.batch=" in offered("tessera compare a training.ba")
    assert "sampling.refine" in offered("tessera recipes keys samp")


def test_every_key_can_be_reached() -> None:
    """Down from the beginning, each step is offered by the one before."""
    places = {f"{e.path}.{k.name}".lstrip("."): k for e in recipe_keys() for k in e.keys}
    words, leaves, seen = [""], set[str](), 0
    while words:
        for offer, _ in offer_changes(words.pop()):
            seen += 1
            if offer.endswith("."):
                words.append(offer)
            elif offer.endswith("="):
                leaves.add(offer[:-1])
    assert seen < 1000
    sections = {key for key in places if any(p.startswith(f"{key}.") for p in places)}
    assert places.keys() - sections <= leaves


def test_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    start = "tessera train cifar10-small "
    kinds = {f"view.kind={kind}" for kind in ("full", "patches", "bands", "auto")}
    assert offered(start + "view.kind=").keys() == kinds
    assert offered(start + "view.kind=p").keys() == {"view.kind=patches"}
    assert offered(start + "data.xflip=").keys() == {"data.xflip=true", "data.xflip=false"}
    assert offered(start + "data.path=ph").keys() == {"data.path=photos/"}
    assert offered(start + "no.such=x") == {}
    sampling = "tessera sample runs/a "
    assert {"sampler=", "steps=", "solver="} <= offered(sampling).keys()
    assert {"sampler=edm", "sampler=ddim"} <= offered(sampling + "sampler=").keys()


def test_nothing_heavy_is_imported() -> None:
    script = (
        "import sys\nfrom tessera.cli.completing import offer_changes, offer_recipes\n"
        "import tessera.cli\nassert [*offer_changes('training.')] and [*offer_recipes('cifar')]\n"
        "sys.exit(bool({'torch', 'numpy', 'PIL'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts(shell: str) -> None:
    result = CliRunner().invoke(app, ["completion", shell])
    assert result.exit_code == 0
    assert "@ASK@" not in result.stdout
    assert "_TESSERA_COMPLETE=complete_fish" in result.stdout
    program = shutil.which(shell)
    if program is not None:
        subprocess.run([program, "-n"], input=result.stdout, text=True, check=True)


def test_an_unknown_shell() -> None:
    result = CliRunner().invoke(app, ["completion", "tcsh"])
    assert isinstance(result.exception, TesseraError)
    assert "SHELL: tcsh is not one of bash, zsh, fish" in str(result.exception)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_inserts_what_follows_the_last_end_of_a_word(tmp_path: Path) -> None:
    """Bash breaks words at =; a stand-in for the command says what it was asked."""
    command = tmp_path / "tessera"
    command.write_text(
        '#!/bin/sh\ncase "$_TYPER_COMPLETE_ARGS" in\n'
        "*view.kind=p) printf 'view.kind=patches\\t\\n' ;;\n"
        "*tr) printf 'training.\\ttext\\ntrain=\\t\\n' ;;\nesac\n"
    )
    command.chmod(0o755)
    script = CliRunner().invoke(app, ["completion", "bash"]).stdout + (
        "COMP_WORDBREAKS=$' \\t\\n\"='\n"
        'ask() { COMP_LINE="$1"; COMP_POINT=${#1}; COMP_WORDS=("$TESSERA"); _tessera_completion; '
        'echo "${COMPREPLY[*]}"; }\n'
        'ask "tessera train a view.kind=p"\nask "tessera train a tr"\nask "tessera x"\n'
    )
    result = subprocess.run(
        ["bash", "--norc"], input=script, env={"TESSERA": str(command)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.splitlines() == ["patches", "training. train=", ""]

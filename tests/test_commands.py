"""Commands that are advised can be typed as they stand."""

from __future__ import annotations

import json
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from tessera import commands
from tessera.commands import install_command, tessera_command
from tessera.errors import TesseraError, require_extra

ROOT = Path(__file__).parents[1]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virtual environment's scripts in the current folder, not on the path."""
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    for name in ("python", "pip", "tessera"):
        (scripts / name).write_text("#!/bin/sh\n")
        (scripts / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    return scripts


def test_the_script_beside_python_if_the_shell_does_not_find_it(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tessera_command() == ".venv/bin/tessera"
    (environment.parent / "other").mkdir()
    monkeypatch.chdir(environment.parent / "other")
    assert tessera_command() == str(environment / "tessera")


def test_its_name_if_the_shell_finds_it(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"/nowhere{os.pathsep}{environment}")
    assert tessera_command() == "tessera"
    assert install_command("log").startswith("pip install ")


def test_another_tessera_on_the_path_is_not_meant(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = environment.parent / "other"
    other.mkdir()
    (other / "tessera").write_text("#!/bin/sh\n")
    (other / "tessera").chmod(0o755)
    monkeypatch.setenv("PATH", str(other))
    assert tessera_command() == ".venv/bin/tessera"
    (environment / "tessera").unlink()
    assert tessera_command() == ".venv/bin/python -m tessera"


def test_names_with_blanks_are_quoted(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spaced = environment.parent / "my bin"
    environment.rename(spaced)
    monkeypatch.setattr(sys, "executable", str(spaced / "python"))
    assert tessera_command() == "'.venv/my bin/tessera'"


def test_extras_are_installed_from_the_checkout(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert install_command("log") == f".venv/bin/pip install -e '{ROOT}[log]'"
    (environment / "pip").unlink()
    monkeypatch.chdir(ROOT)
    assert install_command("log") == f"{environment}/python -m pip install -e '.[log]'"


def test_extras_of_an_installed_package(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "site-packages/tessera/commands.py"))
    source = tmp_path / "my source"
    source.mkdir()
    (source / "pyproject.toml").touch()
    record = json.dumps({"url": source.as_uri(), "dir_info": {}})
    installed = SimpleNamespace(read_text=lambda name: record)
    monkeypatch.setattr(metadata, "distribution", lambda name: installed)
    assert install_command("hub") == ".venv/bin/pip install 'my source[hub]'"
    (source / "pyproject.toml").unlink()
    advice = ".venv/bin/pip install '.[hub]' (in tessera's source folder)"
    assert install_command("hub") == advice
    record = ""  # from an index, which says no address
    assert install_command("hub") == advice


def test_missing_extras_are_advised_so(environment: Path) -> None:
    with pytest.raises(TesseraError, match="needs the package 'no_such_module'") as caught:
        require_extra("no_such_module.part", "log", "drawing")
    assert str(caught.value).endswith(install_command("log"))


def test_nothing_is_advised_that_is_on_no_index() -> None:
    files = [*ROOT.glob("tessera/**/*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]
    wrong = [str(f) for f in files if re.search(r"install[^\n]*tessera-diffusion", f.read_text())]
    assert wrong == []

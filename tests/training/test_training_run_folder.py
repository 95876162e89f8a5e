"""The folder of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tessera.recipes.loading import load_recipe
from tessera.training import run_folder


@pytest.mark.parametrize("said_in", ["recipe", "python"])
def test_home_folders(said_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("cifar10-small", ["run.dir=~/run"] if said_in == "recipe" else [])
    folder = run_folder.create(recipe, "~/run" if said_in == "python" else None)
    assert folder == tmp_path / "home" / "run"
    assert run_folder.read_recipe("~/run") == recipe
    assert [path.name for path in tmp_path.iterdir()] == ["home"]

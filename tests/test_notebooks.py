"""The notebooks run from top to bottom, are of jupytext's format, and use public names only."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import random_images, write_folder

import tessera
from tessera.errors import DataError
from tessera.recipes.schema import Recipe
from tessera.reports import making
from tessera.starting import cache
from tessera.training.forecast import Timings

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
TINY = [
    "network.model_channels=8", "network.num_blocks=1", "training.images=32", "training.batch=8",
    "sampling.steps=2", "run.tensorboard=false", "run.preview=null",
]  # fmt: skip


def cells(path: Path) -> list[tuple[str, str]]:
    """What stands after `# %%` of each cell, and what is in it."""
    parts = re.split(r"^# %%(.*)\n", path.read_text(), flags=re.M)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def shown(code: str, names: dict[str, Any]) -> Any:
    """Run a cell; what a notebook would show of it."""
    body = ast.parse(code).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    if last is None:
        return None
    value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    return value._repr_html_() if hasattr(value, "_repr_html_") else value


def quick(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A cache of its own, and nothing measured."""

    def measured(recipe: Recipe, device: Any) -> Timings:
        return Timings({(recipe.training.batch, None, None): 0.01}, 0.1, 0.0, 0.1, 10**6)

    def no_reference(*_: Any, **__: Any) -> None:
        raise DataError("too few")

    monkeypatch.setenv("TESSERA_CACHE", str(folder / "cache"))
    monkeypatch.setattr(cache, "_measured", measured)
    monkeypatch.setattr(cache, "build_reference", no_reference)
    monkeypatch.setattr(making, "_MOST", 20)
    monkeypatch.chdir(folder)


def test_photos_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch, tmp_path)
    images = [image.transpose(1, 2, 0) for image in random_images(24, size=10)]
    kinds = ("cat", "dog")
    write_folder(
        tmp_path / "photos", {f"{kinds[i % 2]}/{i}.png": image for i, image in enumerate(images)}
    )
    names: dict[str, Any] = {}
    results = []
    for head, code in cells(ROOT / "notebooks/photos.py"):
        if "[markdown]" in head:
            continue
        results.append(shown(code, names))
        if "parameters" in head:
            assert names["PHOTOS"] == "photos"
            names |= {"MINUTES": 5, "CHANGES": TINY, "SAMPLES": 6}
    text = "".join(result for result in results if isinstance(result, str))
    for words in ("24 in photos", "32 of 32", "pipeline of kind", "seed 5", "iframe srcdoc="):
        assert words in text
    assert results[-1] is True
    assert (tmp_path / "runs/photos-001/grid.png").is_file()
    strip = next(result for result in results if hasattr(result, "size"))
    assert strip.height > 4 * 8
    assert isinstance(names["again"], tessera.Pipeline)
    assert np.concatenate(names["estimates"]).dtype == np.uint8


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_only_public_names_are_used(path: Path) -> None:
    page = (ROOT / "docs/python.md").read_text()
    public = dict(re.findall(r"^\| `(tessera\.[\w.]+)` \| (.*) \|$", page, re.M))
    tree = ast.parse(path.read_text())
    used = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tessera"):
            listed = re.findall(r"`(\w+)`", public[str(node.module)])
            assert {alias.name for alias in node.names} <= set(listed)
            used += 1
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "tessera":
            assert node.attr in tessera.__all__
            used += 1
    assert used > 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_jupytext_makes_a_notebook_of_it(path: Path) -> None:
    assert sum("parameters" in head for head, _ in cells(path)) == 1
    jupytext = pytest.importorskip("jupytext")
    notebook = jupytext.read(path)
    kinds = ["markdown" if "markdown" in head else "code" for head, _ in cells(path)]
    assert [cell.cell_type for cell in notebook.cells] == kinds
    assert '"nbformat"' in jupytext.writes(notebook, fmt="ipynb")

"""A tiny recipe to compare, and a clock that goes by steps."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from training_case import tiny_recipe, write_recipe

from tessera.comparing import timed
from tessera.data.dataset import open_dataset
from tessera.metrics.reference import build_reference, save_reference


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.json, a recipe, its images, and their reference, real.npz."""
    folder = tmp_path_factory.mktemp("compare")
    recipe = tiny_recipe(folder)
    write_recipe(folder, recipe)
    data = open_dataset(folder / "tiny.safetensors")
    save_reference(folder / "real.npz", build_reference(data, training_images=60))
    return folder


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which every look takes a second, so that a step takes one."""
    clock = itertools.count()
    monkeypatch.setattr(timed, "perf_counter", lambda: float(next(clock)))

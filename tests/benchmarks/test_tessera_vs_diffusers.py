"""The claim beside diffusers' training example: the whole program, at a toy's size."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_case import tiny_recipe, write_recipe

from tessera.comparing import timed
from tessera.data.dataset import open_dataset
from tessera.metrics.reference import build_reference, save_reference

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from benchmarks import harness
from benchmarks.claims import common, diffusers_example, tessera_vs_diffusers
from benchmarks.claims.diffusers_example import Example, Sampler, nearest_width, parameters, unet


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks on which every look takes a second, so that a step takes one."""
    for module in (timed, diffusers_example):
        clock = itertools.count()
        monkeypatch.setattr(module, "perf_counter", lambda clock=clock: float(next(clock)))


def in_this_process(
    module: str, arms: Sequence[str], options: argparse.Namespace, folder: Path
) -> tuple[list[dict[str, Any]], int]:
    """Arms in turn, without processes of their own."""
    lines = io.StringIO()
    for arm in arms:
        with contextlib.redirect_stdout(lines):
            tessera_vs_diffusers.train(
                argparse.Namespace(**{**vars(options), "arm": arm, "folder": folder, "parallel": 0})
            )
    return [json.loads(line) for line in lines.getvalue().splitlines() if line[:1] == "{"], 1


@pytest.mark.usefixtures("seconds")
def test_the_whole_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, tiny_recipe(tmp_path))
    data = tmp_path / "tiny.safetensors"
    save_reference(tmp_path / "real.npz", build_reference(open_dataset(data), training_images=60))
    (tmp_path / "README.md").write_text(
        "# a\n<!-- begin tessera_vs_diffusers -->\nold\n<!-- end tessera_vs_diffusers -->\nafter\n"
    )
    monkeypatch.setattr(harness, "README", tmp_path / "README.md")
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(common, "run_arms", in_this_process)
    words = [
        "--data", str(data), "--recipe", str(recipe), "--reference", str(tmp_path / "real.npz"),
        "--minutes", "0.1", "--samples", "12", "--batch", "6", "--train-batch", "4",
        "--points", "0.5,1", "--samplers", "dpm-2,ddim-2", "--final", "ddpm-2",
        "--out", str(tmp_path), "--held-out", str(data),
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["tessera_vs_diffusers", *words])
    tessera_vs_diffusers.main()

    results = (tmp_path / "RESULTS.md").read_text()
    rows = [line.split(" | ") for line in results.splitlines() if line.startswith("| ")][2:]
    # Six steps of a second each: of 8 images here, of 4 there; the last point has one sampler more.
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("| tessera", "0.05", "24"), ("| tessera", "0.1", "48"),
        *[("| diffusers", "0.05", "12")] * 2, *[("| diffusers", "0.1", "24")] * 3,
        ("| held-out images", "–", "–"),
    ]  # fmt: skip
    distances = [float(row[5]) for row in rows]
    assert distances[-1] < min(distances[:-1])  # real images are the nearest
    readme = (tmp_path / "README.md").read_text()
    assert "old" not in readme
    assert readme.startswith("# a\n<!-- begin")
    assert readme.endswith("-->\nafter\n")
    best = min(row for row in rows if row[1] == "0.1" and "diffusers" in row[0])[5]
    nearest = min((row for row in rows if row[2] == "24" and "diff" in row[0]), key=lambda r: r[5])
    assert f"| 0.1 | {float(rows[1][5]):.2f} | {float(nearest[5]):.2f} | {nearest[3]} |" in readme
    for what in ("curves", "tessera", "diffusers"):
        assert (tmp_path / f"tessera_vs_diffusers-{what}.png").is_file()

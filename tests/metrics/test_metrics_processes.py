"""Scores of two processes are those of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forked import fork_ranks
from test_metrics_eval import write_images

from tessera.pipelines.loading import build_pipeline
from tessera.recipes.build import build_denoiser
from tessera.recipes.loading import load_recipe


def score(samples: Path, real: Path, processes: int, *options: str) -> dict[str, Any]:
    ranks = fork_ranks(
        processes, "eval", "score", samples, real, "--training-images", "256", "--batch", "4",
        "--device", "cpu", "--json", *options,
    )  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [0] * processes, outputs
    assert not any(out for out, _ in outputs[1:])
    document: dict[str, Any] = json.loads(outputs[0][0])
    return document


def test_two_processes_score_as_one(tmp_path: Path) -> None:
    samples = write_images(tmp_path / "samples", 13)
    real = write_images(tmp_path / "real", 20)
    what = ("--features", "classifier", "--metrics", "fd,pr")
    one, two = (score(samples, real, processes, *what) for processes in (1, 2))
    assert one["samples"] == two["samples"] == {"name": "samples", "n": 13}
    for a, b in zip(one["results"], two["results"], strict=True):
        assert a["values"] == pytest.approx(b["values"], rel=1e-4, abs=1e-6)


def test_two_processes_sample_a_pipeline_as_one(tmp_path: Path) -> None:
    overrides = [
        "data.resolution=8", "data.num_classes=2", "network.model_channels=8", "sampling.steps=2",
    ]  # fmt: skip
    recipe = load_recipe("quickstart-digits", overrides)
    build_pipeline(recipe, build_denoiser(recipe)).save(tmp_path / "pipe")
    real = write_images(tmp_path / "real", 20)
    one, two = (score(tmp_path / "pipe", real, count, "--images", "9") for count in (1, 2))
    assert one["n"] == two["n"] == 9
    assert one["recognised"] == two["recognised"]
    assert one["fd_classifier"] == pytest.approx(two["fd_classifier"], rel=1e-3)

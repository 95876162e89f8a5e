"""Scores of two processes are those of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_metrics_eval import write_images
from training_case import start


def score(samples: Path, real: Path, processes: int) -> dict[str, Any]:
    process = start(
        "eval", "score", str(samples), str(real), "--features", "classifier", "--metrics", "fd,pr",
        "--training-images", "256", "--batch", "4", "--json", processes=processes,
    )  # fmt: skip
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    document: dict[str, Any] = json.loads(out)
    return document


def test_two_processes_score_as_one(tmp_path: Path) -> None:
    samples = write_images(tmp_path / "samples", 13)
    real = write_images(tmp_path / "real", 20)
    one, two = (score(samples, real, processes) for processes in (1, 2))
    assert one["samples"] == two["samples"] == {"name": "samples", "n": 13}
    for a, b in zip(one["results"], two["results"], strict=True):
        assert a["values"] == pytest.approx(b["values"], rel=1e-3, abs=1e-6)

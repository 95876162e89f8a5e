"""Jobs of sampling: what they keep of a call, and what they draw again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipeline import tiny_pipeline
from torch import nn

from tessera.pipelines import base, usage
from tessera.pipelines.generate import Job, generate_folder
from tessera.sampling.seeds import SeedNoise


def test_a_long_job_keeps_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    clock = usage.time.perf_counter
    monkeypatch.setattr(usage.time, "perf_counter", lambda: asked.append(1) or clock())
    network = nn.Identity()
    watched = usage.Usage([network], on_gpu=False)
    with watched.watch():
        for _ in range(500):
            network(torch.zeros(3, 1, 2, 2))
            network(torch.zeros(2, 1, 4, 4))
    assert watched.evaluations == 500 * 5
    assert 0 < len(asked) <= 2 * 2 * 64
    assert watched.seconds_saved([network]) == pytest.approx(0)
    network(torch.zeros(1, 1, 2, 2))
    assert watched.evaluations == 500 * 5  # the hooks are gone


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The seeds of every noise source that a pipeline makes."""
    found: list[list[int]] = []

    def noise(seeds: Any, *where: Any) -> SeedNoise:
        found.append(list(seeds))
        return SeedNoise(seeds, *where)

    monkeypatch.setattr(base, "SeedNoise", noise)
    return found


def test_classes_that_are_known_are_not_drawn_again(tmp_path: Path, drawn: list[list[int]]) -> None:
    pipe = tiny_pipeline()
    expected = pipe.labels(range(8)).tolist()
    drawn.clear()

    def make(seeds: range) -> list[list[int]]:
        generate_folder(Job(pipe, seeds, None, 4, {}), tmp_path / "s")
        found = [*drawn]
        drawn.clear()
        return found

    def written() -> list[int]:
        labels = json.loads((tmp_path / "s" / "dataset.json").read_text())["labels"]
        return [label for _, label in labels]

    assert make(range(6)) == [[0, 1, 2], [3, 4, 5]]  # to make them, and for nothing else
    assert written() == expected[:6]
    assert make(range(8)) == [[6, 7]]
    assert written() == expected
    assert make(range(8)) == []
    # Only the classes that are not written are found by drawing, one by one.
    file = tmp_path / "s" / "dataset.json"
    data = json.loads(file.read_text())
    data["labels"] = data["labels"][:5]
    file.write_text(json.dumps(data))
    assert make(range(8)) == [[5], [6], [7]]
    assert written() == expected

"""Scores while training: logged, not counted as training time, and the best model kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_case import read_metrics, tiny_recipe

import tessera
from tessera.errors import RecipeError
from tessera.recipes.loading import dump_recipe, parse_recipe
from tessera.training import evaluation, run_folder
from tessera.training.trainer import Trainer

EVALUATE = {"metrics": ["fd", "pr"], "every_images": 32, "images": 12, "batch": 5}


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    build = evaluation.build_reference
    monkeypatch.setattr(
        evaluation, "build_reference", lambda data, **how: build(data, training_images=256, **how)
    )


def test_scores_are_logged_and_the_best_model_is_kept(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, evaluate=EVALUATE)
    Trainer(recipe, tmp_path / "run").run()
    lines = [x for x in read_metrics(tmp_path / "run") if "evaluate/fd" in x]
    assert [line["images"] for line in lines] == [32, 64, 96]
    assert all(0 <= line["evaluate/precision"] <= 1 for line in lines)
    best = min(lines, key=lambda line: line["evaluate/fd"])
    score = json.loads((tmp_path / "run" / "best" / "score.json").read_text())
    assert (score["images"], score["evaluate/fd"]) == (best["images"], best["evaluate/fd"])
    assert score["by"] == "evaluate/fd"
    pipe = tessera.load(tmp_path / "run" / "best")
    assert pipe.images_seen == best["images"]
    last = tessera.load(tmp_path / "run")
    if best["images"] == 96:
        assert np.array_equal(pipe.sample([1]), last.sample([1]))


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    runs = {}
    for name, section in (("with", EVALUATE), ("without", None)):
        trainer = Trainer(tiny_recipe(tmp_path, evaluate=section), tmp_path / name)
        trainer.run()
        runs[name] = trainer.learner.average(0)
    assert runs["with"].keys() == runs["without"].keys()
    assert all(torch.equal(runs["with"][key], runs["without"][key]) for key in runs["with"])


def test_a_later_better_score_replaces_the_best(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    folder.mkdir()
    made = evaluation.Evaluation(tiny_recipe(tmp_path, evaluate=EVALUATE), None, tmp_path, [])

    def best(name: str, before: float, now: float) -> bool:
        (folder / "score.json").write_text(json.dumps({"by": name, name: before}))
        return made._is_best(name, now)

    assert best("evaluate/fd", 2, 1)
    assert not best("evaluate/fd", 1, 2)
    assert best("evaluate/is", 1, 2)
    assert not best("evaluate/precision", 0.5, 0.4)
    assert made._is_best("evaluate/kid", 9)


def test_evaluation_may_change_when_a_run_is_resumed(tmp_path: Path) -> None:
    before = tiny_recipe(tmp_path)
    run_folder.check_same(before, tiny_recipe(tmp_path, evaluate=EVALUATE))
    assert "evaluate" in dump_recipe(before)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"metrics": ["fid"]}, "features=inception"),
        ({"metrics": ["kid"], "images": 100}, "1,000"),
        ({"metrics": ["speed"]}, "metrics"),
        ({"images": 1}, "images"),
    ],
)
def test_sections_that_cannot_be(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    data = dump_recipe(tiny_recipe(tmp_path))
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**data, "evaluate": section})

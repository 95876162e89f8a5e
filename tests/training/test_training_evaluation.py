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
from tessera.data.dataset import open_dataset
from tessera.errors import RecipeError, TesseraError
from tessera.metrics.images import ArrayImages
from tessera.metrics.reference import save_reference
from tessera.pipelines.diffusion import DiffusionPipeline
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


def test_models_that_start_from_pictures_get_those_of_the_training_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[int], Any]] = []
    plan = DiffusionPipeline.plan

    def noted(self: Any, seeds: Any, labels: Any = None, **options: Any) -> Any:
        asked.append((list(seeds), options.get("start_from")))
        return plan(self, seeds, labels, **options)

    monkeypatch.setattr(DiffusionPipeline, "plan", noted)
    section = EVALUATE | {"metrics": ["fd"], "every_images": 96, "images": 40}
    preview = {"every_images": 96, "rows": 1, "columns": 2}
    recipe = tiny_recipe(tmp_path, low_resolution=4, evaluate=section, run={"preview": preview})
    Trainer(recipe, tmp_path / "run").run()
    (line,) = (x for x in read_metrics(tmp_path / "run") if "evaluate/fd" in x)
    assert np.isfinite(line["evaluate/fd"])
    assert len(list((tmp_path / "run" / "previews").iterdir())) == 1
    images = open_dataset(str(recipe.data.path)).read(np.arange(30)).astype(float)
    small = images.reshape(30, 3, 4, 2, 4, 2).mean((3, 5)).transpose(0, 2, 3, 1)
    # The preview has the first two images, the scores as many as there are: seed 30 begins anew.
    (first, two), (seeds, all_of_them) = sorted(asked, key=lambda call: len(call[0]))
    assert (first, seeds) == ([0, 1], list(range(40)))
    assert two.shape == (2, 4, 4, 3)
    assert all_of_them.shape == (30, 4, 4, 3)
    assert abs(all_of_them - small).max() <= 0.5 + 1e-3
    assert np.array_equal(two, all_of_them[:2])
    best = tessera.load(tmp_path / "run" / "best", device="cpu")
    with pytest.raises(TesseraError, match="starts from pictures of shape"):
        best.sample([0])
    assert best.sample([0], start_from=two).shape == (1, 8, 8, 3)


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


def test_what_is_missing_is_said_before_the_training(tmp_path: Path) -> None:
    def first_step(**section: Any) -> str:
        run = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        with pytest.raises(TesseraError) as error:
            next(iter(Trainer(tiny_recipe(tmp_path, evaluate=EVALUATE | section), run).steps()))
        return str(error.value)

    weights, statistics = tmp_path / "weights.pth", tmp_path / "cifar.npz"
    inception = {"features": "inception", "metrics": ["fid"]}
    assert "there is no such file" in first_step(**inception, weights=str(weights))
    weights.touch()
    np.savez(statistics, mu=np.zeros(2048), sigma=np.eye(2048))
    known = {"weights": str(weights), "reference": str(statistics)}
    assert "sFID compares" in first_step(**inception | known | {"metrics": ["sfid"]})
    dino = {"features": "dinov2", "metrics": ["fd"]}
    assert "choose one" in first_step(**dino | known)
    assert "holds no in-domain classifier" in first_step(reference=str(statistics))


def test_statistics_of_other_images_are_not_taken_for_the_references(tmp_path: Path) -> None:
    """A resumed run may name another reference than the one that it began with."""
    random = np.random.default_rng(0)
    learner = Trainer(tiny_recipe(tmp_path), tmp_path / "run").learner
    found = []
    for name in ("a", "b"):
        images = random.integers(0, 255, (20, 8, 8, 3)).astype(np.uint8)
        np.savez(tmp_path / f"{name}.npz", images, np.arange(20) % 2)
        section = EVALUATE | {"metrics": ["fd"], "reference": str(tmp_path / f"{name}.npz")}
        recipe = tiny_recipe(tmp_path, evaluate=section)
        made = evaluation.Evaluation(recipe, None, tmp_path / "run", [])
        made.make(learner, 8)
        assert made._sides is not None
        found.append(made._sides[1].name)
    assert found == ["a.npz", "b.npz"]


def test_a_reference_file_stays_the_reference_where_features_are_measured(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (20, 3, 8, 8)).astype(np.uint8)
    reference = evaluation.build_reference(ArrayImages("other", images, np.arange(20) % 2))
    save_reference(tmp_path / "other.npz", reference)
    section = EVALUATE | {"reference": str(tmp_path / "other.npz")}
    made = evaluation.Evaluation(tiny_recipe(tmp_path, evaluate=section), None, tmp_path, [])
    assert made._recipe.evaluate is not None
    measured = made._open(made._recipe.evaluate, torch.device("cpu"))[1]
    assert measured.features is not None
    assert measured.moments is not None
    torch.testing.assert_close(measured.moments.mu, reference.statistics.mu)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"metrics": ["fid"]}, "features=inception"),
        ({"metrics": ["kid"], "images": 100}, "1,000"),
        ({"metrics": ["speed"]}, "metrics"),
        ({"weights": "inception.pth"}, "classifier has no file of weights"),
        ({"images": 1}, "images"),
    ],
)
def test_sections_that_cannot_be(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    data = dump_recipe(tiny_recipe(tmp_path))
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**data, "evaluate": section})

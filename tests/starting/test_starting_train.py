"""`tessera.train`: the command's code, from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import random_images, write_archive
from typer.testing import CliRunner

import tessera
from tessera.cli import app
from tessera.errors import RecipeError, TesseraError
from tessera.recipes.parts import Parts
from tessera.recipes.schema import Recipe
from tessera.reports import making
from tessera.starting import PlannedRun, cache, plan_training, train
from tessera.starting.trained import ReportPage, TrainedRun
from tessera.training.forecast import Timings
from tessera.training.probe import blank_images

SMALL = [
    "network.model_channels=8", "network.num_blocks=1", "training.images=16", "training.batch=8",
    "sampling.steps=2", "run.tensorboard=false", "run.preview=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = [i % 10 for i in range(20)]
    path = tmp_path_factory.mktemp("data") / "digits.zip"
    return write_archive(path, random_images(20, 1, 16), labels)


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and measurements that take no time."""
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_measured", _measured)
    monkeypatch.setattr(cache, "build_reference", _none)
    monkeypatch.setattr(making, "_MOST", 20)
    monkeypatch.chdir(tmp_path)


def _measured(recipe: Recipe, device: Any) -> Timings:
    return Timings({(recipe.training.batch, None, None): 0.01}, 0.1, 0.0, 0.1, 10**6)


def _none(*_: Any, **__: Any) -> None:
    raise tessera.errors.DataError("too few")


def files(folder: Path) -> set[str]:
    """What a run has left, without what names a time."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if "tfevents" not in name}


def test_a_recipe_leaves_the_same_run_as_the_command(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = [f"data.path={digits}", *SMALL]
    run = tessera.train("quickstart-digits", dir=Path("a"), overrides=changes)
    assert capsys.readouterr().out == "training in a\n"
    result = CliRunner().invoke(app, ["train", "quickstart-digits", *changes, "run.dir=b"])
    assert result.exit_code == 0, result.output
    assert files(Path("a")) == files(Path("b"))
    assert (run.run_dir, run.images_seen, run.stopped_by, run.report) == (Path("a"), 16, None, None)
    other = tessera.load("b")
    assert run.pipeline is run.pipeline
    assert run.pipeline.recipe == run.recipe.model_copy(update={"run": run.pipeline.recipe.run})
    np.testing.assert_array_equal(run.pipeline.sample([1, 2], 3), other.sample([1, 2], 3))


def test_a_recipe_object_and_a_run_that_goes_on(tmp_path: Path) -> None:
    changes = [*SMALL, "run.report=false", "data.num_classes=0"]
    recipe, blank = tessera.load_recipe("quickstart-digits", changes), Parts(dataset=blank_images)
    run = tessera.train(recipe, dir=tmp_path / "a", overrides=["training.images=8"], parts=blank)
    assert run.recipe.training.images == run.images_seen == 8
    assert run.pipeline.own_parts is blank
    more = tessera.train(
        resume=run.run_dir, overrides=["training.images=16"], minutes=5, parts=blank
    )
    assert (more.images_seen, more.run_dir) == (16, run.run_dir)
    assert more.recipe.training.minutes == 5
    assert recipe.training.images == 16  # it is not changed


def test_images_give_a_run_with_samples_and_a_report(
    digits: Path, tmp_path: Path, quick: None, capsys: Any
) -> None:
    run = tessera.train(digits, minutes=5, dir="run", overrides=SMALL)
    out = capsys.readouterr().out
    assert "converted 20 images" in out
    assert f"training in {run.run_dir}" in out
    assert run.report == run.run_dir / "report.html"
    assert run.samples == run.run_dir / "samples.png"
    page, shown = run.page(), run._repr_html_()
    assert isinstance(page, ReportPage)
    assert "&lt;!doctype html&gt;" in page._repr_html_()
    assert '<img src="data:image/png;base64,iVBOR' in shown
    assert "16 of 16" in shown


def test_a_plan_is_shown_and_trained_as_it_is(digits: Path, quick: None) -> None:
    plan = plan_training(digits, 5, [*SMALL, "run.report=false"])
    assert ("images", f"20 in {digits}, 16x16 pixels", "") in plan.rows()
    assert "16x16 pixels" in plan._repr_html_()
    run = tessera.train(plan)
    assert run.run_dir == Path("runs/digits-001")
    assert run.recipe.network == plan.plan.recipe.network
    assert run.report is run.page() is None


@pytest.mark.parametrize(
    ("source", "arguments", "words"),
    [
        (None, {}, "name images or a recipe"),
        ("quickstart-digits", {"resume": "runs/a"}, "leave out the source"),
        (None, {"resume": "runs/a", "dir": "runs/b"}, "leave out `dir`"),
        ("quickstart-digits", {"overrides": "training.batch=8"}, "give a list"),
        ("quickstart-digits", {"minutes": 0}, "more than 0"),
        ("quickstart-digits", {"minutes": 3, "overrides": ["training.minutes=2"]}, "one of them"),
        ("quickstart-digits", {"dir": "a", "overrides": ["run.dir=b"]}, "two run folders"),
        ("quickstart-digit", {}, "did you mean quickstart-digits"),
        (None, {"resume": "nowhere"}, "not the folder of a run"),
        ("images", {"parts": Parts(dataset=blank_images)}, "own parts belong to a recipe"),
        ("images", {"minutes": 3, "overrides": ["training.minutes=2"]}, "one of them"),
    ],
)
def test_what_says_two_things_is_refused(
    source: Any, arguments: dict[str, Any], words: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    with pytest.raises(TesseraError, match=words):
        tessera.train(source, **arguments)
    assert not Path("runs").exists()


def test_a_plan_has_its_minutes_already(digits: Path, quick: None) -> None:
    plan = plan_training(digits, 5, SMALL)
    assert isinstance(plan, PlannedRun)
    with pytest.raises(RecipeError, match="give them to plan_training"):
        tessera.train(plan, minutes=3)


def test_a_run_that_was_stopped_says_how_it_goes_on(tmp_path: Path) -> None:
    recipe = tessera.load_recipe("quickstart-digits")
    run = TrainedRun(tmp_path / "a", recipe, 8, stopped_by=2)
    assert f"tessera.train(resume=&#x27;{tmp_path / 'a'}&#x27;)" in run._repr_html_()
    with pytest.raises(TesseraError):
        _ = run.pipeline


def test_the_command_calls_the_same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def run_training(source: Any, **arguments: Any) -> TrainedRun:
        told.append((source, arguments["minutes"], arguments["overrides"]))
        return TrainedRun(Path("a"), tessera.load_recipe("quickstart-digits"), 8, stopped_by=2)

    monkeypatch.setattr(train, "run_training", run_training)
    result = CliRunner().invoke(app, ["train", "quickstart-digits", "a.b=c", "--minutes", "3"])
    assert result.exit_code == 130
    assert told == [("quickstart-digits", 3.0, ["a.b=c"])]

"""Recipes compared at equal time, and models by the same samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import write_packed
from forked import fork, server
from tiny_pipeline import tiny_pipeline
from typer.testing import CliRunner

import tessera
from tessera.cli import app
from tessera.cli.compare import arms_of
from tessera.comparing import report
from tessera.comparing.arms import Arm, CompareSettings, train_arm
from tessera.comparing.compare import Comparison, compare_arms
from tessera.data.dataset import open_dataset
from tessera.errors import TesseraError
from tessera.training.trainer import Trainer

SETTINGS = CompareSettings(minutes=0.1, points=2, samples=12, batch=6, sampling={"steps": 2})


def arms(place: Path) -> list[Arm]:
    recipe = str(place / "tiny.json")
    return [Arm("plain", recipe), Arm("half of it", recipe, ("network.model_channels=4",))]


def run(place: Path, out: Path, settings: CompareSettings = SETTINGS) -> Comparison:
    return compare_arms(arms(place), out, replace(settings, reference=str(place / "real.npz")))


@pytest.mark.usefixtures("seconds")
def test_recipes_train_for_the_same_time_and_are_scored_alike(place: Path, tmp_path: Path) -> None:
    made = run(place, tmp_path)
    plain, half = made.results
    # Six seconds, a step of 8 images each; a score after every three, which take no time.
    for result in made.results:
        assert [(p.minutes, p.images) for p in result.points] == [(0.05, 24), (0.1, 48)]
        assert (result.images, result.minutes) == (48, 0.1)
        assert result.distance == pytest.approx(result.points[-1].distance, rel=1e-4)
        assert result.evaluations == 3  # Heun's method in two steps
        assert result.first.shape == (6, 8, 8, 3)
        assert [images for images, _ in result.losses] == [8, 16, 32, 48]
    assert plain.parameters > 2 * half.parameters
    assert plain.gflops > 2 * half.gflops
    assert plain.distance != half.distance
    pipe = tessera.load(tmp_path / "plain" / "pipeline")
    assert (pipe.sample(range(6), "balanced", steps=2, batch=6) == plain.first).all()
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert [arm["images"] for arm in content["arms"]] == [48, 48]
    assert (tmp_path / "half_of_it.png").is_file()


@pytest.mark.usefixtures("seconds")
def test_an_interrupted_comparison_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = arms(place)[0]
    train_arm(first, tmp_path, replace(SETTINGS, reference=str(place / "real.npz")), None)
    (tmp_path / "half_of_it" / "run").mkdir(parents=True)
    begun = []
    init = Trainer.__init__

    def counted(self: Trainer, recipe: object, *args: object, **options: object) -> None:
        begun.append(recipe)
        init(self, recipe, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "__init__", counted)
    made = run(place, tmp_path)
    assert [recipe.network.model_channels for recipe in begun] == [4]  # type: ignore[attr-defined]
    assert [result.images for result in made.results] == [48, 48]
    with pytest.raises(TesseraError, match="made with other settings"):
        run(place, tmp_path, replace(SETTINGS, minutes=0.2))
    strange = tmp_path / "other" / "plain"
    strange.mkdir(parents=True)
    (strange / "photo.png").touch()
    with pytest.raises(TesseraError, match=r"holds photo\.png"):
        run(place, tmp_path / "other")
    assert (strange / "photo.png").exists()


def test_models_are_sampled_as_they_are(place: Path, tmp_path: Path) -> None:
    tiny_pipeline(num_classes=2).save(tmp_path / "a")
    tiny_pipeline(num_classes=2).save(tmp_path / "b")
    given = [Arm("a", str(tmp_path / "a")), Arm("b", str(tmp_path / "b"))]
    made = compare_arms(
        given, tmp_path / "out", replace(SETTINGS, reference=str(place / "real.npz"))
    )
    one, two = made.results
    assert (one.minutes, one.points, one.images) == (None, (), 5000)
    assert one.distance == two.distance
    assert (one.first == two.first).all()
    with pytest.raises(TesseraError, match="cannot change it any more"):
        compare_arms(
            [replace(given[0], changes=("training.batch=2",)), given[1]], tmp_path, SETTINGS
        )


def test_without_classes_there_are_no_distances(place: Path, tmp_path: Path) -> None:
    tiny_pipeline(num_classes=0).save(tmp_path / "a")
    tiny_pipeline(num_classes=0).save(tmp_path / "b")
    unlabelled = open_dataset(place / "tiny.safetensors").read(np.arange(8))
    write_packed(tmp_path / "plain.safetensors", unlabelled)
    given = [Arm(name, str(tmp_path / name)) for name in ("a", "b")]
    # What is named must be usable; the images of a recipe may not be.
    with pytest.raises(TesseraError):
        compare_arms(
            given,
            tmp_path / "out",
            replace(SETTINGS, reference=str(tmp_path / "plain.safetensors")),
        )
    recipe = str(place / "tiny.json")
    changes = (f"data.path={tmp_path / 'plain.safetensors'}", "data.num_classes=0")
    both = [Arm("c", recipe, (*changes, "training.batch=4")), Arm("d", recipe, changes)]
    made = compare_arms(both, tmp_path / "out", replace(SETTINGS, minutes=1e-4))
    assert [result.distance for result in made.results] == [None, None]
    assert made.note.startswith("There are no distances")
    page = report.comparison_page(made)
    assert "There are no distances" in page
    assert "Distance over time" not in page


def test_words_of_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shared, own = "data.path=x.zip", "view.kind=patches"
    found = arms_of([shared, "cifar10-small", own, str(folder), "./mine.yaml"])
    assert [arm.name for arm in found] == ["cifar10-small view.kind=patches", "run", "mine"]
    assert [arm.changes for arm in found] == [(shared, own), (), (shared,)]
    assert found[0].folder == "cifar10-small_view.kind_patches"
    for words in (["cifar10-small"], [shared], [shared, "a", own]):
        with pytest.raises(TesseraError, match="at least two"):
            arms_of(words)
    with pytest.raises(TesseraError, match="are the same"):
        compare_arms([Arm("a b", "x"), Arm("a_b", "y")], tmp_path, SETTINGS)


@pytest.mark.usefixtures("seconds")
def test_on_the_command_line(place: Path, tmp_path: Path) -> None:
    words = [str(place / "tiny.json"), str(place / "tiny.json"), "ema.0.halflife_images=5"]
    options = ["--minutes", "0.05", "--points", "1", "--samples", "4", "--sample", "steps=2"]
    options += ["--reference", str(place / "real.npz"), "--out", str(tmp_path / "out")]
    ran = CliRunner().invoke(app, ["compare", *words, *options], env={"COLUMNS": "120"})
    assert ran.exit_code == 0, ran.output
    assert "tiny ema.0.halflife_images=5" in ran.output
    assert "4 samples of the same seeds" in ran.output
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.count("<img") == 8
    assert "Distance over time" in page
    again = CliRunner().invoke(app, ["compare", *words, *options, "--json"])
    assert [arm["images"] for arm in json.loads(again.stdout)["arms"]] == [24, 24]


@pytest.mark.slow
def test_arms_at_once(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    server()  # before the only way to start it is taken away

    def start(command: list[str], env: dict[str, str]) -> Any:
        assert command[1:3] == ["-m", "tessera.comparing.arm"]
        started.append(fork(command[3:], code=CODE, env=env))
        return started[-1]

    monkeypatch.setattr("tessera.comparing.compare.subprocess.Popen", start)
    reference = str(place / "real.npz")
    settings = replace(SETTINGS, minutes=1e-4, points=1, samples=4, reference=reference)
    made = compare_arms(arms(place), tmp_path, settings, parallel=True)
    assert len(started) == 2
    assert [result.images for result in made.results] == [8, 8]
    assert all(result.points for result in made.results)
    assert not (tmp_path / ".arms.json").exists()


CODE = "import runpy; runpy.run_module('tessera.comparing.arm', run_name='__main__')"

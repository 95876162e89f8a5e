"""The controls of a model, and the samples that are made with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import Field
from tiny_pipeline import tiny_pipeline
from tiny_recipes import small_copy

from tessera.errors import TesseraError
from tessera.pipelines.loading import build_pipeline
from tessera.pipelines.options import Option
from tessera.recipes.loading import load_recipe
from tessera.recipes.schema import Usual
from tessera.studio.bench import Bench, Making, Request, saved_pngs
from tessera.studio.folder import StudioFolder
from tessera.studio.knobs import Knob, given_options, knob, knobs


def of(annotation: Any, value: Any) -> Knob | None:
    return knob(Option("s", "x", value, "", annotation))


@pytest.mark.parametrize(
    ("annotation", "value", "kind"),
    [
        (bool, True, "switch"),
        (Literal["a", "b"], "a", "choice"),
        (Literal["a", "b"] | None, None, "choice"),
        (int, 3, "number"),
        (float, 0.5, "number"),
        (Annotated[float, Field(ge=0, le=1)], 0.5, "slider"),
        (Annotated[float, Field(ge=0), Usual(0, 8)], 0.5, "slider"),
        (Annotated[int, Field(gt=0, le=100_000)], 18, "number"),
        (float, math.inf, "text"),
        (int | None, None, "text"),
        (tuple[int, int] | None, None, "text"),
        (str, "", "text"),
    ],
)
def test_a_control_is_by_type_and_bounds(annotation: Any, value: Any, kind: str) -> None:
    made = of(annotation, value)
    assert made is not None
    assert made.kind == kind


def test_sliders_hold_what_the_model_does_by_itself() -> None:
    made = of(Annotated[int, Field(gt=0, le=100_000), Usual(1, 100)], 256)
    assert made is not None
    assert (made.low, made.high, made.step, made.first) == (1, 256, 1, True)
    made = of(Annotated[float, Field(ge=0, le=1), Usual(0, 8)], 0.0)
    assert made is not None
    assert (made.low, made.high, made.step) == (0, 1, pytest.approx(0.01))


@pytest.mark.parametrize(
    ("recipe", "first", "all_of"),
    [
        ("cifar10-small", ["steps", "s_churn", "guidance", "size"], ["solver", "rho", "layout"]),
        ("cifar10-small-lego", ["steps", "guidance", "skip", "size"], ["bricks"]),
        ("cifar10-small-mar", ["num_iter", "temperature", "guidance"], ["guidance_schedule"]),
        ("cifar10-small-pdm", ["steps", "guidance"], ["sampler"]),
    ],
)
def test_every_method_has_controls_of_its_own_options(
    recipe: str, first: list[str], all_of: list[str]
) -> None:
    pipe = build_pipeline(load_recipe(recipe, small_copy(recipe)))
    made = {one.name: one for one in knobs(pipe.options())}
    assert all(made[name].first for name in first)
    assert all(not made[name].first for name in all_of)
    values = [one.value for one in made.values()]
    assert given_options(made.values(), values, "") == {}
    assert pipe.plan([0], None, **given_options(made.values(), values, "")) is not None


def test_what_is_left_alone_is_not_said() -> None:
    pipe = build_pipeline(load_recipe("cifar10-small-lego", small_copy("cifar10-small-lego")))
    made = knobs(pipe.options())
    names = [one.name for one in made]
    values = [one.value for one in made]
    values[names.index("skip")] = 0.4
    values[names.index("steps")] = 4.0  # as a browser sends it
    values[names.index("size")] = " 16x16 "
    given = given_options(made, values, "rho=none levels.kind=edm")
    assert given == {
        "skip": 0.4, "steps": 4, "size": "16x16", "rho": None, "levels.kind": "edm",
    }  # fmt: skip
    assert type(given["steps"]) is int
    values[names.index("skip")] = None
    with pytest.raises(TesseraError, match="`skip`: give a number"):
        given_options(made, values, "")
    with pytest.raises(TesseraError, match="not of the form"):
        given_options(made, [one.value for one in made], "skip")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("runs")
    tiny_pipeline().save(root / "tiny")
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text("{}")
    (root / "broken" / "model.safetensors").write_bytes(b"x")
    made = Bench(StudioFolder(root), "cpu")
    yield made
    made.close()


def last(bench: Bench, request: Request) -> Making:
    *_, made = bench.make(request)
    return made


def test_samples_are_those_of_the_library(bench: Bench) -> None:
    moments = [*bench.make(Request("tiny", "0-2,17", "bee", {"steps": "4", "guidance": 1.5}))]
    shares = [moment.share for moment in moments]
    assert shares == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [len(moment.frames) for moment in moments] == [1, 2, 3, 4, 4]
    made = moments[-1]
    expected = tiny_pipeline().sample([0, 1, 2, 17], "bee", steps=4, guidance=1.5)
    assert made.images is not None
    np.testing.assert_array_equal(made.images, expected)
    assert (made.seeds, made.labels) == ((0, 1, 2, 17), ("bee",) * 4)
    assert made.frames[0].noisy.shape == (4, 8, 8, 3)
    assert "4 in" in made.facts["made"]
    assert torch.is_grad_enabled()


def test_classes(bench: Bench) -> None:
    assert last(bench, Request("tiny", "0-5", "balanced")).labels == ("ant", "bee", "cat") * 2
    assert last(bench, Request("tiny", "3", "none")).labels == ("no class",)
    assert last(bench, Request("tiny", "3", 2)).labels == ("cat",)
    drawn = last(bench, Request("tiny", "0-3")).labels
    assert drawn == tuple(("ant", "bee", "cat")[i] for i in tiny_pipeline().labels(range(4)))


def test_many_samples_are_made_in_batches(bench: Bench) -> None:
    shares = [moment.share for moment in bench.make(Request("tiny", "0-19", "ant"))]
    assert shares == sorted(shares)
    assert len(shares) == 3 + 3 + 1


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("tiny", ""), "seeds"),
        (Request("tiny", "0-64"), "65 images"),
        (Request("tiny", "x"), "seeds"),
        (Request("tiny", "0", "dog"), "no class 'dog'"),
        (Request("tiny", "0", "random", {"steps": 0}), "steps=0"),
        (Request("tiny", "0", "random", {"skip": 0.5}), "made of bricks"),
        (Request("none", "0"), "no run or pipeline"),
        (Request("../x", "0"), "is not in"),
        (Request("broken", "0"), "config.json"),
    ],
)
def test_errors_of_samples_speak(bench: Bench, request_: Request, words: str) -> None:
    with pytest.raises(TesseraError, match=words):
        last(bench, request_)
    assert last(bench, Request("tiny", "0")).images is not None  # and it goes on


def test_samples_can_be_left_early(bench: Bench) -> None:
    making = bench.make(Request("tiny", "0", "random", {"steps": 1000}))
    next(making)
    making.close()  # type: ignore[attr-defined]
    assert last(bench, Request("tiny", "0")).share == 1.0  # by the same thread


def test_a_pipeline_that_was_written_anew_is_loaded_anew(tmp_path: Path) -> None:
    tiny_pipeline().save(tmp_path / "a")
    bench = Bench(StudioFolder(tmp_path), "cpu")
    first, _ = bench.about("a")
    assert bench.about("a")[0] is first
    assert bench.about("a", "ddim")[1] != bench.about("a")[1]
    tiny_pipeline(num_classes=0).save(tmp_path / "a")
    assert bench.about("a")[0].model.num_classes == 0
    bench.close()


def test_files_are_named_by_their_seeds(bench: Bench, tmp_path: Path) -> None:
    made = last(bench, Request("tiny", "0,17"))
    paths = saved_pngs(made, tmp_path / "x")
    assert [path.name for path in paths] == ["000000.png", "000017.png"]
    assert made.images is not None
    with Image.open(paths[1]) as image:
        np.testing.assert_array_equal(np.asarray(image), made.images[1])

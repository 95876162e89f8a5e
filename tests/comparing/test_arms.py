"""Arms of stages, ways of sampling, budgets of FLOPs, several trainings, rows of equal cost."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev

import pytest
from tiny_pipeline import tiny_pipeline

import tessera
from tessera.comparing import report
from tessera.comparing.arms import Arm, CompareSettings, Stage, Way
from tessera.comparing.compare import compare_arms
from tessera.errors import TesseraError
from tessera.pipelines.loading import estimate
from tessera.recipes.loading import load_recipe

SETTINGS = CompareSettings(minutes=0.1, points=1, samples=4, batch=4, sampling={"steps": 2})

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("seconds")]


def settings(place: Path, **changes: object) -> CompareSettings:
    return replace(SETTINGS, reference=str(place / "real.npz"), **changes)  # type: ignore[arg-type]


def test_stages_share_the_time_and_become_one(place: Path, tmp_path: Path) -> None:
    recipe, split = str(place / "tiny.json"), "snr_splits=[0.25]"
    small = ("data.resolution=4", "data.shrink=2")
    blur = ("objective={kind: blur, block: 2}", "sampling={kind: relay, steps: 2}")
    pair = (Stage(recipe, (split, "expert=0"), 0.5), Stage(recipe, (split, "expert=1"), 0.5, 0))
    relay = (Stage(recipe, small, 1 / 3), Stage(recipe, blur, 2 / 3))
    arms = [
        Arm("pair", stages=pair, join="experts"),
        Arm("relay", stages=relay, join="relay", ways=(Way("", {"first.steps": 2}),)),
    ]
    made = compare_arms(arms, tmp_path, settings(place, sampling={}, points=2))
    one, two = made.results
    # Six steps of a second: three and three, two and four; models of one stage alone have no score.
    assert [(p.images, p.minutes) for p in one.points] == [(48, 0.1)]
    assert [(p.images, p.minutes) for p in two.points] == [(24, 0.05), (48, 0.1)]
    pipe = tessera.load(tmp_path / "pair" / "pipeline")
    assert (pipe.kind, pipe.recipe.snr_splits) == ("experts", (0.25,))
    assert tessera.load(tmp_path / "relay" / "pipeline").kind == "relay"
    # The noisy expert began with what the clean one was in the end.
    assert (tmp_path / "pair" / "stage-0" / "model.safetensors").is_file()
    began = load_recipe(tmp_path / "pair" / "run-1" / "recipe.yaml").training.initial_weights
    assert began == str(tmp_path / "pair" / "stage-0")
    assert Arm.from_dict(json.loads(json.dumps(asdict(arms[1])))) == arms[1]
    late = replace(arms[0], stages=(pair[0], replace(pair[1], begins_as=1)))
    with pytest.raises(TesseraError, match="stage 1 cannot begin as stage 1"):
        compare_arms([late], tmp_path, SETTINGS)
    with pytest.raises(TesseraError, match="joined as one of relay, experts"):
        compare_arms([replace(arms[0], join="sum")], tmp_path, SETTINGS)


def test_experts_that_branch_late(place: Path, tmp_path: Path) -> None:
    """One model first, with whose weights both experts begin; it is no part of the pair itself."""
    recipe, split = str(place / "tiny.json"), "snr_splits=[0.25]"
    stages = (
        Stage(recipe, share=0.5, joined=False),
        Stage(recipe, (split, "expert=0"), 1 / 3, begins_as=0),
        Stage(recipe, (split, "expert=1"), 1 / 6, begins_as=0),
    )
    made = compare_arms(
        [Arm("pair", stages=stages, join="experts")], tmp_path, settings(place, sampling={})
    )
    # Six steps of a second, of 8 images each.
    assert (made.results[0].images, made.results[0].minutes) == (48, 0.1)
    assert [p.images for p in made.results[0].points] == [48]
    pipe = tessera.load(tmp_path / "pair" / "pipeline")
    assert [part.images_seen for part in pipe.pipes] == [16, 8]
    for run in ("run-1", "run-2"):
        began = load_recipe(tmp_path / "pair" / run / "recipe.yaml").training.initial_weights
        assert began == str(tmp_path / "pair" / "stage-0")


def test_equal_flops(place: Path, tmp_path: Path) -> None:
    recipe = str(place / "tiny.json")
    arms = [Arm("plain", recipe), Arm("half", recipe, ("network.model_channels=4",))]
    per_image = [estimate(load_recipe(arm.source, arm.changes)).train_flops for arm in arms]
    made = compare_arms(arms, tmp_path, settings(place, flops=16.0 * per_image[0]))
    # Whole steps of 8 images, until the FLOPs are spent.
    wanted = [-(-16 * per_image[0] // (8 * each)) * 8 for each in per_image]
    assert [result.images for result in made.results] == wanted
    assert wanted[1] > 2 * wanted[0] == 32
    assert [r.flops for r in made.results] == [
        n * each for n, each in zip(wanted, per_image, strict=True)
    ]
    assert made.results[0].minutes == pytest.approx(2 / 60)
    assert "TFLOP of training each" in report.in_sentences(made)
    with pytest.raises(TesseraError, match="some FLOPs"):
        compare_arms(arms, tmp_path / "none", settings(place, flops=0.0))


def test_several_trainings_are_means_with_a_spread(place: Path, tmp_path: Path) -> None:
    arms = [Arm("a", str(place / "tiny.json"))]
    first = compare_arms(arms, tmp_path, settings(place, minutes=0.02))
    made = compare_arms(arms, tmp_path, settings(place, minutes=0.02, trainings=2))
    assert [result.seed for result in made.results] == [0, 1]
    assert made.results[0].distance == first.results[0].distance  # which was not trained again
    distances = [result.distance for result in made.results]
    assert None not in distances
    assert distances[0] != distances[1]
    (row,) = report.table_rows(made)
    assert row[7] == f"{mean(distances):.3f} ± {stdev(distances):.3f}"
    assert "Means over 2 trainings" in report.in_sentences(made)
    assert [" ± " in line[3] for line in report.point_rows(made)] == [True]
    assert row[7] not in report.table_rows(first)[0]


def test_rows_of_ways_and_of_equal_cost(place: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny_pipeline(num_classes=2).save(tmp_path / name)
    arms = [
        Arm("a", str(tmp_path / "a"), ways=(Way("", {"steps": 3}), Way("guided", {"guidance": 2}))),
        Arm("b", str(tmp_path / "b"), ways=(Way("", {"guidance": 2}),)),
    ]
    made = compare_arms(arms, tmp_path / "out", settings(place, equal_cost=True))
    # Guidance takes two evaluations: of 2 steps it costs 6 against the 5 of three without.
    assert [(result.name, result.evaluations) for result in made.results] == [
        ("a", 5), ("a, guided", 6), ("b", 6),
    ]  # fmt: skip
    arms[0] = Arm("a", arms[0].source, ways=(Way("", {"steps": 6}),))
    made = compare_arms(arms, tmp_path / "other", settings(place, equal_cost=True))
    assert [(result.name, result.evaluations) for result in made.results] == [
        ("a", 11), ("b", 6), ("b, 3 steps for the same cost", 10),
    ]  # fmt: skip
    assert (tmp_path / "other" / "b__3_steps_for_the_same_cost.png").is_file()
    with pytest.raises(TesseraError, match="are the same"):
        compare_arms([replace(arms[0], ways=(Way("x"), Way("x")))], tmp_path, SETTINGS)

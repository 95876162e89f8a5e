"""What is chosen for images, a machine and a time, with speeds that the tests say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.errors import RecipeError
from tessera.recipes.build import build_view
from tessera.recipes.loading import dump_recipe, parse_recipe
from tessera.recipes.schema import Recipe
from tessera.starting.choice import Machine, TrainingPlan, _length, choose
from tessera.starting.facts import ImageFacts
from tessera.training.forecast import Timings

LAPTOP = Machine("a laptop", "cpu", ("fp32", "why"), 8 * 2**30)
FLOWERS = (("daisy", 600), ("rose", 600))


def facts(side: int = 200, count: int = 1200, **changes: object) -> ImageFacts:
    return ImageFacts(Path("my photos"), "00", (((side, side + 40), count),), **changes)


def machine_of(speed: float, memory: int = 2**28):
    """A machine that trains `speed` images of 32x32 pixels a second with a small network."""

    def measure(recipe: Recipe) -> Timings:
        name = recipe.network.kind, recipe.network.model_channels
        small = {("song_unet", 32): 1, ("patched_unet", 32): 1, ("patched_unet", 64): 3}
        factor, size = small.get(name, 100), 1
        plans = [plan for plan, _ in build_view(recipe).shares()]
        steps = {plan.kind: plan.images * factor * size / speed for plan in plans}
        return Timings(steps, 0.1, 0.0, 0.1, memory)

    return measure


def plan(speed: float = 60, minutes: float = 10, *overrides: str, **about: object) -> TrainingPlan:
    return choose(facts(**about), LAPTOP, minutes, machine_of(speed), overrides)


@pytest.mark.parametrize(
    ("speed", "minutes", "side", "resolution"),
    [
        (60, 10, 200, 32),
        (200, 10, 200, 32),  # an image of 64x64 pixels takes three times as long, and twice as many
        (400, 10, 200, 64),
        (400, 10, 40, 32),
        (60, 10, 20, 16),
        (60, 10, 5, 8),
        (0.5, 10, 200, 32),
        (30_000, 60, 200, 128),
        (30_000, 60, 70, 64),
    ],
)
def test_the_resolution_is_what_images_and_time_allow(
    speed: float, minutes: float, side: int, resolution: int
) -> None:
    assert plan(speed, minutes, side=side).recipe.data.resolution == resolution


def test_long_trainings_on_a_fast_machine_are_on_patches() -> None:
    assert plan(30_000, 20).recipe.view.kind == "full"
    chosen = plan(30_000, 600)
    assert chosen.recipe.view.kind == "patches"
    assert {c.name: c.value for c in chosen.choices}["view"] == "patches"


def test_the_length_is_the_next_of_a_few_and_the_minutes_end_it() -> None:
    chosen = plan(60, 10)  # 36,000 images
    assert (chosen.expected, chosen.recipe.training.images) == (36_000, 50_000)
    assert chosen.recipe.training.minutes == 10
    rows = {c.name: (c.value, c.why) for c in chosen.choices}
    assert rows["images"] == (
        "50,000 at most",
        "about 36,000 in 10 minutes of steps, each image 30 times",
    )
    short = plan(60, 10, "training.images=64")
    assert (short.expected, short.recipe.training.images) == (64, 64)


@settings(max_examples=50, deadline=None)
@given(images=st.integers(1, 10**9))
def test_lengths_are_never_too_short_and_hardly_too_long(images: int) -> None:
    assert images <= _length(images) <= max(5 / 3 * images, images + 1)


def test_measurements_that_scatter_mostly_give_the_same_recipe() -> None:
    speeds = [40 * 1.07**step for step in range(40)]
    differing = [
        speed
        for speed in speeds
        if len({plan(speed * jitter, 10).recipe.model_dump_json() for jitter in (0.97, 1, 1.03)})
        > 1
    ]
    assert len(differing) <= len(speeds) // 4


def test_few_steps_are_of_smaller_batches() -> None:
    assert plan(60, 10).recipe.training.batch == 16  # 2,250 steps
    few = plan(40, 10)
    assert few.recipe.training.batch == 8
    assert next(c.why for c in few.choices if c.name == "batch") == "3,000 steps in the time"
    assert plan(40, 10, "training.batch=16").recipe.training.batch == 16
    assert plan(40, 10, "training.images=640").recipe.training.batch == 16
    assert plan(1, 10, count=5).recipe.training.batch == 5


def test_other_programs_change_nothing_that_is_chosen() -> None:
    quiet, measure = plan(60, 10), machine_of(60)

    def disturbed(recipe: Recipe) -> Timings:
        found = measure(recipe)
        steps = {kind: 4 * seconds for kind, seconds in found.steps.items()}
        return replace(found, steps=steps, others=0.75, alone=0.25)

    chosen = choose(facts(), LAPTOP, 10, disturbed)
    assert chosen.recipe == quiet.recipe
    assert chosen.timings.validation == 4 * quiet.timings.validation


def test_held_out_images_take_time_and_all_take_memory() -> None:
    timings = plan(60, 10).timings
    assert timings.validation == pytest.approx(60 / 60 / 3)  # 5% of 1,200, a third of a step
    assert timings.memory_bytes == 2**28 + 1200 * 3 * 32**2
    gpu = choose(facts(), replace(LAPTOP, kind="cuda"), 10, machine_of(60))
    assert gpu.timings.memory_bytes == 2**28


def test_channels_classes_and_held_out_images() -> None:
    data = plan(classes=FLOWERS).recipe.data
    assert (data.channels, data.num_classes, data.xflip, data.held_out) == (3, 2, True, 0.05)
    assert plan(classes=FLOWERS).recipe.objective.label_dropout == 0.1
    grey = plan(grey=1200, count=1200).recipe.data
    assert (grey.channels, grey.xflip) == (1, False)
    assert plan(grey=3).recipe.data.channels == 3
    assert plan(count=100).recipe.data.held_out is None
    few = plan(classes=(("daisy", 600), ("rose", 3)))
    assert few.recipe.data.num_classes == 0
    assert "under 8 images" in {c.name: c.why for c in few.choices}["classes"]


def test_overrides_win_and_are_told_as_such() -> None:
    chosen = plan(60, 10, "data.resolution=32", "training.batch=8", "data.xflip=false")
    recipe = chosen.recipe
    assert (recipe.data.resolution, recipe.training.batch, recipe.data.xflip) == (32, 8, False)
    why = {c.name: c.why for c in chosen.choices}
    assert why["resolution"] == why["batch"] == why["mirrored copies"] == "as you say"
    assert why["channels"] != "as you say"
    assert plan(60, 10, "training.minutes=3").minutes == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.path=x.zip", "leave it out"),
        ("codec.kind=vae", "tessera data latents"),
        ("data.resolution=37", "multiple of"),
        ("data.resolution=big", "side of the images"),
        ("training.batc=3", "did you mean training.batch"),
    ],
)
def test_overrides_that_do_not_fit(override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        plan(60, 10, override)


def test_what_does_not_fit_the_memory_is_not_chosen() -> None:
    small = Machine("a small one", "cpu", ("fp32", "why"), 2**28)
    assert choose(facts(), small, 10, machine_of(30_000)).recipe.data.resolution == 32


def test_a_time_is_proposed_and_can_be_answered() -> None:
    asked = []

    def answer(minutes: float) -> float:
        asked.append(minutes)
        return 7

    measure = machine_of(60)
    assert choose(facts(), LAPTOP, None, measure).minutes in (5, 10, 15, 20, 30, 45, 60)
    assert choose(facts(), LAPTOP, None, measure, ask=answer).minutes == 7
    assert asked == [choose(facts(), LAPTOP, None, measure).minutes]
    assert choose(facts(), LAPTOP, None, machine_of(0.01)).minutes == 60


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.dictionaries(
        st.tuples(st.integers(1, 5000), st.integers(1, 5000)), st.integers(1, 10**6), min_size=1
    ),
    grey=st.booleans(),
    classes=st.lists(st.integers(0, 10**5), max_size=30),
    minutes=st.floats(0.01, 10**4),
    speed=st.floats(0.01, 10**6),
)
def test_any_facts_give_a_recipe_that_can_be_read(
    sizes: dict[tuple[int, int], int],
    grey: bool,
    classes: list[int],
    minutes: float,
    speed: float,
) -> None:
    about = ImageFacts(
        Path("Ünicode (1).zip"),
        "00",
        tuple(sorted(sizes.items())),
        sum(sizes.values()) if grey else 0,
        tuple((str(index), count) for index, count in enumerate(classes)),
    )
    first, second = (choose(about, LAPTOP, minutes, machine_of(speed)) for _ in range(2))
    assert first == second
    assert parse_recipe(dump_recipe(first.recipe)) == first.recipe
    assert first.recipe.training.batch <= max(about.count, 1)
    assert first.classifier_images >= 4_000


@pytest.mark.parametrize("view", ["view.kind=patches", "view=patches"])
def test_parts_of_images_have_no_linear_start(view: str) -> None:
    with pytest.raises(RecipeError, match="converted already"):
        plan(60, 10, "view=auto")
    whole, parts = plan().recipe, plan(60, 10, view).recipe
    told = [next(c for c in p.choices if c.name == "start") for p in (plan(), plan(60, 10, view))]
    assert [choice.value for choice in told] == ["linear", "none"]
    assert whole.preconditioning.kind == "linear"
    assert parts.preconditioning.kind == "edm"
    assert parts.network == whole.network
    assert parts.view.kind == view.split("=")[1]

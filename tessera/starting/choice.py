"""What is trained on a collection of images, given this machine and a time: a plan with reasons."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from tessera.errors import RecipeError, TesseraError
from tessera.recipes.build import build_view
from tessera.recipes.loading import dump_recipe, parse_recipe
from tessera.recipes.overrides import apply_overrides, merge
from tessera.recipes.photos import photos_64, photos_128, photos_small, small_step
from tessera.recipes.schema import FullViewConfig, Recipe
from tessera.recipes.text import read_yaml
from tessera.starting.facts import ImageFacts
from tessera.training.forecast import Timings

Measure = Callable[[Recipe], Timings]
"""How long the parts of a run of a recipe take here."""

RESOLUTIONS = (8, 16, 32, 64, 128)
_LARGE = 0.9  # share of the images that must not be enlarged
_FEW, _CLASSES = 8, 1000  # images a class, and classes, that can be learnt
_HELD_OUT, _FROM = 0.05, 400  # share that is kept out of the training, of sets so large
_MEMORY = 0.8  # share of the memory that may be used
_ENOUGH, _GOOD = 30_000, 120_000  # images of 32x32 that small networks show something after
_PATCHES_FROM = 3_000_000  # images of a training that patches repay
_STEPS, _SMALLEST_BATCH = 2_000, 8  # below so many steps smaller batches learn more in a time
_LENGTHS = (1, 1.5, 2, 3, 5, 7)  # of trainings, times a power of ten
_TIMES = (5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 360, 480)  # minutes that are proposed


@dataclass(frozen=True)
class Machine:
    """What a network is chosen for.

    Attributes:
        name: in words.
        kind: "cpu", "cuda", ...
        precision: that `auto` is here, and why.
        memory_bytes: of the device.
    """

    name: str
    kind: str
    precision: tuple[str, str]
    memory_bytes: int


@dataclass(frozen=True)
class Choice:
    """One thing that was chosen, and why."""

    name: str
    value: str
    why: str


@dataclass(frozen=True)
class TrainingPlan:
    """What is going to be trained.

    Attributes:
        recipe: all of it, but for the path of the converted images.
        choices: in the order of a table.
        timings: of the recipe's parts here.
        minutes: for steps.
        expected: images that the minutes suffice for.
        classifier_images: images that the judge of the samples is trained on at most.
    """

    recipe: Recipe
    choices: tuple[Choice, ...]
    timings: Timings
    minutes: float
    expected: int
    classifier_images: int


@dataclass(frozen=True)
class _Rung:
    """A network that needs so many images to show anything, and to be good."""

    recipe: Recipe
    words: str
    enough: int
    good: int
    patches: bool = False


def choose(
    facts: ImageFacts,
    machine: Machine,
    minutes: float | None,
    measure: Measure,
    overrides: Sequence[str] = (),
    ask: Callable[[float], float] | None = None,
) -> TrainingPlan:
    """A plan: the largest network that the time suffices for. The same arguments give the same.

    Args:
        facts: of the images.
        machine: that trains.
        minutes: of steps; None for a proposal.
        measure: called for a few recipes, small ones first.
        overrides: `key=value`, what the user wants otherwise.
        ask: turns the proposal into the user's time.

    Raises:
        RecipeError: overrides that do not fit, or that are not for pictures.
    """
    _check_overrides(overrides)
    ladder = list(_ladder(facts, machine, overrides))
    wanted = _value(overrides, "training.minutes")
    minutes = float(wanted) if isinstance(wanted, int | float) else minutes
    if minutes is None:
        recipe = _recipe(ladder[0], facts, overrides)
        minutes = _proposal(ladder[0], recipe, measure(recipe))
        minutes = minutes if ask is None else ask(minutes)
    chosen: tuple[_Rung, Recipe, Timings] | None = None
    for rung in ladder:
        try:
            recipe = _recipe(rung, facts, overrides)
        except RecipeError:
            if chosen is None and rung is ladder[-1]:
                raise
            continue
        timings = measure(recipe)
        fits = timings.memory_bytes <= _MEMORY * machine.memory_bytes
        if chosen is not None and not (fits and _images(recipe, timings, minutes) >= rung.enough):
            break
        chosen = rung, recipe, timings
    assert chosen is not None
    chosen = _with_steps(chosen, minutes, measure, overrides)
    return _finished(facts, machine, minutes, chosen, overrides)


def _with_steps(
    chosen: tuple[_Rung, Recipe, Timings],
    minutes: float,
    measure: Measure,
    overrides: Sequence[str],
) -> tuple[_Rung, Recipe, Timings]:
    """With a smaller batch where the time is for few steps: then their number counts for more."""
    rung, recipe, timings = chosen
    batch = recipe.training.batch
    steps = _images(recipe, timings, minutes) / batch
    fixed = any(_value(overrides, f"training.{key}") is not None for key in ("batch", "images"))
    if steps >= _STEPS or batch < 2 * _SMALLEST_BATCH or recipe.training.micro_batch or fixed:
        return chosen
    training = recipe.training.model_copy(update={"batch": batch // 2})
    recipe = recipe.model_copy(update={"training": training})
    return rung, recipe, measure(recipe)


def _check_overrides(overrides: Sequence[str]) -> None:
    if "auto" in (_value(overrides, "view"), _value(overrides, "view.kind")):
        raise RecipeError(
            "view.kind=auto looks at images that are converted already. Convert them, and train a "
            "recipe: tessera train cifar10-small view=auto data.path=photos-32.zip"
        )
    for key, advice in {
        "data.path": "the images are those that were named; leave it out",
        "codec.kind": "latents are made by `tessera data latents`; then train photos-256-latent",
    }.items():
        if _value(overrides, key) is not None:
            raise RecipeError(f"{key}: {advice}")


def _value(overrides: Sequence[str], key: str) -> object:
    """What the user set a key to; None if it was not set."""
    found = [text for name, _, text in (o.partition("=") for o in overrides) if name.strip() == key]
    return read_yaml(found[-1], key) if found else None


def _ladder(facts: ImageFacts, machine: Machine, overrides: Sequence[str]) -> Iterator[_Rung]:
    """What may be trained, from the cheapest to the dearest."""
    wanted = _value(overrides, "data.resolution")
    if wanted is not None and not (isinstance(wanted, int) and wanted > 0):
        raise RecipeError(f"data.resolution={wanted}: give the side of the images in pixels")
    sides = [side for side in RESOLUTIONS if facts.at_least(side) >= _LARGE] or [RESOLUTIONS[0]]
    largest = wanted if isinstance(wanted, int) else sides[-1]
    # Below 32 pixels nothing is cheaper: the networks work on a grid of 16.
    smalls = [largest] if wanted is not None else [s for s in sides if 32 <= s <= 64] or [largest]
    for side in smalls:
        try:
            small = photos_small(side)
        except ValueError:
            raise RecipeError(
                f"data.resolution={side}: take a multiple of {small_step(side)}"
            ) from None
        words = "small DDPM++" if side < 32 else "small U-Net on patches of pixels"
        yield _Rung(small, words, enough=_ENOUGH * side // 32, good=_GOOD * side // 32)
    large: list[tuple[Callable[[], Recipe], str]] = []
    if largest >= 48:
        large.append((photos_64, "DDPM++"))
    if largest >= 96:
        large.append((photos_128, "U-Net on patches of 2x2 pixels"))
    for make, words in large:
        if wanted is None or make is large[-1][0]:
            yield _Rung(make(), words, enough=300_000, good=3_000_000)
    if large:
        make, words = large[-1]
        yield _Rung(make(), words, enough=_PATCHES_FROM, good=3_000_000, patches=True)


def _recipe(rung: _Rung, facts: ImageFacts, overrides: Sequence[str]) -> Recipe:
    """The recipe of a rung for these images, of the length that it stands there with."""
    grey = facts.grey == facts.count
    classes = len(facts.classes) if _learnable(facts) else 0
    change: dict[str, object] = {
        "name": _slug(facts.path.name),
        "data": {
            "channels": 1 if grey else 3,
            "num_classes": classes,
            "xflip": not grey,
            "held_out": _HELD_OUT if facts.count >= _FROM else None,
        },
        "objective": {"label_dropout": 0.1 if classes else 0.0},
        "run": {"report": True},
    }
    if rung.patches:
        change["view"] = {"kind": "patches"}
    if any(_value(overrides, key) not in (None, "full") for key in ("view", "view.kind")):
        change["preconditioning"] = {"kind": "edm"}  # the linear start knows whole images only
    if isinstance(side := _value(overrides, "data.resolution"), int):
        change["data"] = {**change["data"], "resolution": side}  # type: ignore[dict-item]
    if facts.count < rung.recipe.training.batch:
        batch = max(1, facts.count)
        change["training"] = {"batch": batch, "micro_batch": None}
    data = merge(dump_recipe(rung.recipe), change)
    return parse_recipe(apply_overrides(data, overrides), str(facts.path))


def _learnable(facts: ImageFacts) -> bool:
    """Whether there are classes, and enough images of them."""
    occurring = [number for _, number in facts.classes if number]
    return len(occurring) > 1 and len(facts.classes) <= _CLASSES and min(occurring) >= _FEW


def _slug(name: str) -> str:
    """A name of a run from that of the images."""
    stem = name.split(".")[0].lower()
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in stem).strip("-") or "photos"


def _seconds(recipe: Recipe, timings: Timings) -> float:
    """Of an image, the kinds of steps by their shares, without other programs.

    So what is chosen does not depend on what else the machine happens to do.
    """
    shares = [(p, share) for p, share in build_view(recipe).shares() if p.kind in timings.steps]
    measured = sum(share * timings.steps[plan.kind] for plan, share in shares)
    return timings.alone * measured / sum(share * plan.images for plan, share in shares)


def _images(recipe: Recipe, timings: Timings, minutes: float) -> int:
    """What can be trained on in the time, and at least a step."""
    return max(round(60 * minutes / _seconds(recipe, timings)), recipe.training.batch)


def _length(images: int) -> int:
    """The length of a training that about so many images are expected of: the next of a few.

    It is coarse, so that the same machine gives the same recipe though measurements scatter, and no
    smaller, so that the minutes are used to their end.
    """
    power: int = 10 ** math.floor(math.log10(images))
    return next(round(n * power) for n in (*_LENGTHS, 10) if n * power >= images)


def _proposal(rung: _Rung, recipe: Recipe, timings: Timings) -> float:
    """Minutes after which the cheapest network is good, as far as one waits for it."""
    needed = rung.good * _seconds(recipe, timings) / 60
    return next((time for time in _TIMES if time >= needed), 60) if needed <= 60 else 60


def _finished(
    facts: ImageFacts,
    machine: Machine,
    minutes: float,
    chosen: tuple[_Rung, Recipe, Timings],
    overrides: Sequence[str],
) -> TrainingPlan:
    """The plan with its length, and everything that is counted by it."""
    rung, recipe, timings = chosen
    expected = _images(recipe, timings, minutes)
    images = _length(expected)
    asked = _value(overrides, "training.images")
    likely = min(images, asked) if isinstance(asked, int) else images
    half = -(-likely // 2)
    change = {
        "training": {"images": images, "minutes": minutes},
        "optimizer": {"rampup_images": min(recipe.optimizer.rampup_images, likely // 10)},
        "validation": {"every_images": half},
        "run": {
            "log_every_images": max(likely // 50, recipe.training.batch),
            "checkpoint_every_images": half,
            "preview": {**dump_recipe(recipe)["run"]["preview"], "every_images": half}
            if recipe.run.preview is not None
            else None,
        },
    }
    data = apply_overrides(merge(dump_recipe(recipe), change), overrides)
    recipe = parse_recipe(data, str(facts.path))
    classifier = max(4_000, min(1_000 * math.ceil(minutes), 12 * facts.count, 60_000))
    if asked is not None:
        classifier = min(classifier, max(256, recipe.training.images))
    expected = min(expected, recipe.training.images)
    timings = _with_images(timings, facts, recipe, in_memory=machine.kind == "cpu")
    choices = _choices(facts, machine, rung, recipe, timings, expected, overrides)
    return TrainingPlan(recipe, choices, timings, minutes, expected, classifier)


def _with_images(
    timings: Timings, facts: ImageFacts, recipe: Recipe, *, in_memory: bool
) -> Timings:
    """What was measured on blank images, with what the real ones take beside it.

    Args:
        in_memory: whether the images are in the memory that was measured, and not a GPU's.
    """
    data = recipe.data
    # A forward pass is a third of a step or so.
    held_out = min(int(facts.count * (data.held_out or 0)), recipe.validation.images)
    # They are mapped into memory, and all of them read.
    pages = facts.count * data.channels * data.resolution**2 if in_memory else 0
    return replace(
        timings,
        validation=held_out * _seconds(recipe, timings) / timings.alone / 3,
        memory_bytes=timings.memory_bytes + pages,
    )


def _choices(
    facts: ImageFacts,
    machine: Machine,
    rung: _Rung,
    recipe: Recipe,
    timings: Timings,
    expected: int,
    overrides: Sequence[str],
) -> tuple[Choice, ...]:
    """The rows of the table."""
    data, training, sizes = recipe.data, recipe.training, facts.sizes
    smallest = min(min(size) for size, _ in sizes)
    speed, steps = 1 / _seconds(recipe, timings), expected / training.batch
    patches = not isinstance(recipe.view, FullViewConfig)
    rows = {
        "data.resolution": (
            "resolution",
            f"{data.resolution}x{data.resolution}",
            f"shorter sides from {smallest} pixels on; the largest that the time suffices for",
        ),
        "": ("crop", "the square in the middle", "nothing is stretched"),
        "data.channels": ("channels", str(data.channels), _channels_why(facts)),
        "data.num_classes": ("classes", str(data.num_classes or "none"), _classes_why(facts)),
        "data.xflip": (
            "mirrored copies",
            "yes" if data.xflip else "no",
            "twice the photographs" if data.xflip else "grey images may be letters or scans",
        ),
        "data.held_out": (
            "held out",
            f"{data.held_out:.0%}" if data.held_out else "none",
            "not trained on, to tell copies" if data.held_out else "there are few images",
        ),
        "network": (
            "network",
            f"{rung.words} ({recipe.network.kind})",
            f"{speed:.3g} images/s here; it wants {rung.enough:,} images or more",
        ),
        "view": (
            "view",
            "patches" if patches else "whole images",
            "a long training gains by them"
            if patches
            else f"better than patches below {_PATCHES_FROM:,} images",
        ),
        "preconditioning": _start(recipe),
        "training.precision": (
            "precision",
            machine.precision[0] if training.precision == "auto" else training.precision,
            machine.precision[1],
        ),
        "training.batch": ("batch", str(training.batch), f"{_rough(steps)} steps in the time"),
        "optimizer.lr": (
            "learning rate",
            f"{recipe.optimizer.lr:g}",
            "constant, so that the run may end at any time",
        ),
        "ema": (
            "average",
            f"{recipe.ema[0].rampup_ratio or 0:.0%} of the images seen",
            "half-life of the averaged weights",
        ),
        "training.images": (
            "images",
            f"{training.images:,} at most",
            f"about {_rough(expected)} in {training.minutes or 0:g} minutes of steps, "
            f"each image {expected / facts.count:.2g} times",
        ),
        "sampling": (
            "sampling steps",
            str(getattr(recipe.sampling, "steps", "")),
            "of the previews and the report",
        ),
    }
    return tuple(
        Choice(name, value, "as you say" if _said(key, overrides) else why)
        for key, (name, value, why) in rows.items()
    )


def _start(recipe: Recipe) -> tuple[str, str, str]:
    """The row of what the training begins with."""
    if recipe.preconditioning.of_images:
        return "start", "linear", "what is linear in the images is measured, not learned"
    return "start", "none", "long trainings, and parts of images, do without a linear one"


def _rough(number: float) -> str:
    """In two digits."""
    return f"{float(f'{number:.2g}'):,.0f}"


def _said(key: str, overrides: Sequence[str]) -> bool:
    return bool(key) and any(
        name.strip() == key or name.strip().startswith(f"{key}.")
        for name, _, _ in (o.partition("=") for o in overrides)
    )


def _channels_why(facts: ImageFacts) -> str:
    if facts.grey == facts.count:
        return "all images are grey"
    return f"{facts.grey:,} grey ones become colour" if facts.grey else "all images have colour"


def _classes_why(facts: ImageFacts) -> str:
    if not facts.classes:
        return "no sub-folders or labels that tell any"
    if not _learnable(facts):
        return f"of {len(facts.classes)} some have under {_FEW} images, or there are too many"
    names = [name for name, _ in facts.classes]
    return ", ".join(names[:5]) + (f", and {len(names) - 5} more" if len(names) > 5 else "")


def refuse_large(facts: ImageFacts) -> None:
    """Raise if most of a collection cannot be used.

    Raises:
        TesseraError: more images are left out than used.
    """
    if len(facts.skipped) > facts.count:
        lines = [
            f"{facts.path}: {len(facts.skipped):,} images cannot be used, and {facts.count:,} can",
            *facts.skipped[:3],
        ]
        raise TesseraError("\n  ".join(lines))

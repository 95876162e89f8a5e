"""What plans tell beforehand against what runs take: images a second, time, and peak memory.

Each recipe is measured in one process, as plans and `tessera train --probe` measure it, and trained
in another one. Other programs on the machine disturb both: what they took is shown, and the rates
are compared by the processor time of the process itself, too, which they hardly change.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import device, record, section
from benchmarks.harness import seconds as timed
from tessera import memory
from tessera.data.packed import PackedWriter
from tessera.pipelines.loading import estimate
from tessera.recipes.loading import dump_recipe, load_recipe, parse_recipe
from tessera.recipes.overrides import apply_overrides
from tessera.recipes.photos import photos_small
from tessera.recipes.schema import Recipe
from tessera.training.feed import Feed
from tessera.training.learner import fresh_model, learner_of
from tessera.training.others import OtherPrograms
from tessera.training.probe import blank_images, measure
from tessera.training.tracking import memory_gb
from tessera.training.trainer import Trainer
from tessera.training.validation import validation_images

Result = TypeVar("Result")

SECONDS = 20.0  # of training steps in a round
IMAGES = 1_000
FLOPS_OF = ("photos-64", "photos-128", "photos-256-latent")
AT_ONCE = 2  # images of a step whose FLOPs are counted
SECTION = "Plans"

# What is for a GPU is made smaller, for a processor; on a GPU it is measured as it is.
_SHRUNK = ["training.batch=8", "training.micro_batch=4", "run.preview.rows=1"]
RECIPES: dict[str, tuple[Callable[[], Recipe], list[str]]] = {
    "small photos, 32x32": (partial(photos_small, 32), []),
    "small photos, 64x64": (partial(photos_small, 64), []),
    "cifar10-small": (partial(load_recipe, "cifar10-small"), []),
    "cifar10-small-lego": (partial(load_recipe, "cifar10-small-lego"), []),
    "cifar10-small-pdm": (partial(load_recipe, "cifar10-small-pdm"), []),
    "photos-64": (partial(load_recipe, "photos-64"), [*_SHRUNK, "network.model_channels=32"]),
}


@dataclass(frozen=True)
class Figures:
    """Of a plan, or of a run.

    Attributes:
        rate: images a second.
        seconds: of all, events included.
        memory: GB at the peak.
        own: images that a second of this process's processor time is worth.
        others: share of the machine that other programs took.
    """

    rate: float
    seconds: float
    memory: float
    own: float
    others: float


def prepared(name: str, folder: Path, seconds: float) -> Recipe:
    """A recipe with images to train on, that ends after `seconds` of steps."""
    make, shrunk = RECIPES[name]
    whole = device().type != "cpu"
    plain = apply_overrides(dump_recipe(make()), [] if whole else shrunk)
    recipe = parse_recipe(plain)
    images = folder / f"{recipe.data.resolution}.safetensors"
    if not images.exists():
        _write_images(images, recipe)
    every = 10**9  # at the end
    changes = [
        f"data.path={images}", "data.held_out=0.05",
        f"training.minutes={seconds / 60}", f"training.images={every}",
        f"run.dir={folder / name.replace(' ', '-').replace(',', '')}",
        f"run.checkpoint_every_images={every}", f"validation.every_images={every}",
        f"run.preview.every_images={every}",
    ]  # fmt: skip
    return parse_recipe(apply_overrides(dump_recipe(recipe), changes))


def _write_images(path: Path, recipe: Recipe) -> None:
    random, shape = np.random.default_rng(0), (3, recipe.data.resolution, recipe.data.resolution)
    with open(path, "wb") as file:
        writer = PackedWriter(file, shape, path.stem, None)
        for _ in range(IMAGES):
            writer.add(random.integers(0, 256, shape, np.uint8))
        writer.finish(np.arange(IMAGES) % 10)


def told(recipe: dict[str, Any]) -> Figures:
    """What a plan tells; to be called in a process of its own."""
    loaded, others = _start(recipe)
    feed = Feed(loaded, device())
    images = validation_images(loaded, device(), feed)
    begin, cpu = time.perf_counter(), time.process_time()
    timings = measure(loaded, feed, device(), validated=0 if images is None else images.count)
    busy = (time.process_time() - cpu) / (time.perf_counter() - begin)
    found = timings.forecast(loaded, feed.view, 0)
    rate = found.images_per_second
    return Figures(rate, found.seconds, found.memory_bytes / 1e9, rate / busy, others.share())


def taken(recipe: dict[str, Any]) -> Figures:
    """What the run takes; to be called in a process of its own."""
    loaded, others = _start(recipe)
    trainer = Trainer(loaded)
    begin, cpu = time.perf_counter(), time.process_time()
    trainer.run()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    lines = (trainer.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = next(line["seconds"] for line in map(json.loads, reversed(lines)) if "seconds" in line)
    rate = trainer.images_seen / steps
    return Figures(rate, seconds, memory_gb(device()), rate / (cpu / seconds), others.share())


def _start(recipe: dict[str, Any]) -> tuple[Recipe, OtherPrograms]:
    if device().type == "cpu":
        memory.keep_freed()  # as the commands do
    return parse_recipe(recipe), OtherPrograms()


def alone(function: Callable[[dict[str, Any]], Result], recipe: Recipe) -> Result:
    """The function's result in a new process, whose peak memory is nobody else's."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, dump_recipe(recipe)).result()


def run(
    rounds: int,
    record_figures: bool,
    names: Sequence[str] = tuple(RECIPES),
    seconds: float = SECONDS,
) -> None:
    """Measure and train each recipe for `rounds` times 20 seconds, and print the ratios."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            recipe = prepared(name, Path(folder), seconds * rounds)
            rows.append([name, *_row(alone(told, recipe), alone(taken, recipe))])
    columns = [
        "recipe", "images/s told", "real", "ratio", "by own time", "s told", "real", "ratio",
        "GB told", "real", "ratio", "others took",
    ]  # fmt: skip
    text = section("Told by the plan, and taken by the run (real / told)", columns, rows)
    executed = _flops_section()
    if record_figures:
        record(SECTION, f"{text}\n\n{executed}")


def _flops_section() -> str:
    """What `tessera cost` counts without computing, against the operations of a real step."""
    rows = []
    for name in FLOPS_OF:
        recipe = load_recipe(name, [f"training.batch={AT_ONCE}", "training.micro_batch=null"])
        counted = estimate(recipe).train_flops
        executed, seconds = step_flops(recipe)
        rows.append([
            name, f"{counted / 1e9:.2f}", f"{executed / 1e9:.2f}", f"{executed / counted:.3f}",
            f"{seconds:.2f}", f"{executed / seconds / 1e9:.0f}",
        ])  # fmt: skip
    columns = ["recipe", "GFLOP told", "executed", "ratio", "s an image here", "GFLOP/s"]
    return section("A training image, forward and backward", columns, rows)


def step_flops(recipe: Recipe) -> tuple[float, float]:
    """FLOPs of the operators that a step executes, and its seconds; both for an image."""
    learner = learner_of(recipe, fresh_model(recipe, device()), device())
    feed = Feed(recipe, device(), dataset=blank_images(recipe))
    plan = feed.view.plan(0)
    with feed.load([plan]) as loader:
        (batch,) = loader

    def step() -> None:
        learner.update(feed.micro_batches(batch), plan.images, 0)

    # The counter does not know the fused attention of processors.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return counter.get_total_flops() / plan.images, timed(step) / plan.images


def _row(plan: Figures, real: Figures) -> list[str]:
    def three(kind: str, digits: int) -> list[str]:
        a, b = getattr(plan, kind), getattr(real, kind)
        return [f"{a:.{digits}f}", f"{b:.{digits}f}", f"{b / a:.2f}"]

    return [
        *three("rate", 1), f"{real.own / plan.own:.2f}", *three("seconds", 0), *three("memory", 2),
        f"{plan.others:.0%}, {real.others:.0%}",
    ]  # fmt: skip

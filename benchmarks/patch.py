"""Patch-wise against full-image training of one network: seconds per million training images.

Both go through the trainer's own data feed and learner. Steps of every patch size and of full
images take turns; each time is put together from the steps' least times by the schedule's
probabilities, and stands beside what the FLOPs predict.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from benchmarks.harness import device, interleaved, markdown, record, show
from tessera.data.views import PatchSize, patch_sizes
from tessera.pipelines.loading import estimate
from tessera.recipes.build import build_denoiser, build_objective
from tessera.recipes.loading import load_recipe
from tessera.recipes.schema import Recipe
from tessera.training.feed import Feed
from tessera.training.learner import Learner, TrainStep

REAL_P = (0.5, 0.3)
# Batches of about the same work at both sizes, as large as they are in training.
BATCHES = {32: 64, 64: 32}


def recipe_of(data: Path, resolution: int, *overrides: str) -> Recipe:
    """`cifar10-small` at another resolution, on the images in `data`."""
    batch = BATCHES[resolution] * (8 if device().type == "cuda" else 1)
    common = [
        f"data.path={data}", f"data.resolution={resolution}", "data.num_classes=0",
        "data.xflip=false", "training.compile=false",
        f"training.batch={batch}", "training.images=1e12",
    ]  # fmt: skip
    return load_recipe("cifar10-small", [*common, *overrides])


def patches(data: Path, resolution: int, *overrides: str) -> Recipe:
    """The same, trained patch-wise."""
    return recipe_of(data, resolution, "view.kind=patches", *overrides)


def write_images(path: Path, resolution: int) -> None:
    """A packed set of random images."""
    images = np.random.default_rng(0).integers(0, 256, (4096, 3, resolution, resolution), np.uint8)
    header = {"format": "tessera-packed", "version": "1"}
    safetensors.numpy.save_file({"images": images}, path, metadata=header)


def learner(recipe: Recipe) -> Learner:
    """The trainer's learner of a recipe."""
    torch.manual_seed(0)
    step = TrainStep(build_denoiser(recipe), build_objective(recipe.objective))
    return Learner(step, recipe.optimizer, recipe.ema, recipe.training, device())


def stepper(target: Learner, recipe: Recipe, stack: ExitStack) -> Callable[[], Any]:
    """A function that reads a batch and makes a step of it."""
    feed = Feed(recipe, device())
    batches: Iterator[Any] = stack.enter_context(feed.batches(0))
    seen = 0

    def step() -> Any:
        nonlocal seen
        batch = next(batches)
        images = batch.plan.images
        update = target.update(feed.micro_batches(batch), images, seen)
        seen += images
        return update

    return step


def measure(resolution: int, rounds: int) -> tuple[dict[str, float], list[PatchSize], int]:
    """Least seconds of a step on full images ("full") and on patches (by their side)."""
    sizes = patch_sizes(resolution, (resolution // 4, resolution // 2, resolution), 0.5)
    with ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "images.safetensors"
        write_images(data, resolution)
        whole = recipe_of(data, resolution)
        steps = {"full": stepper(learner(whole), whole, stack)}
        shared = learner(patches(data, resolution))
        for size in sizes:
            one = patches(
                data,
                resolution,
                f"view.sizes=[{size.side}]",
                f"view.multipliers=[{size.multiplier}]",
            )
            steps[str(size.side)] = stepper(shared, one, stack)
        return interleaved(steps, rounds, warmup=2), sizes, whole.training.batch


def run(rounds: int, record_figures: bool) -> None:
    """Time steps of every size, print the tables, and keep them if asked to."""
    columns = ["training", "s per million images", "measured", "predicted", "reached"]
    rows, parts = [], []
    for resolution in BATCHES:
        times, sizes, batch = measure(resolution, rounds)
        full = times["full"] / batch * 1e6
        rows.append([f"{resolution}x{resolution} full", f"{full:,.0f}", "1", "1", ""])
        placeholder = Path("unused")
        flops = estimate(recipe_of(placeholder, resolution)).train_flops
        for real_p in REAL_P:
            shares = patch_sizes(resolution, [size.side for size in sizes], real_p)
            seconds = sum(s.probability * times[str(s.side)] for s in shares)
            images = sum(s.probability * s.multiplier for s in shares) * batch
            patch = seconds / images * 1e6
            recipe = patches(placeholder, resolution, f"view.real_p={real_p}")
            gain, predicted = full / patch, flops / estimate(recipe).train_flops
            rows.append(
                [
                    f"{resolution}x{resolution} patches, p = {real_p}", f"{patch:,.0f}",
                    f"{gain:.2f}x", f"{predicted:.2f}x", f"{gain / predicted:.0%}",
                ]
            )  # fmt: skip
        parts += [
            [
                f"{resolution}x{resolution}, patches of {size.side}",
                str(size.multiplier * batch),
                f"{times[str(size.side)] * 1e3:.0f}",
                f"{times[str(size.side)] / times['full']:.3f}",
                f"{size.multiplier * (size.side / resolution) ** 2:.3f}",
            ]
            for size in sizes
        ]
    show("Patch-wise training", columns, rows)
    part_columns = ["step", "images", "ms", "of a full step", "pixels of a full step"]
    show("Steps", part_columns, parts)
    if record_figures:
        tables = [markdown(columns, rows), "Steps:", markdown(part_columns, parts)]
        record("Patch Diffusion: training speed", "\n\n".join(tables))

"""A recipe against the training example of diffusers: the same images, minutes and clock.

    python -m benchmarks.claims.tessera_vs_diffusers --data cifar10.zip --minutes 30
    python -m benchmarks.claims.tessera_vs_diffusers --data photos/ --recipe auto --minutes 30

Both train at once, a core each, and stop for scores, which do not count. The example's network is
the one of nearest size, see `benchmarks.claims.diffusers_example`; of its samplers the best score
counts at every point. Where a recipe knows classes, the example's network is told them too;
with --unconditional neither is. `--recipe auto` is what `tessera train photos/` chooses. The
Fréchet distance is that of `tessera eval`: features of a classifier trained on the same images; it
is no FID. Precision and recall are of the same features.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.claims import common, processes
from benchmarks.claims.diffusers_example import (
    WARMUP,
    Example,
    Sampler,
    nearest_width,
    parameters,
    parse_samplers,
    unet,
)
from benchmarks.harness import device, markdown, record, record_readme, show
from tessera.comparing.timed import TIMED, averaged, train_by_time
from tessera.data.dataset import open_dataset
from tessera.files import read_json, write_json
from tessera.images import grid, save_png
from tessera.metrics.conventions import Needs
from tessera.metrics.evaluate import compare
from tessera.metrics.formats import Measured
from tessera.metrics.measure import ImageStream, data_source, made_images, measure_images
from tessera.metrics.reference import load_reference, open_reference, save_reference
from tessera.pipelines.base import Pipeline
from tessera.precision import resolve
from tessera.recipes.build import build_model
from tessera.recipes.loading import dump_recipe, load_recipe, parse_recipe
from tessera.recipes.schema import Recipe
from tessera.starting.begin import plan_training, with_path
from tessera.starting.cache import converted
from tessera.training.trainer import Trainer

ARMS = ("tessera", "diffusers")
NAME = "tessera_vs_diffusers"
TITLE = "Beside the training example of diffusers, at equal time"
COLUMNS = [
    "model", "minutes", "images", "sampler", "evaluations", "Fréchet distance", "precision",
    "recall", "recognised",
]  # fmt: skip

Images = NDArray[np.uint8]
Batches = Iterator[tuple[Images, Tensor | None]]


@dataclass(frozen=True)
class Line:
    """A score of an arm, as its process prints it; without minutes that of real images."""

    arm: str
    minutes: float
    images: int
    sampler: str
    evaluations: int
    distance: float
    precision: float
    recall: float
    recognised: float | None

    def cells(self) -> list[str]:
        """A row of the table, see `COLUMNS`."""
        made = self.arm in ARMS
        return [
            self.arm, f"{self.minutes:.3g}" if made else "–", f"{self.images:,}" if made else "–",
            self.sampler, str(self.evaluations) if made else "–", f"{self.distance:.3f}",
            f"{self.precision:.3f}", f"{self.recall:.3f}",
            "–" if self.recognised is None else f"{self.recognised:.1%}",
        ]  # fmt: skip


class Judge:
    """Scores images by the features of one classifier, the distance and precision and recall.

    Args:
        reference: file of the reference.
        data: the training images, of which as many as there are samples are the manifold.
        samples: of a score.
    """

    def __init__(self, reference: Path, data: str, samples: int) -> None:
        known, images = load_reference(reference, device()), open_dataset(data)
        self.samples, self._extractor = samples, known.extractor
        some = data_source(images, num=min(samples, len(images)))
        real = measure_images(some, self._extractor, Needs(features=True))
        self._real = replace(known.measured(), features=real.features)
        self.accuracy = known.extractor.facts.accuracy

    def stream(self, batches: Batches) -> Measured:
        """Features of images as they are made."""
        tensors = ((torch.from_numpy(x).permute(0, 3, 1, 2), y) for x, y in batches)
        return self.measured(made_images(tensors, self.samples, "samples"))

    def measured(self, images: ImageStream) -> Measured:
        """What `line` needs of images."""
        return measure_images(
            images, self._extractor, Needs(moments=True, features=True, recognised=True)
        )

    def line(self, found: Measured, **facts: Any) -> Line:
        """The scores of features."""
        distance, manifold = compare(found, self._real, [("fd", "edm"), ("pr", "adm")])
        return Line(
            distance=distance.values["fd"],
            precision=manifold.values["precision"],
            recall=manifold.values["recall"],
            recognised=found.recognised,
            **facts,
        )


class Arm:
    """One side: it trains, and prints a line for each sampler at each point of the time."""

    def __init__(self, arm: str, options: argparse.Namespace, judge: Judge) -> None:
        self.arm, self.options, self.judge = arm, options, judge
        self._best: tuple[float, Images] | None = None

    def score(
        self, spent: float, images: int, sampler: str, evaluations: int, made: Batches
    ) -> None:
        """Score what was made, and keep the first images of the best of the last point."""
        first: list[Images] = []

        def watched() -> Batches:
            for batch, labels in made:
                first.append(batch)
                yield batch, labels

        line = self.judge.line(
            self.judge.stream(watched()), arm=self.arm, minutes=spent / 60, images=images,
            sampler=sampler, evaluations=evaluations,
        )  # fmt: skip
        print(json.dumps(asdict(line)), flush=True)
        if self._best is None or line.distance < self._best[0]:
            self._best = line.distance, np.concatenate(first)[:50]

    def run(
        self,
        steps: Iterator[float],
        score: Callable[[float, bool], None],
    ) -> None:
        """Train by `steps`, and call `score` at the points, with whether it is the last."""
        limit, points = 60 * self.options.minutes, list(self.options.points)
        for spent in steps:
            while points and spent >= points[0] * limit:
                self._best = None
                score(spent, len(points) == 1)
                points.pop(0)
        assert self._best is not None
        save_png(picture(self.options, self.arm), grid(self._best[1], columns=common.COLUMNS))


def _name(options: argparse.Namespace) -> str:
    """Of the files, and of the block of README.md."""
    return f"{NAME}-{options.label}" if options.label else NAME


def picture(options: argparse.Namespace, what: str) -> Path:
    """A picture of the results."""
    path: Path = options.out / f"{_name(options)}-{what}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# ---------------------------------------------------------------------------------------- the arms


def ours(arm: Arm, recipe: Recipe, folder: Path) -> None:
    """Train the recipe; its own sampler is used."""
    trainer = Trainer(recipe, folder / "run")
    options = arm.options

    def made(pipe: Pipeline) -> Batches:
        label = "balanced" if recipe.data.num_classes else None
        for batch in pipe.sample_batches(range(options.samples), label, batch=options.batch):
            known = batch.labels
            yield batch.images, None if known is None else torch.from_numpy(known)

    def score(spent: float, last: bool) -> None:
        pipe = averaged(trainer)
        evaluations = round(pipe.cost().evaluations)
        words = f"its own, {evaluations} evaluations"
        arm.score(spent, trainer.images_seen, words, evaluations, made(pipe))

    arm.run(train_by_time(trainer, 60 * options.minutes), score)


def theirs(arm: Arm, recipe: Recipe, width: int) -> None:
    """Train the example's network; all samplers that the options name make samples."""
    options, classes = arm.options, recipe.data.num_classes
    data = open_dataset(recipe.data.path or "")
    example = Example(
        unet(recipe.data.resolution, recipe.data.channels, classes, width),
        data.read(np.arange(len(data))),
        data.labels if classes else None,
        batch=options.train_batch,
        flip=recipe.data.xflip,
        seed=options.seed,
        precision=resolve(recipe.training.precision, device()),
        device=device(),
    )

    def made(sampler: Sampler) -> Batches:
        for start in range(0, options.samples, options.batch):
            seeds = range(start, min(start + options.batch, options.samples))
            yield example.sample(sampler, seeds, classes)

    def score(spent: float, last: bool) -> None:
        for sampler in [*options.samplers, *(options.final if last else [])]:
            arm.score(spent, example.images_seen, sampler.label, sampler.steps, made(sampler))

    arm.run(example.train(60 * options.minutes), score)


def train(options: argparse.Namespace) -> None:
    """One arm, in a process and on cores of its own."""
    _pin(ARMS.index(options.arm))
    folder: Path = options.folder
    plan = json.loads((folder / "plan.json").read_bytes())
    recipe = load_recipe(folder / "recipe.json")
    judge = Judge(folder / "reference.npz", recipe.data.path or "", options.samples)
    arm = Arm(options.arm, options, judge)
    if options.arm == "tessera":
        ours(arm, recipe, folder)
    else:
        theirs(arm, recipe, plan["width"])


def _pin(index: int) -> None:
    """Keep the process to its share of the cores, with all threads that it starts."""
    if not hasattr(os, "sched_setaffinity") or device().type != "cpu":
        return
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // len(ARMS)
    if share:
        os.sched_setaffinity(0, cores[index * share : (index + 1) * share])


# ---------------------------------------------------------------------------------------- the whole


def planned(options: argparse.Namespace) -> Recipe:
    """The recipe of our arm, for training by the clock, with the images that both train on."""
    # All images are trained on by both, and kept in memory by both.
    timed = [
        *TIMED, "data.held_out=null", "data.validation=null", "training.minutes=null",
        f"training.seed={options.seed}", "data.cache=true",
        *(["data.num_classes=0"] if options.unconditional else []),
    ]  # fmt: skip
    if options.recipe != "auto":
        return load_recipe(
            options.recipe, [*timed, f"data.path={options.data}", *options.overrides]
        )
    start = plan_training(options.data, options.minutes, options.overrides, device=device())
    path = converted(start.facts, start.plan.recipe, print)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{start.plan.recipe.name}.json"
        write_json(file, dump_recipe(with_path(start.plan.recipe, path)))
        return load_recipe(file, timed)


def prepare(options: argparse.Namespace, folder: Path) -> tuple[Recipe, dict[str, int]]:
    """Leave in `folder` what both arms read; the recipe, and both networks' sizes and the width."""
    recipe = planned(options)
    write_json(folder / "recipe.json", dump_recipe(recipe))
    reference = open_reference(options.reference or recipe.data.path or "", device=device())
    save_reference(folder / "reference.npz", reference)
    data, classes = recipe.data, recipe.data.num_classes
    with torch.device("meta"):
        size = parameters(build_model(recipe))
        width = options.width or nearest_width(data.resolution, data.channels, classes, size)
        other = parameters(unet(data.resolution, data.channels, classes, width))
    plan = {"width": width, "tessera": size, "diffusers": other}
    write_json(folder / "plan.json", plan)
    sizes = f"{recipe.name} {size / 1e6:.2f} M parameters, UNet2DModel {other / 1e6:.2f} M"
    print(f"{sizes} (width {width})", flush=True)
    return recipe, plan


def best(lines: Sequence[Line], arm: str) -> list[Line]:
    """The best line of an arm at each point."""
    points: dict[float, Line] = {}
    for line in lines:
        if line.arm == arm and (
            line.minutes not in points or line.distance < points[line.minutes].distance
        ):
            points[line.minutes] = line
    return list(points.values())


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Train and score both; all that is kept, as JSON has it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe, plan = prepare(options, folder)
        lines, threads = processes.run_arms(NAME, ARMS, options, folder)
        judge = Judge(folder / "reference.npz", recipe.data.path or "", options.samples)
        if options.held_out:
            real = judge.measured(data_source(open_dataset(options.held_out), num=options.samples))
            facts = {"arm": "held-out images", "minutes": 0, "images": 0, "sampler": "–"}
            lines.append(asdict(judge.line(real, **facts, evaluations=0)))
    plain = dump_recipe(recipe)
    plain["data"]["path"] = None  # of this machine
    return {
        "recipe": plain,
        "plan": plan,
        "lines": lines,
        "accuracy": judge.accuracy,
        "threads": threads,
        "options": {name: getattr(options, name) for name in ("minutes", "samples", "train_batch")},
    }


def main() -> None:
    """Train and score both, print and keep the table, and draw the pictures."""
    options = parser().parse_args()
    if options.arm is not None:
        train(options)
        return
    if options.again:
        content = read_json(options.again)
        vars(options).update(content["options"])
    else:
        content = measured(options)
        write_json(options.out / f"{_name(options)}.json", content)
    recipe, lines = parse_recipe(content["recipe"]), [Line(**line) for line in content["lines"]]
    show(TITLE, COLUMNS, [line.cells() for line in lines])
    curves = {arm: [(x.minutes, x.distance) for x in best(lines, arm)] for arm in ARMS}
    common.plot(picture(options, "curves"), curves, f"{recipe.name}, same images, same minutes",
                "minutes of training")  # fmt: skip
    if not options.no_record:
        options.note = content.get("note", "")
        keep(options, recipe, content["plan"], lines, content["accuracy"], content["threads"])


def keep(
    options: argparse.Namespace,
    recipe: Recipe,
    plan: dict[str, int],
    lines: Sequence[Line],
    accuracy: float,
    threads: int,
) -> None:
    """Put the table into RESULTS.md, and its essence into README.md."""
    told = "both are told the classes" if recipe.data.num_classes else "neither knows classes"
    about = (
        f"`{recipe.name}` ({plan['tessera'] / 1e6:.2f} M parameters, batch "
        f"{recipe.training.batch}) beside diffusers' unconditional training example "
        f"({plan['diffusers'] / 1e6:.2f} M, batch {options.train_batch}); {told}; "
        f"{options.minutes:g} minutes of training each, both at once, "
        f"{threads} thread{'s' * (threads > 1)} each, scores do not count; "
        f"{options.samples:,} samples of a score"
    )
    title = f"{TITLE}, {recipe.data.resolution}x{recipe.data.resolution}"
    names = ["curves", *ARMS]
    pictures = " ".join(f"![{what}]({picture(options, what).name})" for what in names)
    right = f"The classifier is right on {accuracy:.1%} of held-out images. {options.note}".rstrip()
    rows = [line.cells() for line in lines]
    record(title, f"{about}. {right} {pictures}\n\n{markdown(COLUMNS, rows)}")
    ends = {arm: best(lines, arm) for arm in ARMS}
    short = [
        [f"{a.minutes:.3g}", f"{a.distance:.2f}", f"{b.distance:.2f}", b.sampler,
         f"{a.precision:.2f} / {a.recall:.2f}", f"{b.precision:.2f} / {b.recall:.2f}"]
        for a, b in zip(ends["tessera"], ends["diffusers"], strict=True)
    ]  # fmt: skip
    head = ["minutes", *ARMS, "its best sampler", "precision / recall", "diffusers'"]
    images = [ends[arm][-1].images for arm in ARMS]
    batches = (recipe.training.batch, options.train_batch)
    steps = [count // batch for count, batch in zip(images, batches, strict=True)]
    seen = (
        f"In all, {images[0]:,} and {images[1]:,} images, in {steps[0]:,} and {steps[1]:,} steps"
        f"{f', fewer than its warm-up of {WARMUP}' * (steps[1] < WARMUP)}."
    )
    record_readme(
        _name(options),
        "Fréchet distance (lower is better), by the features of a classifier of the same images: "
        f"{about}. {seen} {options.note}\n\n{markdown(head, short)}\n\n"
        + "\n".join(
            f"![{words}](benchmarks/{picture(options, what).name})"
            for what, words in (
                ("curves", "Distance against minutes"),
                ("tessera", "Samples of tessera"),
                ("diffusers", "Samples of diffusers' example"),
            )
        ),
    )


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.claims.{NAME}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common.add_options(made, minutes=30, samples=1000)
    made.add_argument("--recipe", default="cifar10-small-linear", help="a recipe, or auto")
    made.add_argument("--unconditional", action="store_true", help="neither knows classes")
    made.add_argument("--train-batch", type=int, default=16, help="of the example")
    made.add_argument("--width", type=int, help="of its network (default: of the nearest size)")
    made.add_argument("--samplers", type=parse_samplers, default="dpm-25,ddim-50",
                      help="of the example, at each point")  # fmt: skip
    made.add_argument("--final", type=parse_samplers, default="ddpm-100",
                      help="further ones at the end")  # fmt: skip
    made.add_argument("--points", type=_shares, default="0.25,0.5,1", help="shares of the minutes")
    made.add_argument("--again", type=Path, help=f"{NAME}.json of --out: keep it, train nothing")
    made.add_argument("--label", default="", help="of files and README's block, as of other images")
    made.add_argument("--held-out", help="real images that set the least distance")
    processes.add_arm_options(made, ARMS)
    return made


def _shares(text: str) -> list[float]:
    try:
        found = sorted(float(part) for part in text.split(","))
    except ValueError:
        found = []
    if not found or found[0] <= 0 or found[-1] != 1:
        raise argparse.ArgumentTypeError("give shares of the minutes up to 1, like 0.25,0.5,1")
    return found


if __name__ == "__main__":
    common.run(main)

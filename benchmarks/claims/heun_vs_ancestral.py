"""One discrete model, three samplers: score against evaluations of the network.

    python -m benchmarks.claims.heun_vs_ancestral --data cifar10.zip --pipeline runs/pdm
    python -m benchmarks.claims.heun_vs_ancestral --data cifar10.zip --minutes 20

Without a pipeline, `cifar10-small-pdm` is trained first, for so many minutes. All samplers make the
same seeds and classes with the same weights. The Fréchet distance is that of `tessera eval`:
features of a classifier trained on the same images; it is no FID.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.claims import common
from benchmarks.harness import device, markdown, record, show
from tessera.comparing.timed import Scored
from tessera.metrics.reference import open_reference
from tessera.pipelines.base import Pipeline
from tessera.pipelines.diffusion import DiffusionPipeline
from tessera.pipelines.loading import load

RECIPE = "cifar10-small-pdm"
TITLE = "PDM: Heun's method on a discrete model"
SAMPLERS = {"ddpm": "DDPM, ancestral", "ddim": "DDIM", "edm": "Heun (EDM)"}


@dataclass(frozen=True)
class Point:
    """One sampler with one number of steps."""

    sampler: str
    steps: int
    result: Scored

    @property
    def distance(self) -> float:
        """To the real images."""
        return self.result.known.fd_classifier


def measure(pipe: Pipeline, options: argparse.Namespace) -> list[Point]:
    """Every sampler with every number of steps that was asked for."""
    reference = open_reference(options.reference or options.data, device=device())
    points = []
    for sampler in SAMPLERS:
        for steps in getattr(options, sampler):
            result = common.scored(
                pipe, reference, options, sampler=sampler, steps=steps,
                guidance=options.guidance,
            )  # fmt: skip
            points.append(Point(sampler, steps, result))
            print(f"{SAMPLERS[sampler]}, {steps} steps: {points[-1].distance:.3f}", flush=True)
    return points


def verdict(points: list[Point]) -> str:
    """With how many evaluations Heun's method does as well as the best ancestral run."""
    ancestral = [p for p in points if p.sampler == "ddpm"]
    heun = [p for p in points if p.sampler == "edm"]
    if not ancestral or not heun:
        return ""
    goal = min(ancestral, key=lambda p: p.distance)
    reached = [p for p in heun if p.distance <= goal.distance]
    told = (
        f"The best ancestral score is {goal.distance:.3f}, in {goal.result.evaluations:.0f} "
        "evaluations. "
    )
    if not reached:
        best = min(heun, key=lambda p: p.distance)
        return told + (
            f"Heun's method does not reach it: its best is {best.distance:.3f}, in "
            f"{best.result.evaluations:.0f}."
        )
    first = min(reached, key=lambda p: p.result.evaluations)
    ratio = goal.result.evaluations / first.result.evaluations
    return told + (
        f"Heun's method has {first.distance:.3f} in {first.result.evaluations:.0f}, {ratio:.1f} "
        "times fewer."
    )


def numbers(text: str) -> list[int]:
    """`25,50` as a list."""
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    """Measure, print and keep the table, and draw the picture."""
    parser = common.parser_for("heun_vs_ancestral", __doc__)
    parser.add_argument("--pipeline", help="a trained discrete model: run or pipeline folder")
    parser.add_argument("--minutes", type=float, default=20, help="training time without one")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument(
        "--ddpm", type=numbers, default=[25, 50, 100, 250], help="steps of DDPM, like 25,50"
    )
    parser.add_argument("--ddim", type=numbers, default=[10, 25, 50, 100], help="steps of DDIM")
    parser.add_argument(
        "--edm",
        type=numbers,
        default=[5, 9, 18],
        help="steps of Heun, 2 N - 1 evaluations",
    )
    options = parser.parse_args()
    if options.pipeline is not None:
        pipe = load(options.pipeline, device=device())
    else:
        with tempfile.TemporaryDirectory() as folder:
            recipe = common.timed_recipe(RECIPE, options)
            pipe, _ = common.trained(recipe, Path(folder) / "run", options.minutes)
    if not isinstance(pipe, DiffusionPipeline) or pipe.denoiser.levels is None:
        parser.error("this model knows continuous noise levels; give one of a discrete process")

    points = measure(pipe, options)
    columns = ["sampler", "steps", "evaluations", "Fréchet distance", "recognised", "images/s"]
    rows = [
        [
            SAMPLERS[p.sampler], str(p.steps), f"{p.result.evaluations:.0f}", f"{p.distance:.3f}",
            common.percent(p.result.known.recognised),
            f"{options.samples / p.result.seconds:.3g}",
        ]
        for p in points
    ]  # fmt: skip
    show(TITLE, columns, rows)
    print(verdict(points))
    picture = options.out / "heun_vs_ancestral.png"
    curves = {
        name: [(p.result.evaluations, p.distance) for p in points if p.sampler == sampler]
        for sampler, name in SAMPLERS.items()
    }
    title = f"{pipe.recipe.name}, {pipe.images_seen:,} images, the same weights"
    common.plot(picture, curves, title, "evaluations of the network for an image", "log")
    if not options.no_record:
        note = (
            f"{pipe.recipe.name} after {pipe.images_seen:,} images; {options.samples} samples of "
            f"the same seeds, guidance {options.guidance:g}. {verdict(points)} "
            f"![picture]({picture.name})"
        )
        record(TITLE, f"{note}\n\n{markdown(columns, rows)}")


if __name__ == "__main__":
    common.run(main)

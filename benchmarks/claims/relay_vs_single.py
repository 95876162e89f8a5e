"""Quality at equal time: `cifar10-small` against the two small stages of a relay in its minutes.

    python -m benchmarks.claims.relay_vs_single --data cifar10.zip --minutes 30 --parallel

The first stage (8x8) trains for a share of the minutes, the second (8x8 to 32x32) for the rest;
only training time counts. Both sides sample with their own defaults, which cost nearly the same
number of FLOPs; the table says how many, and how long an image takes. The Fréchet distance is that
of `tessera eval`: features of a classifier trained on the same images; it is no FID.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.claims import common
from tessera.pipelines.base import Pipeline
from tessera.pipelines.diffusion import DiffusionPipeline
from tessera.pipelines.relay import RelayPipeline

STAGES = {"first": "cifar10-small-relay-first", "second": "cifar10-small-relay-second"}
ARMS = ("single", "relay")
TITLE = "Relay diffusion: two stages against one at equal time"


def train(options: argparse.Namespace, folder: Path) -> None:
    """Train one arm and save its pipeline, then the images that its models have seen."""
    images = []

    def one(name: str, recipe: str, minutes: float) -> DiffusionPipeline:
        pipe, trainer = common.trained(
            common.timed_recipe(recipe, options), folder / f"run-{name}", minutes
        )
        assert isinstance(pipe, DiffusionPipeline)
        images.append(trainer.images_seen)
        return pipe

    pipe: Pipeline
    if options.arm == "single":
        pipe = one("single", "cifar10-small", options.minutes)
    else:
        share = {"first": options.first, "second": 1 - options.first}
        pipe = RelayPipeline(
            [one(name, recipe, share[name] * options.minutes) for name, recipe in STAGES.items()]
        )
    common.keep_arm(folder, options.arm, pipe, images)


def main() -> None:
    """Train, sample and score both, print and keep the table, and write the grids."""
    parser = common.parser_for("relay_vs_single", __doc__)
    parser.add_argument("--minutes", type=float, default=30, help="training time of each arm")
    parser.add_argument("--first", type=float, default=1 / 3, help="share of the first stage")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    common.add_arm_options(parser, ARMS)
    options = parser.parse_args()
    if options.arm is not None:
        train(options, options.folder)
        return
    note = (
        f"{options.minutes:g} minutes of training each, the first stage for {options.first:.0%} "
        "of the relay's"
    )
    with common.kept_arms("relay_vs_single", ARMS, options) as kept:
        cases = []
        for guidance in options.guidance:
            both = {f"{stage}.guidance": guidance for stage in STAGES}
            for arm, sampling in (("single", {"guidance": guidance}), ("relay", both)):
                cases.append(common.Case(arm, f"{arm}, guidance {guidance:g}", sampling))
        common.score_arms("relay_vs_single", TITLE, note, cases, kept, options)


if __name__ == "__main__":
    common.run(main)

"""Quality at equal time: `cifar10-small` against the two small stages of a relay in its minutes.

    python -m benchmarks.claims.relay_vs_single --data cifar10.zip --minutes 30 --parallel

The first stage (8x8) trains for a share of the minutes, the second (8x8 to 32x32) for the rest;
only training time counts. Both sides sample with their own defaults, which cost nearly the same
number of FLOPs; the table says how many, and how long an image takes. The Fréchet distance is that
of `tessera eval`: features of a classifier trained on the same images; it is no FID.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import tessera
from benchmarks.claims import common
from benchmarks.harness import device, markdown, record, show
from tessera.files import write_json
from tessera.metrics.reference import open_reference
from tessera.pipelines.base import Pipeline
from tessera.pipelines.relay import RelayPipeline

STAGES = {"first": "cifar10-small-relay-first", "second": "cifar10-small-relay-second"}
ARMS = ("single", "relay")
TITLE = "Relay diffusion: two stages against one at equal time"


def train(options: argparse.Namespace, folder: Path) -> None:
    """Train one arm and save its pipeline, then the images that its stages have seen."""
    images = []

    def one(name: str, recipe: str, minutes: float) -> Pipeline:
        pipe, trainer = common.trained(
            common.timed_recipe(recipe, options), folder / f"run-{name}", minutes
        )
        images.append(trainer.images_seen)
        return pipe

    if options.arm == "single":
        one("single", "cifar10-small", options.minutes).save(folder / "single")
    else:
        share = {"first": options.first, "second": 1 - options.first}
        pipes = [
            one(name, recipe, share[name] * options.minutes) for name, recipe in STAGES.items()
        ]
        RelayPipeline(pipes).save(folder / "relay")  # type: ignore[arg-type]
    write_json(folder / f"{options.arm}.json", images)


def main() -> None:
    """Train, sample and score both, print and keep the table, and write the grids."""
    parser = common.parser_for("relay_vs_single", __doc__)
    parser.add_argument("--minutes", type=float, default=30, help="training time of each arm")
    parser.add_argument("--first", type=float, default=1 / 3, help="share of the first stage")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder of the trained pipelines; arms that are in it are used as they are",
    )
    common.add_arm_options(parser, ARMS)
    options = parser.parse_args()
    if options.arm is not None:
        train(options, options.folder)
        return

    reference = open_reference(options.reference or options.data, device=device())
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        missing = [arm for arm in ARMS if not (folder / f"{arm}.json").exists()]
        common.run_arms("relay_vs_single", missing, options, folder)
        images = {arm: json.loads((folder / f"{arm}.json").read_bytes()) for arm in ARMS}
        columns = ["model", "training images", "guidance", "GFLOPs an image", "ms an image",
                   "Fréchet distance", "recognised"]  # fmt: skip
        rows, pictures = [], []
        for arm in ARMS:
            pipe = tessera.load(folder / arm).to(device())
            for guidance in options.guidance:
                sampling = {"guidance": guidance}
                if isinstance(pipe, RelayPipeline):
                    sampling = {f"{stage}.guidance": guidance for stage in STAGES}
                result = common.scored(pipe, reference, options, **sampling)
                pictures.append(options.out / f"relay_vs_single-{arm}-{guidance:g}.png")
                common.save_grid(pictures[-1], result.first)
                flops = pipe.cost(**sampling).sample_flops
                rows.append(
                    [arm, " + ".join(f"{n:,}" for n in images[arm]), f"{guidance:g}",
                     f"{flops / 1e9:.1f}", f"{result.seconds / options.samples * 1e3:.1f}",
                     f"{result.score.fd_classifier:.3f}", common.percent(result.score.recognised)]
                )  # fmt: skip
    show(TITLE, columns, rows)
    if not options.no_record:
        note = (
            f"{options.minutes:g} minutes of training each"
            f"{', both at once' * options.parallel}, the first stage for {options.first:.0%} of "
            f"its; {options.samples} samples of the same seeds, timed with "
            f"{options.batch} at once. " + " ".join(f"![{p.stem}]({p.name})" for p in pictures)
        )
        record(TITLE, f"{note}\n\n{markdown(columns, rows)}")


if __name__ == "__main__":
    common.run(main)

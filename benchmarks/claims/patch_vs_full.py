"""Quality at equal time: `cifar10-small` on patches and on full images, same seed, same seconds.

    python -m benchmarks.claims.patch_vs_full --data cifar10.zip --minutes 20

Training stops for every evaluation, and only training time counts. Both arms have the same network,
seed and batch of full images (patches of half the side come twice as many at a time, and so on) and
train with a constant learning rate, because the number of images that fit into the time is not
known before, and without compilation, whose time would count against the arm with more sizes. The
average of the weights is over a twentieth of the images seen, so early evaluations mean something.
The Fréchet distance is that of `tessera eval`: features of a classifier trained on the same images;
it is no FID, and with few samples it is only to be compared between the arms.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.claims import common
from benchmarks.harness import device, markdown, record, show
from tessera.comparing.timed import averaged, train_by_time
from tessera.metrics.reference import open_reference, save_reference

ARMS = {"full": "cifar10-small", "patch": "cifar10-small-patch"}
LABELS = {"full": "full images", "patch": "patches, p = 0.5"}
TITLE = "Patch Diffusion: quality at equal time"


def train(arm: str, options: argparse.Namespace, folder: Path) -> None:
    """Train one arm for its time; a line of JSON on standard output for each evaluation."""
    from tessera.training.trainer import Trainer

    trainer = Trainer(common.timed_recipe(ARMS[arm], options), folder / arm)
    reference = open_reference(folder / "reference.npz", device=device())
    limit, done = options.minutes * 60, 0
    for seconds in train_by_time(trainer, limit):
        if seconds * options.evaluations < limit * (done + 1):
            continue
        done = int(seconds * options.evaluations / limit)
        result = common.scored(averaged(trainer), reference, options, steps=options.steps).known
        line = {
            "arm": arm, "seconds": round(seconds, 1), "images": trainer.images_seen,
            "step": trainer.step, "distance": result.fd_classifier,
            "recognised": result.recognised,
        }  # fmt: skip
        print(json.dumps(line), flush=True)


def main() -> None:
    """Train both arms, print and keep the table, and draw the picture."""
    parser = common.parser_for("patch_vs_full", __doc__)
    parser.add_argument("--minutes", type=float, default=20, help="training time of each arm")
    parser.add_argument("--evaluations", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="sampler steps, both arms")
    common.add_arm_options(parser, [*ARMS])
    parser.set_defaults(samples=500)
    options = parser.parse_args()
    if options.arm is not None:
        train(options.arm, options, options.folder)
        return

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        real = open_reference(options.reference or options.data, device=device())
        save_reference(folder / "reference.npz", real)
        results, threads = common.run_arms("patch_vs_full", [*ARMS], options, folder)

    columns = ["arm", "seconds", "images", "steps", "Fréchet distance", "recognised"]
    rows = [
        [
            line["arm"], f"{line['seconds']:.0f}", f"{line['images']:,}", f"{line['step']:,}",
            f"{line['distance']:.3f}", common.percent(line["recognised"]),
        ]
        for line in results
    ]  # fmt: skip
    show(TITLE, columns, rows)
    picture = options.out / "patch_vs_full.png"
    curves = {
        LABELS[arm]: [(x["seconds"], x["distance"]) for x in results if x["arm"] == arm]
        for arm in ARMS
    }
    common.plot(picture, curves, "cifar10-small, same seed, same time", "seconds of training")
    if not options.no_record:
        note = (
            f"{options.samples} samples of {options.steps} steps, seed {options.seed}, {threads} "
            f"thread{'s' * (threads > 1)} an arm; evaluation does not count as training. "
            f"![picture]({picture.name})"
        )
        record(TITLE, f"{note}\n\n{markdown(columns, rows)}")


if __name__ == "__main__":
    common.run(main)

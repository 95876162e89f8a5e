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
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, device, markdown, record, show, synchronize

ARMS = {"full": "cifar10-small", "patch": "cifar10-small-patch"}
TITLE = "Patch Diffusion: quality at equal time"
PICTURE = RESULTS.parent / "patch_vs_full.png"


def train(arm: str, options: argparse.Namespace, folder: Path) -> None:
    """Train one arm for its time; a line of JSON on standard output for each evaluation."""
    import torch

    from tessera.metrics.reference import load_reference
    from tessera.metrics.score import score
    from tessera.recipes.loading import load_recipe
    from tessera.training.preview import ema_pipeline
    from tessera.training.trainer import Trainer

    never = 10**12
    recipe = load_recipe(
        ARMS[arm],
        [
            f"data.path={options.data}", f"training.seed={options.seed}",
            f"training.images={never}", "training.compile=false", "optimizer.decay=constant",
            "run.preview=null", "run.tensorboard=false", f"run.log_every_images={never}",
            f"run.checkpoint_every_images={never}", *options.overrides,
        ],
    )  # fmt: skip
    reference = load_reference(options.reference or folder / "reference.npz", device())
    trainer = Trainer(recipe, folder / arm)
    due = [options.minutes * 60 * (k + 1) / options.evaluations for k in range(options.evaluations)]
    seconds, images = 0.0, 0
    with contextlib.closing(trainer.steps()) as steps:
        while due:
            begin = time.perf_counter()
            images = next(steps).images
            synchronize()
            seconds += time.perf_counter() - begin
            if seconds < due[0]:
                continue
            due = [later for later in due if later > seconds]
            pipe = ema_pipeline(recipe, trainer.learner, images, None)
            assert pipe is not None
            batches = pipe.to(device()).sample_batches(
                range(options.samples), "balanced", batch=options.batch, steps=options.steps,
                precision="bf16",
            )  # fmt: skip
            result = score(
                (
                    (torch.from_numpy(b.images).permute(0, 3, 1, 2), torch.from_numpy(b.labels))
                    for b in batches
                ),
                reference,
            )
            line = {
                "arm": arm, "seconds": round(seconds, 1), "images": images,
                "step": trainer.step, "distance": result.fd_classifier,
                "recognised": result.recognised,
            }  # fmt: skip
            print(json.dumps(line), flush=True)


def start(arm: str, threads: int, folder: Path) -> subprocess.Popen[str]:
    """This program again, as one arm."""
    module = ["-m", "benchmarks.claims.patch_vs_full", *sys.argv[1:]]
    return subprocess.Popen(
        [sys.executable, *module, "--arm", arm, "--folder", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
    )


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Distance against seconds of training, both arms."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for arm, label in (("full", "full images"), ("patch", "patches, p = 0.5")):
        points = [line for line in results if line["arm"] == arm]
        axes.plot(
            [p["seconds"] for p in points], [p["distance"] for p in points], "o-", label=label
        )
    axes.set(xlabel="seconds of training", ylabel="Fréchet distance (classifier)", yscale="log")
    axes.set_title("cifar10-small, same seed, same time")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train both arms, print and keep the table, and draw the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.patch_vs_full")
    parser.add_argument("--data", required=True, help="CIFAR-10, as tessera reads it")
    parser.add_argument(
        "--reference", type=Path, help="made by `tessera eval reference`; by default made anew"
    )
    parser.add_argument("--minutes", type=float, default=20, help="training time of each arm")
    parser.add_argument("--evaluations", type=int, default=4)
    parser.add_argument("--samples", type=int, default=500, help="images of each evaluation")
    parser.add_argument("--steps", type=int, default=8, help="sampler steps, both arms")
    parser.add_argument("--batch", type=int, default=250, help="images sampled at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", action="store_true", help="both at once, half the threads")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of both recipes")
    options = parser.parse_args()
    if options.arm is not None:
        train(options.arm, options, options.folder)
        return

    from tessera.metrics.images import open_images
    from tessera.metrics.reference import build_reference, save_reference

    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.reference is None:
            reference = build_reference(open_images(Path(options.data)), device=device())
            save_reference(folder / "reference.npz", reference)
        threads = max(1, options.threads // 2) if options.parallel else options.threads
        running: list[subprocess.Popen[str]] = []
        for arm in ARMS:
            running.append(start(arm, threads, folder))
            if not options.parallel:
                results += _finish(running.pop())
        for process in running:
            results += _finish(process)

    columns = ["arm", "seconds", "images", "steps", "Fréchet distance", "recognised"]
    rows = [
        [
            line["arm"], f"{line['seconds']:.0f}", f"{line['images']:,}", f"{line['step']:,}",
            f"{line['distance']:.3f}", f"{line['recognised']:.1%}",
        ]
        for line in results
    ]  # fmt: skip
    show(TITLE, columns, rows)
    if not options.no_record:
        plot(results, PICTURE)
        note = (
            f"{options.samples} samples of {options.steps} steps, seed {options.seed}, {threads} "
            f"threads an arm; evaluation does not count as training. ![picture]({PICTURE.name})"
        )
        record(TITLE, f"{note}\n\n{markdown(columns, rows)}")


def _finish(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


if __name__ == "__main__":
    main()

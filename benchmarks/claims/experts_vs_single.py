"""Quality at equal time: one `cifar10-small-pdm` against a pair of experts that share its minutes.

    python -m benchmarks.claims.experts_vs_single --data cifar10.zip --minutes 25

The single model trains for all of the time, each expert for half of it. The noisy expert begins
with the weights of the finished clean one, as in the published pair, or anew with --scratch. Only
training time counts. The Fréchet distance is that of `tessera eval`: features of a classifier
trained on the same images; it is no FID.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.claims import common
from benchmarks.harness import device, markdown, record, show
from tessera.metrics.reference import open_reference
from tessera.pipelines.base import Pipeline
from tessera.pipelines.experts import assemble

RECIPE = "cifar10-small-pdm"
TITLE = "PDM: a pair of experts at equal time"


def single(options: argparse.Namespace, folder: Path) -> tuple[Pipeline, int]:
    """One model for all noise levels, and its steps."""
    recipe = common.timed_recipe(RECIPE, options)
    pipe, trainer = common.trained(recipe, folder / "single", options.minutes)
    return pipe, trainer.step


def pair(options: argparse.Namespace, folder: Path) -> tuple[Pipeline, int]:
    """Two experts, each trained for half of the time, and their steps together."""
    pipes: list[Pipeline] = []
    steps = 0
    for expert in range(2):
        overrides = [f"snr_splits={options.threshold}", f"expert={expert}"]
        if pipes and not options.scratch:
            overrides.append(f"training.initial_weights={folder / 'clean'}")
        recipe = common.timed_recipe(RECIPE, options, *overrides)
        run = folder / f"expert-{expert}"
        pipe, trainer = common.trained(recipe, run, options.minutes / 2)
        if not pipes:
            pipe.save(folder / "clean")
        pipes.append(pipe)
        steps += trainer.step
    return assemble(pipes), steps


def main() -> None:
    """Train, sample and score both, print and keep the table, and write the grids."""
    parser = common.parser_for("experts_vs_single", __doc__)
    parser.add_argument("--minutes", type=float, default=25, help="training time of each side")
    parser.add_argument("--threshold", type=float, default=0.25, help="SNR between the experts")
    parser.add_argument("--scratch", action="store_true", help="the noisy expert begins anew")
    parser.add_argument("--sampler", choices=["edm", "ddpm", "ddim"], default="edm")
    parser.add_argument("--steps", default="18", help="of the sampler")
    parser.add_argument("--guidance", type=float, default=1.0)
    options = parser.parse_args()
    sampling: dict[str, Any] = {"sampler": options.sampler, "steps": options.steps}

    reference = open_reference(options.reference or options.data, device=device())
    columns = ["model", "minutes", "images", "steps", "Fréchet distance", "recognised"]
    rows, pictures = [], []
    for name, train in (("single", single), ("experts", pair)):
        with tempfile.TemporaryDirectory() as folder:
            pipe, steps = train(options, Path(folder))
        result = common.scored(pipe, reference, options, guidance=options.guidance, **sampling)
        pictures.append(options.out / f"experts_vs_single-{name}.png")
        common.save_grid(pictures[-1], result.first)
        rows.append(
            [name, f"{options.minutes:g}", f"{pipe.images_seen:,}", f"{steps:,}",
             f"{result.known.fd_classifier:.3f}", common.percent(result.known.recognised)]
        )  # fmt: skip
    show(TITLE, columns, rows)
    if not options.no_record:
        beginning = "begins anew" if options.scratch else "begins with the clean one's weights"
        note = (
            f"{options.samples} samples of the same seeds, {options.sampler} with {options.steps} "
            f"steps, guidance {options.guidance:g}; experts meet at an SNR of "
            f"{options.threshold:g}, the noisy one {beginning}. "
            + " ".join(f"![{p.stem}]({p.name})" for p in pictures)
        )
        record(TITLE, f"{note}\n\n{markdown(columns, rows)}")


if __name__ == "__main__":
    common.run(main)

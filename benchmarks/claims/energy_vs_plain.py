"""Quality at equal time: `cifar10-small-dit` against `cifar10-small-energy`, the same as an energy.

    python -m benchmarks.claims.energy_vs_plain --data cifar10.zip --minutes 20 --parallel

Only training time counts. The energy is sampled without and with MCMC, at about the same number of
evaluations; one of an energy's gradient costs two of a plain network's, and one of the energy
alone, which rejection needs, one. The Fréchet distance is that of `tessera eval`: features of a
classifier trained on the same images; it is no FID.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.claims import common

ARMS = {"dit": "cifar10-small-dit", "energy": "cifar10-small-energy"}
TITLE = "Energy diffusion: a transformer and its energy at equal time"
MCMC = {"refine.kind": "mcmc"}
SAMPLING: dict[str, list[dict[str, Any]]] = {
    "dit": [{"steps": 18}],
    "energy": [
        {"steps": 18},
        {"steps": 9, **MCMC, "refine.steps": 1},
        {"steps": 7, **MCMC, "refine.steps": 2},
    ],
}


def train(options: argparse.Namespace, folder: Path) -> None:
    """Train one arm and save its pipeline, then the number of images that it has seen."""
    recipe = common.timed_recipe(ARMS[options.arm], options)
    pipe, trainer = common.trained(recipe, folder / f"run-{options.arm}", options.minutes)
    common.keep_arm(folder, options.arm, pipe, [trainer.images_seen])


def main() -> None:
    """Train, sample and score both, print and keep the table, and write the grids."""
    parser = common.parser_for("energy_vs_plain", __doc__)
    parser.add_argument("--minutes", type=float, default=20, help="training time of each arm")
    parser.add_argument("--guidance", type=float, default=1.0)
    common.add_arm_options(parser, [*ARMS])
    options = parser.parse_args()
    if options.arm is not None:
        train(options, options.folder)
        return
    note = f"{options.minutes:g} minutes of training each, guidance {options.guidance:g}"
    with common.kept_arms("energy_vs_plain", [*ARMS], options) as kept:
        cases = [
            common.Case(
                arm, f"{arm}, {_words(sampling)}", {**sampling, "guidance": options.guidance}
            )
            for arm in ARMS
            for sampling in SAMPLING[arm]
        ]
        common.score_arms("energy_vs_plain", TITLE, note, cases, kept, options)


def _words(sampling: dict[str, Any]) -> str:
    mcmc = f" + {sampling['refine.steps']} of descent each" if "refine.kind" in sampling else ""
    return f"{sampling['steps']} steps{mcmc}"


if __name__ == "__main__":
    common.run(main)

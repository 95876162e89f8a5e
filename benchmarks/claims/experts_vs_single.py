"""Quality at equal time: one `cifar10-small-pdm` against a pair of experts that share its minutes.

    python -m benchmarks.claims.experts_vs_single --data cifar10.zip --minutes 25

The single model trains for all of the time, each expert for half of it. The noisy expert begins
with the weights of the finished clean one, as in the published pair, or anew with --scratch. With
--branch 0.6, the pair is one model for 0.6 of the time, with whose weights both begin then, and
each has as much of the rest as the objective draws noise levels of it. Only training time counts.
The Fréchet distance is that of `tessera eval`: features of a classifier
trained on the same images; it is no FID.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.claims import common
from tessera.comparing.arms import Arm, Stage, Way
from tessera.diffusion.objectives import DenoisingObjective
from tessera.recipes.build import recipe_objective
from tessera.recipes.loading import load_recipe

TITLE = "PDM: a pair of experts at equal time"


def main() -> None:
    """Train, sample and score both, print and keep the table, and write the grids."""
    parser = common.parser_for("experts_vs_single", __doc__, minutes=25)
    parser.add_argument("--threshold", type=float, default=0.25, help="SNR between the experts")
    parser.add_argument("--scratch", action="store_true", help="the noisy expert begins anew")
    parser.add_argument("--branch", type=float, default=0, help="share of the time as one model")
    parser.add_argument("--recipe", default="cifar10-small-pdm")
    parser.add_argument("--sampler", choices=["edm", "ddpm", "ddim"], default="edm")
    parser.add_argument("--steps", type=int, default=18, help="of the sampler")
    parser.add_argument("--guidance", type=float, default=1.0)
    options = parser.parse_args()
    changes, split = common.changes(options), f"snr_splits={options.threshold}"
    way = Way("", {name: getattr(options, name) for name in ("sampler", "steps", "guidance")})
    stages = _stages(options.recipe, split, options)
    arms = [
        Arm("single", options.recipe, changes, (way,)),
        Arm("experts", changes=changes, ways=(way,), stages=stages, join="experts"),
    ]
    made = common.compared(arms, options)
    beginning = "the noisy one begins with the clean one's weights"
    if options.branch:
        beginning = f"one model for {options.branch:.0%} of the time"
    elif options.scratch:
        beginning = "the noisy one begins anew"
    note = (
        f"{options.recipe}, {options.sampler} with {options.steps} steps, guidance "
        f"{options.guidance:g}; experts meet at an SNR of {options.threshold:g}, {beginning}."
    )
    common.keep("experts_vs_single", TITLE, note, made, options)


def _stages(recipe: str, split: str, options: argparse.Namespace) -> tuple[Stage, ...]:
    """The trainings of the pair."""
    own = [(split, "expert=0"), (split, "expert=1")]
    if not options.branch:
        second = None if options.scratch else 0
        return Stage(recipe, own[0], 0.5), Stage(recipe, own[1], 0.5, begins_as=second)
    clean = _clean_share(recipe, options) * (1 - options.branch)
    shares = (clean, 1 - options.branch - clean)
    # What was learned needs no slow start again.
    experts = (
        Stage(recipe, (*changes, "optimizer.rampup_images=500"), share, begins_as=0)
        for changes, share in zip(own, shares, strict=True)
    )
    return Stage(recipe, share=options.branch, joined=False), *experts


def _clean_share(recipe: str, options: argparse.Namespace) -> float:
    """Of the noise levels that training draws, those of the clean expert."""
    objective = recipe_objective(load_recipe(recipe, common.changes(options)))
    assert isinstance(objective, DenoisingObjective)
    return float(objective.share_below(torch.tensor(options.threshold**-0.5)))


if __name__ == "__main__":
    common.run(main)

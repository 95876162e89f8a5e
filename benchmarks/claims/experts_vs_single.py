"""Quality at equal time: one `cifar10-small-pdm` against a pair of experts that share its minutes.

    python -m benchmarks.claims.experts_vs_single --data cifar10.zip --minutes 25

The single model trains for all of the time, each expert for half of it. The noisy expert begins
with the weights of the finished clean one, as in the published pair, or anew with --scratch. Only
training time counts. The Fréchet distance is that of `tessera eval`: features of a classifier
trained on the same images; it is no FID.
"""

from __future__ import annotations

from benchmarks.claims import common
from tessera.comparing.arms import Arm, Stage, Way

RECIPE = "cifar10-small-pdm"
TITLE = "PDM: a pair of experts at equal time"


def main() -> None:
    """Train, sample and score both, print and keep the table, and write the grids."""
    parser = common.parser_for("experts_vs_single", __doc__, minutes=25)
    parser.add_argument("--threshold", type=float, default=0.25, help="SNR between the experts")
    parser.add_argument("--scratch", action="store_true", help="the noisy expert begins anew")
    parser.add_argument("--sampler", choices=["edm", "ddpm", "ddim"], default="edm")
    parser.add_argument("--steps", type=int, default=18, help="of the sampler")
    parser.add_argument("--guidance", type=float, default=1.0)
    options = parser.parse_args()
    changes, split = common.changes(options), f"snr_splits={options.threshold}"
    way = Way("", {name: getattr(options, name) for name in ("sampler", "steps", "guidance")})
    stages = (
        Stage(RECIPE, (split, "expert=0"), 0.5),
        Stage(RECIPE, (split, "expert=1"), 0.5, goes_on=not options.scratch),
    )
    arms = [
        Arm("single", RECIPE, changes, (way,)),
        Arm("experts", changes=changes, ways=(way,), stages=stages, join="experts"),
    ]
    made = common.compared(arms, options)
    beginning = "begins anew" if options.scratch else "begins with the clean one's weights"
    note = (
        f"{options.sampler} with {options.steps} steps, guidance {options.guidance:g}; experts "
        f"meet at an SNR of {options.threshold:g}, the noisy one {beginning}."
    )
    common.keep("experts_vs_single", TITLE, note, made, options)


if __name__ == "__main__":
    common.run(main)

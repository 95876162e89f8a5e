"""Quality at equal time: `cifar10-small` against the two small stages of a relay in its minutes.

    python -m benchmarks.claims.relay_vs_single --data cifar10.zip --minutes 30 --parallel

The first stage (8x8) trains for a share of the minutes, the second (8x8 to 32x32) for the rest;
only training time counts. Both sides sample with their own defaults, which cost nearly the same
number of FLOPs; the table says how many, and how long an image takes. The Fréchet distance is that
of `tessera eval`: features of a classifier trained on the same images; it is no FID.
"""

from __future__ import annotations

from benchmarks.claims import common
from tessera.comparing.arms import Arm, Stage, Way

STAGES = {"first": "cifar10-small-relay-first", "second": "cifar10-small-relay-second"}
TITLE = "Relay diffusion: two stages against one at equal time"


def main() -> None:
    """Train, sample and score both, print and keep the table, and write the grids."""
    parser = common.parser_for("relay_vs_single", __doc__, minutes=30)
    parser.add_argument("--first", type=float, default=1 / 3, help="share of the first stage")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    options = parser.parse_args()
    changes = common.changes(options)
    shares = {"first": options.first, "second": 1 - options.first}
    one = [Way(f"guidance {g:g}", {"guidance": g}) for g in options.guidance]
    both = [
        Way(f"guidance {g:g}", {f"{stage}.guidance": g for stage in STAGES})
        for g in options.guidance
    ]
    stages = tuple(Stage(recipe, share=shares[name]) for name, recipe in STAGES.items())
    arms = [
        Arm("single", "cifar10-small", changes, tuple(one)),
        Arm("relay", changes=changes, ways=tuple(both), stages=stages, join="relay"),
    ]
    made = common.compared(arms, options)
    note = f"The first stage has {options.first:.0%} of the relay's time."
    common.keep("relay_vs_single", TITLE, note, made, options)


if __name__ == "__main__":
    common.run(main)

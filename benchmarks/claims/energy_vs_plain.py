"""Quality at equal time: `cifar10-small-dit` against `cifar10-small-energy`, the same as an energy.

    python -m benchmarks.claims.energy_vs_plain --data cifar10.zip --minutes 20 --parallel

Only training time counts. The energy is sampled without and with MCMC, at about the same number of
evaluations; one of an energy's gradient costs two of a plain network's, and one of the energy
alone, which rejection needs, one. The Fréchet distance is that of `tessera eval`: features of a
classifier trained on the same images; it is no FID.
"""

from __future__ import annotations

from typing import Any

from benchmarks.claims import common
from tessera.comparing.arms import Arm, Way

TITLE = "Energy diffusion: a transformer and its energy at equal time"


def way(guidance: float, steps: int, descent: int = 0) -> Way:
    """Samples of so many steps, with so many of descent on the energy after each."""
    options: dict[str, Any] = {"steps": steps, "guidance": guidance}
    if descent:
        options |= {"refine.kind": "mcmc", "refine.steps": descent}
    return Way(f"{steps} steps" + f" + {descent} of descent each" * bool(descent), options)


def main() -> None:
    """Train, sample and score both, print and keep the table, and write the grids."""
    parser = common.parser_for("energy_vs_plain", __doc__)
    parser.add_argument("--guidance", type=float, default=1.0)
    options = parser.parse_args()
    changes, plain = common.changes(options), way(options.guidance, 18)
    refined = way(options.guidance, 9, 1), way(options.guidance, 7, 2)
    arms = [
        Arm("dit", "cifar10-small-dit", changes, (plain,)),
        Arm("energy", "cifar10-small-energy", changes, (plain, *refined)),
    ]
    made = common.compared(arms, options)
    common.keep("energy_vs_plain", TITLE, f"Guidance {options.guidance:g}.", made, options)


if __name__ == "__main__":
    common.run(main)

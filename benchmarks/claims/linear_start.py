"""Quality at equal time: whole images, views by noise level, and a start from the linear denoiser.

    python -m benchmarks.claims.linear_start --data cifar10.zip --minutes 10 --parallel

All arms have the narrow network of `cifar10-small`, so that it takes steps enough in minutes, and
the same seed. The second sees means of 2x2 pixels at noise levels above 1.5; in the third the best
linear denoiser of the images is measured before the first step; the fourth does both. Only training
time counts. The Fréchet distance is that of `tessera eval`: features of a classifier trained on the
same images; it is no FID.
"""

from __future__ import annotations

from benchmarks.claims import common
from tessera.comparing.arms import Arm, Way

TITLE = "Views by noise level, and a linear start: quality at equal time"
_NARROW = ("network.model_channels=16", "optimizer.lr=2e-3")
_LINEAR = ("preconditioning.kind=linear",)
_BANDS = ("view.kind=bands", "view.bands=[{below: 1.5, share: 0.75}, {factor: 2, share: 0.25}]")


def main() -> None:
    """Train the arms, print and keep the table, and draw the picture."""
    parser = common.parser_for("linear_start", __doc__, minutes=10, samples=1000)
    parser.add_argument("--evaluations", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="sampler steps, all arms")
    options = parser.parse_args()
    changes, ways = (*_NARROW, *common.changes(options)), (Way("", {"steps": options.steps}),)
    arms = [
        Arm("whole images", "cifar10-small", changes, ways),
        Arm("means above 1.5", "cifar10-small", (*_BANDS, *changes), ways),
        Arm("linear start", "cifar10-small", (*_LINEAR, *changes), ways),
        Arm("both", "cifar10-small", (*_LINEAR, *_BANDS, *changes), ways),
    ]
    made = common.compared(arms, options, points=options.evaluations)
    picture = options.out / "linear_start.png"
    curves = {
        result.name: [(p.minutes, p.distance) for p in result.points if p.distance is not None]
        for result in made.results
    }
    common.plot(
        picture, curves, "cifar10-small, narrow, same seed, same time", "minutes of training"
    )
    note = f"Sampled in {options.steps} steps. ![picture]({picture.name})"
    common.keep("linear_start", TITLE, note, made, options)


if __name__ == "__main__":
    common.run(main)

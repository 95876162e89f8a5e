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

from benchmarks.claims import common
from tessera.comparing.arms import Arm, Way

TITLE = "Patch Diffusion: quality at equal time"


def main() -> None:
    """Train both arms, print and keep the table, and draw the picture."""
    parser = common.parser_for("patch_vs_full", __doc__, samples=500)
    parser.add_argument("--evaluations", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="sampler steps, both arms")
    options = parser.parse_args()
    changes, ways = common.changes(options), (Way("", {"steps": options.steps}),)
    arms = [
        Arm("full images", "cifar10-small", changes, ways),
        Arm("patches, p = 0.5", "cifar10-small-patch", changes, ways),
    ]
    made = common.compared(arms, options, points=options.evaluations)
    picture = options.out / "patch_vs_full.png"
    curves = {
        result.name: [(p.minutes, p.distance) for p in result.points if p.distance is not None]
        for result in made.results
    }
    title = "cifar10-small, same seed, same time"
    common.plot(picture, curves, title, "minutes of training")
    note = f"Sampled in {options.steps} steps. ![picture]({picture.name})"
    common.keep("patch_vs_full", TITLE, note, made, options)


if __name__ == "__main__":
    common.run(main)

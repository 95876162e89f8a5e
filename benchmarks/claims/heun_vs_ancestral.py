"""One discrete model, three samplers: score against evaluations of the network.

    python -m benchmarks.claims.heun_vs_ancestral --data cifar10.zip --pipeline runs/pdm
    python -m benchmarks.claims.heun_vs_ancestral --data cifar10.zip --minutes 20

Without a pipeline, `cifar10-small-pdm` is trained first, for so many minutes. All samplers make the
same seeds and classes with the same weights. The Fréchet distance is that of `tessera eval`:
features of a classifier trained on the same images; it is no FID.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.claims import common
from tessera.comparing.arms import Arm, Way
from tessera.comparing.compare import ArmResult

TITLE = "PDM: Heun's method on a discrete model"
SAMPLERS = {"ddpm": "DDPM, ancestral", "ddim": "DDIM", "edm": "Heun (EDM)"}
DEFAULTS = {"ddpm": "25,50,100,250", "ddim": "10,25,50,100", "edm": "5,9,18"}


def verdict(ancestral: Sequence[ArmResult], heun: Sequence[ArmResult]) -> str:
    """With how many evaluations Heun's method does as well as the best ancestral run."""
    if not ancestral or not heun:
        return ""
    goal = min(ancestral, key=distance)
    reached = [result for result in heun if distance(result) <= distance(goal)]
    told = f"The best ancestral score is {distance(goal):.3f}, in {goal.evaluations:g} evaluations."
    if not reached:
        return f"{told} Heun's method does not reach it."
    first = min(reached, key=lambda result: result.evaluations)
    fewer = goal.evaluations / first.evaluations
    return (
        f"{told} Heun's method has {distance(first):.3f} in {first.evaluations:g}, {fewer:.1f} "
        "times fewer."
    )


def distance(result: ArmResult) -> float:
    """That of a result which was scored."""
    assert result.distance is not None
    return result.distance


def numbers(text: str) -> list[int]:
    """`25,50` as a list."""
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    """Measure, print and keep the table, and draw the picture."""
    parser = common.parser_for("heun_vs_ancestral", __doc__)
    parser.add_argument("--pipeline", help="a trained discrete model: run or pipeline folder")
    parser.add_argument("--guidance", type=float, default=1.0)
    for sampler, default in DEFAULTS.items():
        parser.add_argument(f"--{sampler}", type=numbers, default=default, help="steps, like 5,9")
    options = parser.parse_args()
    steps = {sampler: getattr(options, sampler) for sampler in SAMPLERS}
    ways = [
        Way(f"{name}, {n} steps", {"sampler": s, "steps": n, "guidance": options.guidance})
        for s, name in SAMPLERS.items()
        for n in steps[s]
    ]
    arm = Arm("pdm", "cifar10-small-pdm", common.changes(options), tuple(ways))
    if options.pipeline is not None:
        arm = replace(arm, source=options.pipeline, changes=())
    made = common.compared([arm], options)
    rows = iter(made.results)
    found = {sampler: [next(rows) for _ in steps[sampler]] for sampler in SAMPLERS}
    said = verdict(found["ddpm"], found["edm"])
    print(said)
    picture = options.out / "heun_vs_ancestral.png"
    curves = {SAMPLERS[s]: [(r.evaluations, distance(r)) for r in found[s]] for s in SAMPLERS}
    title = f"{made.results[0].images:,} images, the same weights"
    common.plot(picture, curves, title, "evaluations of the network for an image", "log")
    note = f"Guidance {options.guidance:g}. {said} ![picture]({picture.name})"
    common.keep("heun_vs_ancestral", TITLE, note, made, options)


if __name__ == "__main__":
    common.run(main)

"""The quickstart's report: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tessera.commands import tessera_command
from tessera.progress import duration
from tessera.quickstart.run import GUIDANCE, Frame, QuickstartResult
from tessera.reports import charts, page

_SHOWN = 10  # digits of each class, real and made
_STRIP = 3  # images whose denoising is shown


def render(result: QuickstartResult) -> str:
    """The report as HTML, with its pictures inside."""
    recipe, total = result.recipe, sum(result.seconds.values())
    return page.document(
        f"tessera quickstart: {recipe.name}",
        [
            _headline(result, total),
            page.section("Real and made", _comparison(result), _comparison_note(result)),
            page.section("From noise to digit", _strip(result.frames), _strip_note(result)),
            page.section("Training", charts.line(result.losses), _training_note(result)),
            page.section("How far from real", charts.scale(_marks(result)), _score_note(result)),
            page.section("What it took", _facts(result)),
            page.section("Go on", _commands(result)),
        ],
    )


def _headline(result: QuickstartResult, total: float) -> str:
    facts, score = result.reference.extractor.facts, result.score
    tiles = [
        ("good", f"{result.recognised:.1%}", f"of {score.n:,} samples recognised as their class"),
        (
            "",
            f"{facts.accuracy:.1%}",
            f"of {facts.held_out:,} held-out real digits recognised by the same classifier",
        ),
        ("", f"{score.fd_classifier:.3g}", f"Fréchet distance; real digits {result.floor:.3g}"),
        ("", duration(total), f"in all, on {result.device}"),
    ]
    return page.header(
        "Handwritten digits from noise",
        f"A diffusion model of {result.parameters / 1e6:.2f} million parameters, trained from "
        f"scratch in {duration(result.seconds['training'])}.",
        tiles,
    )


# ------------------------------------------------------------------------------------- pictures


def _comparison(result: QuickstartResult) -> str:
    """Rows of real digits beside rows of samples, one row per class."""
    labels = result.dataset.labels
    assert labels is not None
    real, made = [], []
    for digit in range(result.recipe.data.num_classes):
        indices = np.flatnonzero(labels == digit)[:_SHOWN]
        real.append(_row(digit, result.dataset.read(indices).transpose(0, 2, 3, 1), "real"))
        chosen = np.flatnonzero(result.labels == digit)[:_SHOWN]
        right = result.predicted[chosen] == digit
        made.append(_row(digit, result.samples[chosen], "made", right))
    return page.pair(
        page.figure("real digits", "".join(real)), page.figure("samples", "".join(made))
    )


def _row(
    digit: int, images: NDArray[np.uint8], what: str, right: Sequence[bool] | NDArray[np.bool_] = ()
) -> str:
    flags = list(right) or [True] * len(images)
    cells = (
        page.image(image, f"{what} {digit}", "" if ok else "wrong")
        for image, ok in zip(images, flags, strict=True)
    )
    return page.row(str(digit), cells)


def _strip(frames: Sequence[Frame]) -> str:
    """Noisy states above the network's estimates, from left to right."""
    rows = [page.row("σ", (f"<span>{frame.sigma:.2g}</span>" for frame in frames), "head")]
    for index in _spread(len(frames[0].noisy), _STRIP):
        for name in ("noisy", "denoised"):
            cells = (page.image(getattr(f, name)[index], f"{name} {index}") for f in frames)
            rows.append(page.row(name, cells, name))
    return page.figure("", "".join(rows), "strip")


def _spread(count: int, chosen: int) -> list[int]:
    """A few indices below `count`, spread over them."""
    return sorted({round(i) for i in np.linspace(min(2, count - 1), count - 1, chosen)})


# ---------------------------------------------------------------------------------- words, facts


def _comparison_note(result: QuickstartResult) -> str:
    wrong = int((result.predicted != result.labels).sum())
    to_real, among_real = result.nearest
    facts = result.reference.extractor.facts
    return (
        f"The first {_SHOWN} of each class, none picked. {wrong} of all {result.score.n:,} samples "
        "are taken for another class than they were asked to be (framed in red where shown); the "
        "judge is a small classifier trained on four fifths of the real digits, which is itself "
        f"wrong on {1 - facts.accuracy:.1%} of the rest. Are they copies? A sample is on average "
        f"{to_real:.0f} grey levels away from the closest real digit, a real digit "
        f"{among_real:.0f} from the closest other one."
    )


def _strip_note(result: QuickstartResult) -> str:
    options = result.recipe.sampling
    return (
        f"Each sample begins as noise of σ = {getattr(options, 'sigma_max', None) or 80:g} and is "
        f"made in {len(result.frames)} steps. Above the state after a step, below what the network "
        "took the digit to be."
    )


def _training_note(result: QuickstartResult) -> str:
    count = len(result.dataset)
    return (
        f"{result.images_seen:,} images seen, {count:,} different ones about "
        f"{result.images_seen / count:.0f} times, "
        f"{result.images_seen / result.seconds['training']:.0f} per second. The weighted error per "
        "pixel stays far from zero, because noise cannot be guessed."
    )


def _marks(result: QuickstartResult) -> list[charts.Mark]:
    return [
        charts.Mark("real digits, another half", result.floor, "floor"),
        charts.Mark("samples", result.score.fd_classifier, "samples"),
        charts.Mark("untrained network", result.ceiling, "ceiling"),
    ]


def _score_note(result: QuickstartResult) -> str:
    score = result.score
    return (
        f"Fréchet distance of {score.dim} features of the classifier, against one half of the real "
        f"digits ({score.n_reference:,}); smaller is closer. It compares models on these digits "
        "and is not FID."
    )


def _facts(result: QuickstartResult) -> str:
    recipe = result.recipe
    training, sampler = recipe.training, recipe.sampling
    channels, height, width = result.dataset.shape
    rows = [
        ("data", f"{len(result.dataset):,} handwritten digits, enlarged to {width} x {height}, "
                 f"{channels} channel, 10 classes"),
        ("network", f"{recipe.network.kind}, {result.parameters:,} parameters"),
        ("training", f"{training.images:,} images in batches of {training.batch}, "
                     f"{training.precision}, learning rate "
                     f"{recipe.optimizer.for_batch(training.batch).lr:g}"),
        ("sampling", f"{sampler.kind}, {dict(sampler).get('steps')} steps, guidance {GUIDANCE:g}, "
                     "weights averaged with half-life "
                     f"{recipe.ema[0].halflife_images:,.0f} images"),
        ("seed", str(training.seed)),
        *((f"time: {part}", duration(value)) for part, value in result.seconds.items()),
    ]  # fmt: skip
    return page.facts(rows)


def _commands(result: QuickstartResult) -> str:
    command, out = tessera_command(), result.out
    twice = 2 * result.recipe.training.images
    sample = f"{command} sample {out}/run --guidance {GUIDANCE:g}"
    lines = [
        ("Make sevens", f"{sample} --class 7 --seeds 0-63 --grid --out sevens"),
        (
            "Watch them appear",
            f"{sample} --seeds 0-15 --out digits.png --trajectory digits.gif",
        ),
        ("Score it without guidance", f"{command} eval score {out}/run {out}/digits.ref.npz"),
        (
            "Train it for twice as long",
            f"{command} train --resume {out}/run training.images={twice}",
        ),
        (
            "Your own images",
            f"{command} data convert photos/ photos.safetensors --resolution 32x32 "
            "--transform center-crop --format packed\n"
            f"{command} train cifar10-small data.path=photos.safetensors data.num_classes=0",
        ),
    ]
    return "".join(page.command(title, line) for title, line in lines)

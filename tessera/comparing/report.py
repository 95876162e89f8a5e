"""A comparison as a table and as a page."""

from __future__ import annotations

from collections.abc import Sequence

from tessera.comparing.compare import ArmResult, Comparison
from tessera.reports import charts, page

HEAD = (
    "model", "params", "minutes", "images", "evals", "GFLOP", "ms", "distance", "recognised",
)  # fmt: skip
_COLUMNS = 10


def table_rows(made: Comparison) -> list[list[str]]:
    """A row of text for each arm, as `HEAD` names its cells."""
    return [
        [
            result.name,
            f"{result.parameters / 1e6:.2f} M",
            "–" if result.minutes is None else f"{result.minutes:g}",
            f"{result.images:,}",
            f"{result.evaluations:g}",
            f"{result.gflops:.2f}",
            f"{result.ms:.1f}",
            "–" if result.distance is None else f"{result.distance:.3f}",
            "–" if result.recognised is None else f"{result.recognised:.1%}",
        ]
        for result in made.results
    ]


def in_sentences(made: Comparison) -> str:
    """What the figures are, in sentences."""
    settings = made.settings
    trained = [result for result in made.results if result.minutes is not None]
    texts = [f"{settings.samples:,} samples of the same seeds each, on {made.device}."]
    if trained:
        texts.insert(0, f"{settings.minutes:g} minutes of training each; scores do not count.")
    texts.append("Evaluations of networks, FLOPs and time are of one sample.")
    if made.accuracy is not None:
        texts.append(
            "Distances are Fréchet distances on the features of a classifier that is right on "
            f"{made.accuracy:.1%} of held-out real images; they are no FID, and fall with the "
            "number of samples."
        )
    return " ".join([*texts, *([made.note] if made.note else [])])


def comparison_page(made: Comparison) -> str:
    """The page, with all that it shows inside."""
    best = min(
        (r for r in made.results if r.distance is not None),
        key=lambda r: r.distance or 0.0,
        default=None,
    )
    tiles = [] if best is None else [("good", best.name, f"is nearest: {best.distance:.3f}")]
    parts = [
        page.header(
            f"{len(made.results)} models side by side",
            ", ".join(result.name for result in made.results),
            tiles,
        ),
        page.section("All figures", page.table(HEAD, table_rows(made)), in_sentences(made)),
    ]
    ways = [
        charts.Curve(r.name, [(p.minutes, p.distance) for p in r.points if p.distance is not None])
        for r in made.results
    ]
    if any(curve.points for curve in ways):
        chart = charts.curves(ways, "minutes of training", _spoken("distance", ways))
        parts.append(page.section("Distance over time", chart, "Lower is nearer to real images."))
    losses = [charts.Curve(r.name, r.losses) for r in made.results]
    if any(curve.points for curve in losses):
        chart = charts.curves(losses, "images seen", _spoken("loss", losses))
        note = (
            "As each was trained. Losses of different networks compare; of different objectives, "
            "noise levels or views they do not."
        )
        parts.append(page.section("Loss", chart, note))
    parts += [page.section(r.name, _grid(r), _source(r)) for r in made.results]
    return page.document("tessera compare", parts)


def _spoken(what: str, shown: Sequence[charts.Curve]) -> str:
    ends = (f"{c.name} {c.points[-1][1]:.3g}" for c in shown if c.points)
    return f"{what}, at the end: {', '.join(ends)}"


def _grid(result: ArmResult) -> str:
    return page.picture_rows(
        [
            page.image(picture, f"{result.name} {start + index}")
            for index, picture in enumerate(result.first[start : start + _COLUMNS])
        ]
        for start in range(0, min(len(result.first), 4 * _COLUMNS), _COLUMNS)
    )


def _source(result: ArmResult) -> str:
    return " ".join([result.source, *result.changes])

"""A comparison as a table and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import stdev
from typing import Any

from tessera.comparing.arms import Point
from tessera.comparing.compare import ArmResult, Comparison
from tessera.reports import charts, page

HEAD = (
    "model", "params", "minutes", "images", "evals", "GFLOP", "ms", "distance", "recognised",
)  # fmt: skip
POINT_HEAD = ("model", "minutes", "images", "distance", "recognised")
_COLUMNS = 10
_KINDS = "abcd"


def table_rows(made: Comparison) -> list[list[str]]:
    """A row of text for each arm and way, as `HEAD` names its cells; means over the seeds."""
    rows = []
    for row in made.rows:
        first = row[0]
        minutes = _mean([result.minutes for result in row])
        recognised = _mean([result.recognised for result in row])
        rows.append(
            [
                first.name,
                f"{first.parameters / 1e6:.2f} M",
                "–" if minutes is None else f"{minutes:.4g}",
                f"{_mean([result.images for result in row]):,.0f}",
                f"{first.evaluations:g}",
                f"{first.gflops:.2f}",
                f"{_mean([result.ms for result in row]):.1f}",
                _with_spread([result.distance for result in row]),
                "–" if recognised is None else f"{recognised:.1%}",
            ]
        )
    return rows


def point_rows(made: Comparison) -> list[list[str]]:
    """A row of text for each score on the way, as `POINT_HEAD` names its cells."""
    return [
        [
            name,
            f"{points[0].minutes:.3g}",
            f"{points[0].images:,}",
            _with_spread([point.distance for point in points]),
            "–" if points[0].recognised is None else f"{points[0].recognised:.1%}",
        ]
        for name, ways in _points(made)
        for points in ways
    ]


def _points(made: Comparison) -> list[tuple[str, list[list[Point]]]]:
    """For each arm that was trained, its points, each of all seeds."""
    found = []
    for row in made.rows:
        together = [list(points) for points in zip(*(r.points for r in row), strict=False)]
        if together:
            found.append((row[0].name, together))
    return found


def _mean(values: Sequence[float | None]) -> Any:
    """Of all values; None if one is not known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _with_spread(values: Sequence[float | None]) -> str:
    """A distance, or the mean of several and their standard deviation."""
    mean = _mean(values)
    if mean is None:
        return "–"
    known = [value for value in values if value is not None]
    return f"{mean:.3f}" + (f" ± {stdev(known):.3f}" if len(known) > 1 else "")


def in_sentences(made: Comparison) -> str:
    """What the figures are, in sentences."""
    settings = made.settings
    trained = [result for result in made.results if result.minutes is not None]
    texts = [f"{settings.samples:,} samples of the same seeds each, on {made.device}."]
    if trained:
        budget = f"{settings.minutes:g} minutes of training each; scores do not count."
        if settings.flops is not None:
            budget = f"{settings.flops / 1e12:g} TFLOP of training each, forward and backward."
        texts.insert(0, budget)
        if settings.trainings > 1:
            texts.insert(
                1, f"Means over {settings.trainings} trainings of other seeds, ± their deviation."
            )
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
    known = [(_mean([r.distance for r in row]), row[0].name) for row in made.rows]
    distances = [(value, name) for value, name in known if value is not None]
    tiles = []
    if distances:
        value, name = min(distances)
        tiles = [page.Tile(f"{value:.3f}", f"distance of {name}, the nearest", "good")]
    names = ", ".join(dict.fromkeys(result.arm for result in made.results))
    parts = [
        page.header(f"{len(made.rows)} models side by side", names, tiles),
        page.section("All figures", page.table(table_rows(made), HEAD), in_sentences(made)),
    ]
    ways = [
        (name, [(_mean([p.minutes for p in at]), _mean([p.distance for p in at])) for at in points])
        for name, points in _points(made)
        if all(p.distance is not None for at in points for p in at)
    ]
    if ways:
        chart = _lines(ways, "minutes of training", "distance")
        parts.append(page.section("Distance over time", chart, "Lower is nearer to real images."))
    losses = [(row[0].name, list(row[0].losses)) for row in made.rows if row[0].losses]
    if losses:
        note = (
            "As each was trained. Losses of different networks compare; of different objectives, "
            "noise levels or views they do not."
        )
        parts.append(page.section("Loss", _lines(losses, "images seen", "loss"), note))
    parts += [page.section(row[0].name, _grid(row[0]), _source(row[0])) for row in made.rows]
    return page.page("tessera compare", parts)


def _lines(
    ways: Sequence[tuple[str, Sequence[tuple[float, float]]]], across: str, what: str
) -> str:
    """A chart of several arms, and what its colours mean; they repeat after four."""
    kinds = [_KINDS[index % len(_KINDS)] for index in range(len(ways))]
    series = [
        charts.Series(name, points, kind) for (name, points), kind in zip(ways, kinds, strict=True)
    ]
    keys = [(name, kind) for (name, _), kind in zip(ways, kinds, strict=True)]
    return charts.lines(series, across=across, what=what) + page.legend(keys)


def _grid(result: ArmResult) -> str:
    pictures = [
        page.Picture(picture, f"{result.name} {index}")
        for index, picture in enumerate(result.first[: 4 * _COLUMNS])
    ]
    starts = range(0, len(pictures), _COLUMNS)
    return page.gallery([("", pictures[start : start + _COLUMNS]) for start in starts])


def _source(result: ArmResult) -> str:
    return " ".join([result.source, *result.changes])

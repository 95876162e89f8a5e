"""A comparison as a table and as a page."""

from __future__ import annotations

from collections.abc import Sequence

from tessera.comparing.compare import ArmResult, Comparison
from tessera.reports import charts, page

HEAD = (
    "model", "params", "minutes", "images", "evals", "GFLOP", "ms", "distance", "recognised",
)  # fmt: skip
_COLUMNS = 10
_KINDS = "abcd"


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
    tiles = []
    if best is not None:
        tiles = [page.Tile(f"{best.distance:.3f}", f"distance of {best.name}, the nearest", "good")]
    names = ", ".join(result.name for result in made.results)
    parts = [
        page.header(f"{len(made.results)} models side by side", names, tiles),
        page.section("All figures", page.table(table_rows(made), HEAD), in_sentences(made)),
    ]
    ways = [
        (r.name, [(p.minutes, p.distance) for p in r.points if p.distance is not None])
        for r in made.results
    ]
    if any(points for _, points in ways):
        chart = _lines(ways, "minutes of training", "distance")
        parts.append(page.section("Distance over time", chart, "Lower is nearer to real images."))
    losses = [(r.name, list(r.losses)) for r in made.results]
    if any(points for _, points in losses):
        note = (
            "As each was trained. Losses of different networks compare; of different objectives, "
            "noise levels or views they do not."
        )
        parts.append(page.section("Loss", _lines(losses, "images seen", "loss"), note))
    parts += [page.section(r.name, _grid(r), _source(r)) for r in made.results]
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

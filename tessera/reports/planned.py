"""What a set of images asks for, as a picture and as a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tessera.errors import DataError, require_extra
from tessera.files import atomic_file
from tessera.planning.proposal import DataProposal
from tessera.planning.study import DataStudy, Sight
from tessera.planning.text import HEAD, error_rows, looked_at
from tessera.reports import charts, page

ENDINGS = (".svg", ".html", ".png")
"""Of the files that `write_plot` writes."""

_LEAST, _MOST = 1e-3, 3.0  # shares of the error that are shown
_ACROSS, _WHAT = "noise level σ", "error beyond the full image's"
_LEGEND_ROW, _WIDTH, _HEIGHT = 24, 720, 300

# As in the style of pages.
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#667085}.grid{stroke:#e4e7ec}"
    ".curve{fill:none;stroke-width:2.5;stroke-linejoin:round}.mark{stroke:#c4372d;stroke-width:2;"
    "stroke-dasharray:5 4}.dashed{stroke-dasharray:6 5}.a{stroke:#2f6fdf}.b{stroke:#c8741a}"
    ".c{stroke:#1f9d6b}.d{stroke:#9a4fc0}circle.a{fill:#2f6fdf}circle.b{fill:#c8741a}"
    "circle.c{fill:#1f9d6b}circle.d{fill:#9a4fc0}"
)
_COLOURS = {"a": "#2f6fdf", "b": "#c8741a", "c": "#1f9d6b", "d": "#9a4fc0"}


def check_plot(path: Path) -> None:
    """Raise for a name that `write_plot` cannot write to.

    Raises:
        DataError: it has another ending than `ENDINGS`.
        TesseraError: a PNG, and matplotlib is not installed.
    """
    if path.suffix.lower() not in ENDINGS:
        raise DataError(f"{path}: a plot is a file {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    if path.suffix.lower() == ".png":
        require_extra("matplotlib", "benchmarks", "a plot as PNG (.svg and .html need nothing)")


def write_plot(path: Path, study: DataStudy, proposal: DataProposal, recipe: str) -> None:
    """Write the curves as SVG or PNG, or everything as a page.

    Args:
        path: its ending says what is written, see `ENDINGS`.
        recipe: the section for recipes, as text; shown by the page.

    Raises:
        TesseraError: as of `check_plot`.
    """
    check_plot(path)
    with atomic_file(path) as file:
        match path.suffix.lower():
            case ".svg":
                file.write(standalone(study, proposal).encode())
            case ".html":
                file.write(planned_page(study, proposal, recipe).encode())
            case _:
                _write_png(file, study, proposal)


def drawn_series(study: DataStudy, proposal: DataProposal) -> list[charts.Series]:
    """The curves that are drawn: of the largest crop, without a halo and with one, and coarse."""
    crops = [sight for sight in study.curves if sight.crop is not None]
    largest = max((sight.crop or 0 for sight in crops), default=0)
    haloed = [sight for sight in crops if sight.crop == largest and sight.halo]
    planned = [sight for sight in haloed if sight.halo == proposal.bands[0].halo]
    chosen: list[tuple[Sight, str]] = []
    if largest:
        chosen.append((Sight(crop=largest), "a"))
    chosen += [(sight, "b") for sight in (planned or haloed[-1:])]
    kinds = ("c", "d", "c dashed", "d dashed")
    coarse = [sight for sight in study.curves if sight.crop is None]
    chosen += list(zip(coarse, kinds, strict=False))
    return [charts.Series(str(sight), _points(study, sight), kind) for sight, kind in chosen]


def _points(study: DataStudy, sight: Sight) -> list[tuple[float, float]]:
    """Noise levels, and errors beyond the full image's where they can be shown."""
    beyond = study.curves[sight].relative - 1
    return [
        (float(sigma), max(float(share), _LEAST))
        for sigma, share in zip(study.sigmas, beyond, strict=True)
        if share <= _MOST
    ]


def _chart(study: DataStudy, proposal: DataProposal) -> str:
    edges = [band.sigma_min for band in proposal.bands if band.sigma_min > 0]
    axes = charts.Axes(logarithmic=True, columns=edges, rows=[proposal.bound - 1], written=_percent)
    return charts.lines(drawn_series(study, proposal), across=_ACROSS, what=_WHAT, axes=axes)


def _percent(value: float) -> str:
    return f"{100 * value:g}%"


def standalone(study: DataStudy, proposal: DataProposal) -> str:
    """The chart as an SVG file that needs nothing else."""
    series = drawn_series(study, proposal)
    rows = -(-len(series) // 2)
    top = _LEGEND_ROW * rows + 34
    title = f"{study.measured.name}: {_WHAT}, by what a denoiser sees"
    parts = [f'<text x="20" y="22" style="font-size:15px;fill:#1d2939">{escape(title)}</text>']
    for number, one in enumerate(series):
        x, y = 20 + 350 * (number % 2), 46 + _LEGEND_ROW * (number // 2)
        parts.append(f'<path class="curve {one.kind}" d="M{x} {y - 4}h26"/>')
        parts.append(f'<text x="{x + 34}" y="{y}">{escape(one.name)}</text>')
    inner = _chart(study, proposal).replace(
        "<svg ", f'<svg y="{top}" width="{_WIDTH}" height="{_HEIGHT}" ', 1
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT + top}">'
        f"<style>{_STYLE}</style>"
        f'<rect width="{_WIDTH}" height="{_HEIGHT + top}" style="fill:#fff"/>'
        + "".join(parts)
        + inner
        + "</svg>\n"
    )


def planned_page(study: DataStudy, proposal: DataProposal, recipe: str) -> str:
    """Everything as a page."""
    keys = [(one.name, one.kind) for one in drawn_series(study, proposal)]
    rows: list[Sequence[str]] = [
        (advice.name, advice.value, advice.why) for advice in proposal.advice
    ]
    return page.page(
        "tessera plan",
        [
            page.header(f"What {study.measured.name} asks for", looked_at(study)),
            page.section("What is proposed", page.table(rows)),
            page.section(
                "Errors by what is seen",
                page.legend(keys) + _chart(study, proposal),
                "Of the best linear denoiser, beyond that of the full image on the same pixels.",
            ),
            page.section("The same in numbers", page.table(error_rows(study), HEAD)),
            page.section("For a recipe", page.code(recipe)),
        ],
    )


def _write_png(file: object, study: DataStudy, proposal: DataProposal) -> None:
    """The chart by matplotlib."""
    figures = require_extra("matplotlib.figure", "benchmarks", "a plot as PNG")
    figure = figures.Figure(figsize=(8, 4.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for one in drawn_series(study, proposal):
        colour, style = _COLOURS[one.kind[0]], "--" if "dashed" in one.kind else "-"
        axes.plot(*zip(*one.points, strict=True), style, color=colour, label=one.name)
    axes.axhline(proposal.bound - 1, color="#c4372d", linestyle=":")
    for band in proposal.bands:
        if 0 < band.sigma_min < math.inf:
            axes.axvline(band.sigma_min, color="#c4372d", linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel=_ACROSS, ylabel=_WHAT, title=study.measured.name)
    axes.yaxis.set_major_formatter(lambda value, _: _percent(value))
    axes.legend(fontsize=8)
    figure.savefig(file, format="png")

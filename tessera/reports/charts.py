"""Small charts as inline SVG; their colours are the page's, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 720, 300
_SIDE = 20
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 24, 12, 70
_APART = 28  # between lines of the grid
_FEWEST = 1e-12  # of values on a logarithmic axis


@dataclass(frozen=True)
class Mark:
    """A value on a scale; `kind` chooses its colour in the page's style."""

    name: str
    value: float
    kind: str


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        name: of it.
        points: (x, y) by rising x.
        kind: its colour in the page's style, "a" to "d".
    """

    name: str
    points: Sequence[tuple[float, float]]
    kind: str = "a"


@dataclass(frozen=True)
class Axes:
    """What the axes of a chart of lines are besides.

    Attributes:
        logarithmic: the horizontal one, too; it begins at the smallest x.
        columns, rows: values across, and values, that are marked by dashed lines.
        written: a value as text.
    """

    logarithmic: bool = False
    columns: Sequence[float] = ()
    rows: Sequence[float] = ()
    written: Callable[[float], str] = "{:.3g}".format


def lines(
    series: Sequence[Series],
    *,
    across: str = "images seen",
    what: str = "loss per pixel",
    axes: Axes = Axes(),
) -> str:
    """Values over images seen, on a logarithmic axis.

    Args:
        across: name of the horizontal axis.
        what: of the values, for those who do not see them.
        axes: what else is to be known of them.
    """
    series = [one for one in series if one.points]
    if not series:
        return f"<p>No {escape(what)} was logged.</p>"
    values = [max(y, _FEWEST) for one in series for _, y in one.points]
    right = max(x for one in series for x, _ in one.points) or 1
    first = min(x for one in series for x, _ in one.points) if axes.logarithmic else 0.0
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = 0.05 * (high - low) or 0.1
    low, high = low - margin, high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        share = math.log(x / first) / math.log(right / first) if axes.logarithmic else x / right
        inner = share * (_WIDTH - _LEFT - _RIGHT)
        up = (math.log10(max(y, _FEWEST)) - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + inner, _HEIGHT - _BOTTOM - up

    parts, below = [], math.inf
    for value in _log_ticks(10**low, 10**high):
        _, y = place(first, value)
        if below - y >= _APART:  # else the numbers would cover each other
            parts.append(_level(y, axes.written(value)))
            below = y
    for value in _log_ticks(first, right) if axes.logarithmic else _ticks(right):
        x, _ = place(value, values[0])
        parts.append(_text(x, _HEIGHT - _BOTTOM + 26, _thousands(value), "middle"))
    parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 8, across, "end"))
    for value in axes.columns:
        x, _ = place(value, values[0])
        parts.append(_mark(x, x, _TOP, _HEIGHT - _BOTTOM))
    for value in axes.rows:
        _, y = place(right, value)
        parts.append(_mark(_LEFT, _WIDTH - _RIGHT, y, y))
    for one in series:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in one.points))
        parts.append(f'<polyline class="curve {one.kind}" points="{path}"/>')
        last = place(*one.points[-1])
        parts.append(f'<circle class="{one.kind}" cx="{last[0]:.1f}" cy="{last[1]:.1f}" r="4"/>')
    told = "; ".join(
        f"{one.name}: {one.points[0][1]:.3g} at first, {one.points[-1][1]:.3g} at the end"
        for one in series
    )
    return _svg(parts, _HEIGHT, f"{what}; {told}")


def scale(marks: Sequence[Mark]) -> str:
    """Values as bars on a common logarithmic axis, each below its name and number."""
    values = [max(mark.value, 1e-6) for mark in marks]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    low, high = low - (low == math.log10(min(values))), max(high, low + 1)
    row_height = 60
    height = row_height * len(marks) + 34

    def place(value: float) -> float:
        return _SIDE + (math.log10(value) - low) / (high - low) * (_WIDTH - 3 * _SIDE)

    parts = []
    every = math.ceil((high - low) / 5)  # so that the numbers have room
    for exponent in range(low, high + 1, every):
        x = place(10.0**exponent)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{height - 30}"/>')
        parts.append(_text(x, height - 6, f"{10.0**exponent:g}", "middle"))
    for row, (mark, value) in enumerate(zip(marks, values, strict=True)):
        y = row * row_height
        width = max(place(value) - _SIDE, 2)
        name = f'<tspan class="value">{mark.value:.3g}</tspan>  {escape(mark.name)}'
        parts.append(f'<text class="name" x="{_SIDE}" y="{y + 24}">{name}</text>')
        parts.append(
            f'<rect class="{mark.kind}" x="{_SIDE}" y="{y + 33}" '
            f'width="{width:.1f}" height="16" rx="4"/>'
        )
    return _svg(parts, height, ", ".join(f"{mark.name}: {mark.value:.3g}" for mark in marks))


def groups(
    names: Sequence[str], series: Sequence[tuple[str, Sequence[float | None], str]], what: str
) -> str:
    """Bars beside each other in groups, from 0 up.

    Args:
        names: of the groups.
        series: name, a value for each group (None: no bar), and kind, the colour.
        what: of the values, for those who do not see them.
    """
    values = [v for _, row, _ in series for v in row if v is not None]
    top = max(values, default=0) or 1
    inner, step = _HEIGHT - _TOP - _BOTTOM, (_WIDTH - _LEFT - _RIGHT) / len(names)
    width = 0.7 * step / max(len(series), 1)
    parts = [
        _level(_HEIGHT - _BOTTOM - value / (1.08 * top) * inner, f"{value:.3g}")
        for value in _ticks(top)
    ]
    for column, name in enumerate(names):
        middle = _LEFT + (column + 0.5) * step
        parts.append(_text(middle, _HEIGHT - _BOTTOM + 26, name, "middle"))
        for index, (_, row, kind) in enumerate(series):
            value = row[column]
            if value is None:
                continue
            x, height = middle - 0.35 * step + index * width, value / (1.08 * top) * inner
            parts.append(
                f'<rect class="{kind}" x="{x + 2:.1f}" y="{_HEIGHT - _BOTTOM - height:.1f}" '
                f'width="{width - 4:.1f}" height="{height:.1f}" rx="3"/>'
            )
    told = "; ".join(
        f"{name}: {', '.join('none' if v is None else f'{v:.3g}' for v in row)}"
        for name, row, _ in series
    )
    return _svg(parts, _HEIGHT, f"{what}; {told}")


def spread(
    series: Sequence[tuple[str, Sequence[float], str]], mark: float | None, across: str
) -> str:
    """How values are spread: the share of each set in twenty steps, as outlines.

    Args:
        series: name, values and kind, the colour.
        mark: a value to be marked by a dashed line.
        across: name of the horizontal axis.
    """
    every = [value for _, values, _ in series for value in values]
    low, high = min(every), max(every)
    high = high if high > low else low + 1
    bins, room = 20, _WIDTH - _LEFT - _RIGHT
    shares = []
    for _, values, _ in series:
        counts = [0] * bins
        for value in values:
            counts[min(int((value - low) / (high - low) * bins), bins - 1)] += 1
        shares.append([count / len(values) for count in counts])
    top, inner, ground = max(map(max, shares)), _HEIGHT - _TOP - _BOTTOM, _HEIGHT - _BOTTOM
    parts = [_level(ground - t / (1.05 * top) * inner, f"{t:.0%}") for t in _ticks(top)]
    for share in range(5):
        x, value = _LEFT + share / 4 * room, low + share / 4 * (high - low)
        anchor = "middle" if share < 4 else "end"
        parts.append(_text(x, ground + 26, f"{value:.3g}", anchor))
    parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 8, across, "end"))
    for (_, _, kind), share_of_bin in zip(series, shares, strict=True):
        points = [f"{_LEFT},{ground}"]
        for index, found in enumerate(share_of_bin):
            y = ground - found / (1.05 * top) * inner
            left, right = (_LEFT + (index + end) / bins * room for end in (0, 1))
            points += [f"{left:.1f},{y:.1f}", f"{right:.1f},{y:.1f}"]
        points.append(f"{_WIDTH - _RIGHT},{ground}")
        parts.append(f'<polyline class="curve {kind}" points="{" ".join(points)}"/>')
    if mark is not None:
        x = _LEFT + (mark - low) / (high - low) * room
        parts.append(_mark(x, x, _TOP, ground))
    told = "; ".join(
        f"{name}: {min(values):.3g} to {max(values):.3g}" for name, values, _ in series
    )
    return _svg(parts, _HEIGHT, f"{across}; {told}")


def _mark(left: float, right: float, top: float, bottom: float) -> str:
    """A dashed line."""
    return f'<line class="mark" x1="{left:.1f}" x2="{right:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'


def _level(y: float, name: str) -> str:
    """A horizontal line of the grid, with its number."""
    line = f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _text(_LEFT - 8, y + 5, name, "end")


def _svg(parts: Sequence[str], height: int, description: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(description)}">'
        + "".join(parts)
        + "</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _ticks(largest: float) -> list[float]:
    """Round numbers from 0 to `largest`, four to eight of them."""
    step = 10.0 ** math.floor(math.log10(largest))
    while largest / step < 4:
        step /= 2 if largest / step >= 2 else 5
    return [i * step for i in range(int(largest / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between `low` and `high`; evenly spaced where few fit."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [f * 10.0**e for e in exponents for f in (1, 2, 5) if low <= f * 10.0**e <= high]
    if len(ticks) >= 3:
        return ticks
    step = _ticks(high - low)[1]
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _thousands(value: float) -> str:
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{suffix}"
    return f"{value:g}"

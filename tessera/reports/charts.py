"""Small charts as inline SVG; their colours are the page's, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 720, 280
_SIDE = 20
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 24, 12, 54


@dataclass(frozen=True)
class Mark:
    """A value on a scale; `kind` chooses its colour in the page's style."""

    name: str
    value: float
    kind: str


@dataclass(frozen=True)
class Curve:
    """Points (x, y) of one thing, y above 0."""

    name: str
    points: Sequence[tuple[float, float]]


def line(points: Sequence[tuple[int, float]]) -> str:
    """Loss over images seen, on a logarithmic axis."""
    if not points:
        return "<p>No loss was logged.</p>"
    first, last = (max(points[index][1], 1e-12) for index in (0, -1))
    text = f"loss per pixel, {first:.3g} at first, {last:.3g} at the end"
    return curves([Curve("", points)], "images seen", text)


def curves(shown: Sequence[Curve], across: str, description: str) -> str:
    """Curves of several things, on a logarithmic axis, with their names at their ends.

    Args:
        shown: at most six that can be told apart.
        across: name of the horizontal axis, from 0 on.
        description: in a sentence, for those who do not see it.
    """
    shown = [curve for curve in shown if curve.points]
    if not shown:
        return "<p>Nothing was measured.</p>"
    every = [(x, max(y, 1e-12)) for curve in shown for x, y in curve.points]
    low, high = (math.log10(end([y for _, y in every])) for end in (min, max))
    margin = 0.05 * (high - low) or 0.1
    low, high = low - margin, high + margin
    most = max(x for x, _ in every) or 1

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x / most) * (_WIDTH - _LEFT - _RIGHT)
        up = (math.log10(max(y, 1e-12)) - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + right, _HEIGHT - _BOTTOM - up

    parts = []
    for value in _log_ticks(10**low, 10**high):
        _, y = place(0, value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(_LEFT - 8, y + 4, f"{value:g}", "end"))
    for value in _ticks(most):
        x, _ = place(value, 10**low)
        parts.append(_text(x, _HEIGHT - _BOTTOM + 22, _thousands(value), "middle"))
    parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 6, across, "end"))
    for index, curve in enumerate(shown):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve.points))
        parts.append(f'<polyline class="curve c{index}" points="{path}"/>')
        x, y = place(*curve.points[-1])
        parts.append(f'<circle class="end c{index}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        if curve.name:
            parts.append(_name(x - 8, y - 9, curve.name))
    return _svg(parts, _HEIGHT, description)


def scale(marks: Sequence[Mark]) -> str:
    """Values as bars on a common logarithmic axis, each below its name and number."""
    values = [max(mark.value, 1e-6) for mark in marks]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    low, high = low - (low == math.log10(min(values))), max(high, low + 1)
    row_height = 52
    height = row_height * len(marks) + 30

    def place(value: float) -> float:
        return _SIDE + (math.log10(value) - low) / (high - low) * (_WIDTH - 3 * _SIDE)

    parts = []
    for exponent in range(low, high + 1):
        x = place(10.0**exponent)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{height - 26}"/>')
        parts.append(_text(x, height - 6, f"{10.0**exponent:g}", "middle"))
    for row, (mark, value) in enumerate(zip(marks, values, strict=True)):
        y = row * row_height
        width = max(place(value) - _SIDE, 2)
        name = f'<tspan class="value">{mark.value:.3g}</tspan>  {escape(mark.name)}'
        parts.append(f'<text class="name" x="{_SIDE}" y="{y + 18}">{name}</text>')
        parts.append(
            f'<rect class="{mark.kind}" x="{_SIDE}" y="{y + 25}" '
            f'width="{width:.1f}" height="16" rx="4"/>'
        )
    return _svg(parts, height, ", ".join(f"{mark.name}: {mark.value:.3g}" for mark in marks))


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


def _name(x: float, y: float, text: str) -> str:
    return f'<text class="name" x="{x:.1f}" y="{y:.1f}" text-anchor="end">{escape(text)}</text>'


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
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"

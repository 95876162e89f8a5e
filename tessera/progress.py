"""Progress bars for anything that takes over two seconds; silent where nobody watches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from tessera import distributed


class Bar(Protocol):
    """A bar that is told how far the work is."""

    def advance(self, count: float = 1, note: str | None = None) -> None:
        """Count `count` more; `note` replaces the text at the end of the line."""
        ...

    def update(self, completed: float, note: str | None = None) -> None:
        """Set the count; `note` replaces the text at the end of the line."""
        ...


class _Rate(ProgressColumn):
    """Count per second of the recent past."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{quantity(speed)}/s", style="progress.data.speed")


class _Count(ProgressColumn):
    """Done and total, shortened."""

    def render(self, task: Task) -> Text:
        total = "?" if task.total is None else quantity(task.total)
        return Text(f"{quantity(task.completed)}/{total}", style="progress.download")


class _RichBar:
    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, count: float = 1, note: str | None = None) -> None:
        self._progress.update(self._task, advance=count, **_fields(note))

    def update(self, completed: float, note: str | None = None) -> None:
        self._progress.update(self._task, completed=completed, **_fields(note))


class _NoBar:
    def advance(self, count: float = 1, note: str | None = None) -> None:
        pass

    def update(self, completed: float, note: str | None = None) -> None:
        pass


def _fields(note: str | None) -> dict[str, Any]:
    return {} if note is None else {"note": note}


@contextlib.contextmanager
def progress(
    description: str, total: float | None, *, unit: str = "", completed: float = 0
) -> Iterator[Bar]:
    """A progress bar on stderr for the block; hidden if stderr is no terminal or on other ranks.

    Args:
        description: what is going on, in a word or two.
        total: the count at the end; None when it is not known.
        unit: what is counted, shown after the counts.
        completed: the count at the start.
    """
    console = Console(stderr=True)
    if not console.is_terminal or not distributed.is_main():
        yield _NoBar()
        return
    columns: list[str | ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        _Count(),
        TextColumn(unit) if unit else TextColumn("{task.percentage:>3.0f}%"),
        _Rate(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, console=console, speed_estimate_period=60) as bars:
        yield _RichBar(
            bars, bars.add_task(description, total=total, completed=int(completed), note="")
        )


def note(text: str) -> None:
    """A line on stderr; nothing if stderr is no terminal or on other ranks."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if console.is_terminal and distributed.is_main():
        console.print(text, markup=False)


def quantity(value: float) -> str:
    """A count in at most five characters: 950, 12.3k, 1.20M."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            scaled = value / limit
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{suffix}"
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"

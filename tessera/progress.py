"""Progress of anything that takes over two seconds: a bar, or lines where there is no terminal."""

from __future__ import annotations

import contextlib
import html
import importlib.util
import sys
import time
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

    def update(self, completed: float, note: str | None = None, total: float | None = None) -> None:
        """Set the count; `note` replaces the text at the end of the line, `total` the total."""
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

    def update(self, completed: float, note: str | None = None, total: float | None = None) -> None:
        fields = _fields(note) if total is None else {"total": total, **_fields(note)}
        self._progress.update(self._task, completed=completed, **fields)


class _LineBar:
    """Prints where the work is now and then: first after some seconds, then ever more seldom."""

    FIRST, BETWEEN = 5.0, 10.0  # seconds

    def __init__(self, description: str, total: float | None, unit: str, completed: float) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._begin, self._done, self._note = completed, completed, ""
        self._started = time.monotonic()
        self._due, self._printed = self._started + self.FIRST, False

    def advance(self, count: float = 1, note: str | None = None) -> None:
        self.update(self._done + count, note)

    def update(self, completed: float, note: str | None = None, total: float | None = None) -> None:
        self._done, self._note = completed, self._note if note is None else note
        self._total = self._total if total is None else total
        now = time.monotonic()
        if now >= self._due:
            seconds = now - self._started
            # A night's work should not fill the log.
            self._due = now + max(self.BETWEEN, seconds / 10)
            speed = (self._done - self._begin) / max(seconds, 1e-9)
            left = []
            if self._total is not None and speed > 0:
                left = [f"{time_text((self._total - self._done) / speed)} left"]
            self._print(left)

    def finish(self) -> None:
        """The last line, if there were others."""
        if self._printed:
            self._print([f"took {time_text(time.monotonic() - self._started)}"])

    def _print(self, more: list[str]) -> None:
        count = _counted(self._description, self._done, self._total, self._unit)
        print(*filter(None, [count, self._note, *more]), sep=", ", file=sys.stderr, flush=True)
        self._printed = True


class _NotebookBar:
    """A bar of HTML in the output of a notebook's cell."""

    BETWEEN = 0.25  # seconds

    def __init__(self, description: str, total: float | None, unit: str, completed: float) -> None:
        from IPython.display import display

        self._description, self._total, self._unit = description, total, unit
        self._begin, self._done, self._note = completed, completed, ""
        self._started = self._shown = time.monotonic()
        self._handle = display({"text/html": self._html()}, raw=True, display_id=True)

    def advance(self, count: float = 1, note: str | None = None) -> None:
        self.update(self._done + count, note)

    def update(self, completed: float, note: str | None = None, total: float | None = None) -> None:
        self._done, self._note = completed, self._note if note is None else note
        self._total = self._total if total is None else total
        if time.monotonic() >= self._shown + self.BETWEEN:
            self.show()

    def show(self) -> None:
        """Bring the cell up to date."""
        self._shown = time.monotonic()
        self._handle.update({"text/html": self._html()}, raw=True)

    def _html(self) -> str:
        seconds = time.monotonic() - self._started
        speed = (self._done - self._begin) / max(seconds, 1e-9)
        parts = [_counted(self._description, self._done, self._total, self._unit), self._note]
        if self._total is not None and 0 < self._done < self._total and speed > 0:
            parts.append(f"{time_text((self._total - self._done) / speed)} left")
        most = "" if self._total is None else f' value="{self._done:g}" max="{self._total:g}"'
        return f"<progress{most}></progress> {html.escape(', '.join(filter(None, parts)))}"


def _counted(description: str, done: float, total: float | None, unit: str) -> str:
    of = "" if total is None else f" of {quantity(total)}"
    return f"{description}: {quantity(done)}{of} {unit}".rstrip()


def in_notebook() -> bool:
    """Whether what is printed goes to a notebook's cell."""
    return Console().is_jupyter and importlib.util.find_spec("IPython") is not None


class _NoBar:
    def advance(self, count: float = 1, note: str | None = None) -> None:
        pass

    def update(self, completed: float, note: str | None = None, total: float | None = None) -> None:
        pass


def _fields(note: str | None) -> dict[str, Any]:
    return {} if note is None else {"note": note}


@contextlib.contextmanager
def progress(
    description: str,
    total: float | None,
    *,
    unit: str = "",
    completed: float = 0,
    lines: bool = True,
    shown: bool = True,
) -> Iterator[Bar]:
    """A progress bar on stderr for the block, or a line now and then if stderr is no terminal.

    In a notebook it is a bar in the cell.

    The main process alone shows it.

    Args:
        description: what is going on, in a word or two.
        total: the count at the end; None when it is not known.
        unit: what is counted, shown after the counts.
        completed: the count at the start.
        lines: whether to print lines without a terminal.
        shown: whether to show anything.
    """
    console = Console(stderr=True)
    if shown and distributed.is_main() and in_notebook():
        bar = _NotebookBar(description, total, unit, completed)
        try:
            yield bar
        finally:
            bar.show()
        return
    if not shown or not distributed.is_main() or not (console.is_terminal or lines):
        yield _NoBar()
        return
    if not console.is_terminal:
        line_bar = _LineBar(description, total, unit, completed)
        yield line_bar
        line_bar.finish()
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


def time_text(seconds: float) -> str:
    """A time in words: 9 s, 3 min 20 s, 5 h 7 min."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def quantity(value: float) -> str:
    """A count in at most five characters: 950, 12.3k, 1.20M."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            scaled = value / limit
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{suffix}"
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def human(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 42_380_000_000, "FLOP" to "42.4 GFLOP"."""
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z")
    power = 0
    while abs(value) >= 999.5 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if value >= 99.95 or power == 0 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {prefixes[power]}{unit}".rstrip()

"""Progress where no terminal shows a bar: lines, now and then."""

from __future__ import annotations

import io

import pytest

from tessera import distributed
from tessera import progress as module
from tessera.progress import progress, time_text


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds, which passes when the test says so."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("classifier", 1000, unit="images") as bar:
        for _ in range(8):
            bar.advance(10)
            clock[0] += 1
        bar.update(250, "91.0% right")
        assert capsys.readouterr().err.splitlines() == [
            "classifier: 60 of 1.00k images, 1 min 18 s left"
        ]
        clock[0] = 116
        bar.update(500, total=750)
    assert capsys.readouterr().err.splitlines() == [
        "classifier: 500 of 750 images, 91.0% right, 8 s left",
        "classifier: 500 of 750 images, 91.0% right, took 16 s",
    ]


def test_a_long_work_does_not_fill_the_log(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("sampling", 36_000) as bar:
        for _ in range(36_000):
            clock[0] += 1
            bar.advance()
    assert 20 < len(capsys.readouterr().err.splitlines()) < 80


def test_short_work_is_silent(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("features", 10) as bar:
        clock[0] += 4
        bar.advance(10)
    clock[0] += 60
    with progress("training", 10, lines=False) as bar:
        clock[0] += 60
        bar.advance(10)
    assert capsys.readouterr().err == ""


def test_one_process_speaks(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    with progress("features", 10) as bar:
        clock[0] += 60
        bar.advance(10)
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with progress("classifier", 1000, unit="images") as bar:
        bar.update(250, "91.0% right", total=500)
        bar.update(500)
    assert "500/500" in terminal.getvalue()
    assert "91.0% right" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (9.4, "9 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (18_425, "5 h 7 min")],
)
def test_times(seconds: float, text: str) -> None:
    assert time_text(seconds) == text

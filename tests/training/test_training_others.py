"""What other programs take of the processors, and how a run of some minutes tells its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tessera.training import others
from tessera.training.forecast import Forecast
from tessera.training.others import OtherPrograms
from tessera.training.tracking import StatusLines, likely_end


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path / "stat", monkeypatch)


class Machine:
    """Four processors, of which this process and others take what a test says."""

    def __init__(self, stat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._stat, self.busy, self.idle, self.own = stat, 0, 0, 0.0
        monkeypatch.setattr(others, "_STAT", stat)
        monkeypatch.setattr(others.os, "sysconf", lambda name: 100)
        monkeypatch.setattr(others.time, "process_time", lambda: self.own)
        self.pass_time(0, 0, 0)

    def pass_time(self, busy: float, idle: float, own: float) -> None:
        """Seconds of all processors together, and of this process among the busy ones."""
        self.busy += round(100 * busy)
        self.idle += round(100 * idle)
        self.own += own
        self._stat.write_text(f"cpu  {self.busy} 0 0 {self.idle} 0 0 0 0 0 0\ncpu0 1 2 3 4\n")


def test_others_are_what_is_busy_beside_this_process(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = OtherPrograms()
    assert watch.share() == 0.0  # no time has passed
    machine.pass_time(busy=3, idle=1, own=1)
    assert watch.share() == pytest.approx(0.5)
    machine.pass_time(busy=0, idle=4, own=0)
    assert watch.share() == pytest.approx(0.25)
    assert OtherPrograms().share() == 0.0  # counted anew
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    together = OtherPrograms()
    machine.pass_time(busy=4, idle=0, own=1)  # two more of the same training
    assert together.share() == pytest.approx(0.25)


@pytest.mark.parametrize("text", [None, "", "cpu 1 2", "cpu a b c d e"])
def test_a_system_that_does_not_say_has_none(machine: Machine, text: str | None) -> None:
    machine._stat.unlink()
    if text is not None:
        machine._stat.write_text(text)
    assert OtherPrograms().share() == 0.0


def test_the_table_says_that_others_disturbed() -> None:
    quiet, busy = (Forecast(60, 0, 10, 10**9, others, 40.0) for others in (0.05, 0.63))
    assert "other programs" not in quiet.rows()
    assert busy.rows()["other programs"] == (
        "took 63% of the processors meanwhile: without them about 40 images/s"
    )


def test_a_run_of_some_minutes_ends_with_them(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {
        "images": 4_000, "seconds": 60.0, "images_per_second": 50.0, "loss_per_pixel": 0.5,
        "skipped": 0, "memory_gb": 0.5,
    }  # fmt: skip
    assert likely_end(metrics, 50_000, None) == 50_000
    assert likely_end(metrics, 50_000, 2) == 7_000
    assert likely_end(metrics, 5_000, 2) == 5_000
    assert likely_end({**metrics, "seconds": 130.0}, 50_000, 2) == 4_000
    StatusLines(50_000, 2).log(metrics)
    assert "4,000 of 7,000 images" in (line := capsys.readouterr().err)
    assert "0:01:00 left" in line

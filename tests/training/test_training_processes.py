"""Launchers' environments and progress bars."""

from __future__ import annotations

import ctypes
import os

import pytest

from tessera import distributed, memory
from tessera.errors import TesseraError
from tessera.progress import progress, quantity


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[07-09,12],login", "gpu07"), ("gpu3", "gpu3"), ("a,b[1-2]", "a"), ("n[1,5]", "n1")],
)
def test_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert distributed._first_host(nodes) == first


def test_slurm_tasks_are_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
    for name in launched:
        monkeypatch.setenv(name, "")  # so that what is set below goes afterwards
        monkeypatch.delenv(name)
    settings = {"STEP_ID": 0, "NTASKS": 8, "PROCID": 5, "LOCALID": 1, "STEP_NODELIST": "n[3-4]"}
    for name, value in settings.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    distributed._translate_slurm()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    assert [os.environ[name] for name in names] == ["5", "8", "1", "n3"]


def test_incomplete_environment_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TesseraError, match=r"RANK, MASTER_ADDR.*torchrun"), distributed.session():
        pass


def test_a_session_on_the_cpu_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(memory, "keep_freed", lambda: calls.append(True))
    with distributed.session("cpu"):
        assert calls == [True]


def test_greetings_of_c_libraries_stay_out_of_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    """Where JSON is read from; C keeps what it prints in a buffer of its own."""
    with distributed._stdout_to_stderr():
        ctypes.CDLL(None).puts(b"greetings")
    print("{}")
    assert capfd.readouterr() == ("{}\n", "greetings\n")


def test_one_process_has_no_group() -> None:
    with distributed.session():
        assert not distributed.active()
        assert (distributed.rank(), distributed.world()) == (0, 1)
        assert distributed.broadcast("x") == "x"
        assert distributed.gather("x") == ["x"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.4567, "0.457"), (999, "999"), (1000, "1.00k"), (12345, "12.3k"), (2e8, "200M")],
)
def test_quantities_are_short(value: float, text: str) -> None:
    assert quantity(value) == text


def test_bar_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("work", 3) as bar:
        bar.advance(2, note="half")
        bar.update(3)
    assert capsys.readouterr() == ("", "")

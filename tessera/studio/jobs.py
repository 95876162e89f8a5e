"""Trainings that the studio started: which process each is, and what it prints."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tessera import processes
from tessera.errors import DataError, TesseraError
from tessera.files import read_json, write_json
from tessera.studio.folder import JOBS, StudioFolder

_TAIL = 4_000  # bytes of the output that are shown
_RECENT = 3600.0  # seconds for which a training is listed that has made no run folder


@dataclass
class TrainingJob:
    """A training that was started, also by a studio before this one.

    Attributes:
        name: of its run.
        process: number of its process.
        started: when that began, see `processes.started`.
        namespace: where it is a number, see `processes.namespace`.
        begun: seconds since 1970.
        log: file of what it prints.
        asked: processes that were asked to stop, by this studio.
    """

    name: str
    process: int
    started: int | None
    namespace: str
    begun: float
    log: Path
    asked: set[int] = field(default_factory=set)

    def alive(self) -> bool:
        """Whether it is known to run."""
        if self.namespace != processes.namespace() or self.started is None:
            return False
        return processes.alive(self.process, self.started)

    @property
    def recent(self) -> bool:
        """Whether it runs, or began not long ago."""
        return self.alive() or time.time() - self.begun < _RECENT

    def stop_asked(self, process: int) -> bool:
        """Whether this process was asked to stop."""
        return process in self.asked

    def output(self) -> str:
        """The end of what it printed, without a terminal's codes."""
        try:
            with self.log.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - _TAIL, 0))
                text = file.read(_TAIL).decode(errors="replace")
        except OSError:
            return ""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
        lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines()]
        return "\n".join(lines[-40:]).strip()


class Jobs:
    """Starts trainings as processes of their own, which go on when the studio ends.

    What is needed to know them again is kept in `.studio` in the folder.
    """

    def __init__(self, folder: StudioFolder) -> None:
        self._folder, self._place = folder, folder.root / JOBS
        self._jobs: dict[str, TrainingJob] = {}
        self._children: list[subprocess.Popen[bytes]] = []
        self._lock = threading.RLock()
        self._read()

    def all(self) -> list[TrainingJob]:
        """Those that are known, the newest first."""
        self._reap()
        with self._lock:
            return sorted(self._jobs.values(), key=lambda job: job.begun, reverse=True)

    def of(self, name: str) -> TrainingJob | None:
        """The training of a run, if a studio started it."""
        self._reap()
        with self._lock:
            return self._jobs.get(name)

    def start(self, name: str, words: Sequence[str]) -> TrainingJob:
        """Start `tessera WORDS` for a run.

        Raises:
            TesseraError: one that was started for the run is still there, or it cannot be started.
        """
        with self._lock:
            before = self.of(name)
            if before is not None and before.alive():
                raise TesseraError(f"{name}: process {before.process} is at it already")
            self._place.mkdir(parents=True, exist_ok=True)
            log = self._place / f"{_file_name(name)}.log"
            command = [sys.executable, "-m", "tessera", *words]
            with log.open("wb") as output:
                child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    # Ctrl-C in the studio's terminal is not meant for it.
                    start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
                )  # fmt: skip
            self._children.append(child)
            job = TrainingJob(
                name, child.pid, processes.started(child.pid), processes.namespace(), time.time(),
                log,
            )  # fmt: skip
            self._jobs[name] = job
            write_json(log.with_suffix(".json"), _plain(job))
            return job

    def ask_to_stop(self, name: str, process: int, since: int | None) -> bool:
        """Send SIGTERM to a process that is known by its beginning; whether it was sent."""
        child = next((one for one in self._children if one.pid == process), None)
        if child is not None and child.poll() is None:
            child.send_signal(signal.SIGTERM)  # nobody else can have its number yet
        elif not processes.tell(process, since, signal.SIGTERM):
            return False
        with self._lock:
            job = self._jobs.get(name)
            if job is None:
                # Of a training that somebody started in a terminal.
                now = time.time()
                log = self._place / f"{_file_name(name)}.log"
                job = TrainingJob(name, process, since, processes.namespace(), now, log)
                self._jobs[name] = job
            job.asked.add(process)
        return True

    def _reap(self) -> None:
        """Ask for the exit codes of those that have ended, so that they are gone."""
        with self._lock:
            self._children = [child for child in self._children if child.poll() is None]

    def _read(self) -> None:
        for file in sorted(self._place.glob("*.json")) if self._place.is_dir() else []:
            try:
                job = _job(read_json(file), file.with_suffix(".log"))
            except (DataError, OSError, KeyError, TypeError, ValueError):
                continue  # of another version, or damaged: nothing is known of that process
            self._jobs[job.name] = job


def _file_name(name: str) -> str:
    return "top" if name == "." else name.replace("/", "%")


def _plain(job: TrainingJob) -> dict[str, Any]:
    return {
        "name": job.name,
        "process": job.process,
        "started": job.started,
        "namespace": job.namespace,
        "begun": job.begun,
    }


def _job(values: dict[str, Any], log: Path) -> TrainingJob:
    started = values["started"]
    return TrainingJob(
        str(values["name"]), int(values["process"]), None if started is None else int(started),
        str(values["namespace"]), float(values["begun"]), log,
    )  # fmt: skip

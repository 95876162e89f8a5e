"""One job at a time in a run folder: a file that names the host and the process that has it.

A lock of a process of this machine that has ended is taken over. Of a process on another machine
(or in another container) nobody here can tell, so the message says how to remove its lock.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera import distributed, processes
from tessera.errors import TrainingError
from tessera.files import atomic_file, create_file, read_json

LOCK = "run.lock"


@dataclass(frozen=True)
class Holder:
    """The process that has, or had, a run folder.

    Attributes:
        process: its number; 0 where the lock cannot be read.
        host: its machine.
        since: when it took the folder, ISO 8601.
        here: it is of this machine and container, so that can be told whether it runs.
        started: when it began, see `processes.started`.
    """

    process: int
    host: str
    since: str
    here: bool
    started: int | None

    @property
    def ended(self) -> bool:
        """Whether it is known to have ended."""
        return self.here and not processes.alive(self.process, self.started)


def holder(folder: Path) -> Holder | None:
    """Who has a run folder, or died with it; None if nobody does."""
    content = _read(folder / LOCK)
    if content is None:
        return None
    pid, started = content.get("process"), content.get("started")
    known = type(pid) is int and pid > 0
    return Holder(
        process=pid if type(pid) is int and known else 0,
        host=str(content.get("host", "an unknown host")),
        since=str(content.get("since", "an unknown time")),
        here=known and content.get("namespace") == processes.namespace(),
        started=started if type(started) is int else None,
    )


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Have the run folder in the block, which all processes of the job enter.

    Raises:
        TrainingError: another job has it.
    """
    token, failure = "", None
    if distributed.is_main():
        try:
            token = _take(folder)
        except (TrainingError, OSError) as error:
            failure = str(error)
    failure = distributed.broadcast(failure)
    if failure is not None:
        raise TrainingError(failure)
    try:
        yield
    finally:
        _release(folder, token)


@contextlib.contextmanager
def hold_alone(folder: Path) -> Iterator[None]:
    """The same for this process, which asks nobody else.

    Raises:
        TrainingError: another job has it.
    """
    token = _take(folder)
    try:
        yield
    finally:
        _release(folder, token)


def _take(folder: Path) -> str:
    """Write the lock; returns what tells it from others."""
    path, token, pid = folder / LOCK, secrets.token_hex(8), os.getpid()
    content = {
        "host": processes.host(),
        "process": pid,
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "namespace": processes.namespace(),
        "started": processes.started(pid),
        "token": token,
    }
    text = json.dumps(content, indent=2) + "\n"
    with _alone(folder), contextlib.suppress(FileExistsError):
        holder = _read(path)
        if holder is None:
            create_file(path, text)
            return token
        if _ended(holder):
            with atomic_file(path, "w") as file:
                file.write(text)
            return token
    raise TrainingError(_refusal(folder, _read(path) or {}))


def _release(folder: Path, token: str) -> None:
    path = folder / LOCK
    # Somebody may have removed it, and another job may have the folder now.
    if token and (_read(path) or {}).get("token") == token:
        path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    """What the lock says, nothing if it cannot be read; None if there is none."""
    try:
        value = read_json(path, error=TrainingError, max_bytes=4096)
    except FileNotFoundError:
        return None
    except TrainingError:
        return {}
    return value if isinstance(value, dict) else {}


def _ended(holder: dict[str, Any]) -> bool:
    """Whether the process that has the lock is known to have ended, or is this one."""
    pid, since = holder.get("process"), holder.get("started")
    if holder.get("namespace") != processes.namespace() or type(pid) is not int or pid <= 0:
        return False
    return pid == os.getpid() or not processes.alive(pid, since)


def _refusal(folder: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder.get('process', '?')} on {holder.get('host', 'an unknown host')}"
    return (
        f"{folder} is in use: {who} trains there since {holder.get('since', 'an unknown time')}. "
        "Two runs in one folder would spoil each other. Wait for it or stop it; if it has ended "
        f"without removing its lock, remove it: rm {folder / LOCK}"
    )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While a lock is looked at and taken over, keep other processes of this machine out.

    Not every network file system can lock a folder; there, only the creation is exclusive.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)

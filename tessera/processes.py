"""Which process wrote a file, and whether it still runs."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
import socket
from pathlib import Path


@functools.cache
def host() -> str:
    """The name of this machine."""
    return socket.gethostname()


@functools.cache
def namespace() -> str:
    """What tells this machine's process numbers from others': its name, and the container's."""
    try:
        inside = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        inside = ""
    return hashlib.sha256(f"{host()} {inside}".encode()).hexdigest()[:8]


def started(pid: int) -> int | None:
    """When a process of this machine began, in ticks since the machine did; None if unknown.

    It tells a process from a later one that was given the same number.
    """
    status = _status(pid)
    return None if status is None else int(status[19])


def alive(pid: int, since: int | None = None) -> bool:
    """Whether process `pid` of this machine, that began at `since`, still runs."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    status = _status(pid)
    if status is None:
        return True
    # One that has ended but whose parent has not asked for its exit code yet.
    return status[0] not in ("Z", "X") and since in (None, int(status[19]))


def tell(pid: int, since: int | None, number: int) -> bool:
    """Send a signal to the process `pid` of this machine, if it is the one that began at `since`.

    Where the system has no handles on processes (Linux has), or does not say when one began,
    nothing is sent: the number may be somebody else's by now.

    Returns:
        Whether it was sent.

    Raises:
        PermissionError: the process is another user's.
    """
    if since is None or not hasattr(os, "pidfd_open"):
        return False
    try:
        handle = os.pidfd_open(pid)
    except (OSError, OverflowError):  # it has ended
        return False
    try:
        # From here on the handle is of one process, whatever becomes of its number.
        if not alive(pid, since):
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def _status(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat from the state on; None where there is no such file."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()

"""What a process leaves in a folder if it is killed: every state, without killing any.

A kill stops a program between two system calls, and what it has written by then stays. So copies of
the folder before each call that may change it are all that kills at these moments can leave.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_TAG = re.compile(r"\.[0-9a-f]{8}-\d+\.[a-z0-9_]{8}\.(part|old)")
_RANDOM = re.compile(rb'"(token|since)": "[^"]*"')

_CHANGES = (
    "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink",
    "os.truncate", "tempfile.mkstemp", "tempfile.mkdtemp",
)  # fmt: skip

_watchers: list[Callable[[], None]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    writes = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if _watchers and (writes or event in _CHANGES):
        _watchers[-1]()


sys.addaudithook(_audit)


class CrashStates:
    """Collects the different states of a folder while something writes to it.

    Args:
        folder: may not exist yet.
        into: an empty folder for the copies.
    """

    def __init__(self, folder: Path, into: Path) -> None:
        self.folder, self._into = folder, into
        self.moments = 0
        self.found: dict[str, Path] = {}
        self._before: object = None

    @contextmanager
    def watched(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Look at the folder before each call of the block that may change it, and at its end."""
        with monkeypatch.context() as patch:
            # No audit event tells of a file that has been written. (No power fails here, so that
            # nothing need be put on disk.)
            patch.setattr(os, "fsync", lambda handle: self._look())
            _watchers.append(self._look)
            try:
                yield
            finally:
                _watchers.pop()
        self._look()

    def _look(self) -> None:
        self.moments += 1
        now = _outline(self.folder)
        if now == self._before:
            return
        self._before = now
        key = fingerprint(self.folder)
        if key not in self.found:
            self.found[key] = self._into / f"{len(self.found):04d}"
            if self.folder.exists():
                watchers, _watchers[:] = _watchers[:], []  # not the copying itself
                shutil.copytree(self.folder, self.found[key])
                _watchers[:] = watchers


def _outline(folder: Path) -> list[tuple[str, int, int, int]]:
    """What changes if anything in a folder does, at the cost of looking."""
    found: list[tuple[str, int, int, int]] = []
    places = [str(folder)] if folder.exists() else []
    while places:
        for entry in os.scandir(places.pop()):
            status = entry.stat(follow_symlinks=False)
            found.append((entry.path, status.st_ino, status.st_size, status.st_mtime_ns))
            if entry.is_dir(follow_symlinks=False):
                places.append(entry.path)
    return found


def fingerprint(folder: Path) -> str:
    """Of all names and bytes in a folder, apart from random parts of temporary names."""
    total = hashlib.sha256()
    for name, content in sorted(contents(folder).items()):
        total.update(_TAG.sub(r".\1", name).encode())
        total.update(_RANDOM.sub(b"", content) if content is not None else b"folder")
    return total.hexdigest()


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder by its name; the bytes of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }

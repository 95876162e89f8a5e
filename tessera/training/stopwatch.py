"""How long the device works on something, without waiting for it."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch


class Stopwatch:
    """Adds up the time of the blocks that it runs in; on a GPU, that of the GPU."""

    def __init__(self, device: torch.device) -> None:
        kinds: dict[str, Any] = {"cuda": torch.cuda.Event, "mps": torch.mps.Event}
        self._event = kinds.get(device.type)
        self._pending: deque[tuple[Any, Any]] = deque()
        self._seconds = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block."""
        if self._event is None:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin
            return
        begin, end = self._event(enable_timing=True), self._event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._pending.append((begin, end))
        while self._pending and self._pending[0][1].query():
            self._count()

    def lap(self) -> float:
        """Seconds since the last call; waits for the blocks that are still computed."""
        while self._pending:
            self._pending[0][1].synchronize()
            self._count()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _count(self) -> None:
        begin, end = self._pending.popleft()
        self._seconds += begin.elapsed_time(end) / 1000

"""Signals to stop as a request that all processes agree to follow after the same step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from tessera import distributed

# Windows has no SIGUSR1.
_REQUESTS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
]
_NOTE = b"\nfinishing the step and saving; press Ctrl-C again to stop at once without saving\n"


class StopRequest:
    """Context in which SIGTERM, SIGINT and SIGUSR1 are remembered instead of followed at once.

    Slurm sends SIGUSR1 as a warning that time is running out (`--signal=USR1@300`). A second
    Ctrl-C ends the process in the ordinary way. Outside of the main thread, where Python delivers
    no signals, nothing is installed.

    Attributes:
        signal: number of the signal that all processes agreed to follow; None so far.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._received = 0
        self._previous: dict[int, Any] = {}
        self._pending: tuple[Any, Tensor] | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _REQUESTS:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending is not None and kind is None:
            self._pending[0].wait()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received:
            raise KeyboardInterrupt
        self._received = self._received or number
        if distributed.is_main():
            os.write(2, _NOTE)

    def agreed(self) -> bool:
        """Whether to stop now; asked once after each step, with the same answer everywhere.

        The processes exchange their requests on the CPU while the next step runs, so that a
        request takes effect one step later and no device is waited for.
        """
        if self.signal is not None:
            return True
        if not distributed.active():
            self.signal = self._received or None
            return self.signal is not None
        if self._pending is not None:
            work, value = self._pending
            work.wait()
            self._pending = None
            self.signal = int(value.item()) or None
            if self.signal is not None:
                return True
        value = torch.tensor([self._received])
        work = dist.all_reduce(value, op=dist.ReduceOp.MAX, async_op=True)
        self._pending = (work, value)
        return False

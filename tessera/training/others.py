"""What other programs take of this machine's processors."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")


class OtherPrograms:
    """Watches the processors from now on, as far as the system tells (Linux does).

    Processes of one training that were started together on this machine do not count as others.

    Example:
        >>> 0 <= OtherPrograms().share() <= 1
        True
    """

    def __init__(self) -> None:
        self._begin = self._now()

    def share(self) -> float:
        """Share of all processors that others took since the beginning, 0 to 1.

        0 where the system does not say, and where too little time has passed to tell.
        """
        begin, now = self._begin, self._now()
        if begin is None or now is None:
            return 0.0
        busy, whole, own = (after - before for before, after in zip(begin, now, strict=True))
        return min(max((busy - own) / whole, 0.0), 1.0) if whole >= 0.1 else 0.0

    def _now(self) -> tuple[float, float, float] | None:
        """Seconds of all processors that were busy, of all together, and of this training's."""
        own = time.process_time() * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        try:
            first = _STAT.read_text(encoding="ascii").partition("\n")[0].split()
            ticks = [int(field) for field in first[1:9]]
            tick = os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, AttributeError):
            return None
        if len(ticks) < 5:
            return None
        # user, nice, system, idle, iowait, irq, softirq, steal
        idle = ticks[3] + ticks[4]
        return (sum(ticks) - idle) / tick, sum(ticks) / tick, own

"""What all pages of the studio share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.errors import require_extra
from tessera.studio.bench import Bench
from tessera.studio.control import Control
from tessera.studio.folder import StudioFolder
from tessera.studio.jobs import Jobs
from tessera.studio.live import LiveRuns


def gradio() -> Any:
    """The package that makes the page.

    Raises:
        TesseraError: it is not installed; the message says how it is.
    """
    return require_extra("gradio", "studio", "tessera studio")


@dataclass(frozen=True)
class Desk:
    """A folder and what is done in it.

    Attributes:
        folder: of runs and pipelines.
        runs: how they are doing.
        control: stops, resumes and starts them.
        bench: samples from them.
        scratch: folder for files that are downloaded; not kept.
    """

    folder: StudioFolder
    runs: LiveRuns
    control: Control
    bench: Bench
    scratch: Path

    @classmethod
    def at(cls, folder: StudioFolder, scratch: Path, device: str | None = None) -> Desk:
        """The desk for a folder."""
        jobs = Jobs(folder)
        runs = LiveRuns(folder, jobs)
        return cls(folder, runs, Control(folder, jobs, runs), Bench(folder, device), scratch)


def kept(value: str | None, names: list[str]) -> str | None:
    """What is chosen of a list that has changed: the same, or else the first."""
    return value if value in names else next(iter(names), None)

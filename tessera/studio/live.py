"""How a run is doing: read from its folder, again and again, without touching it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tessera.errors import TesseraError
from tessera.progress import time_text
from tessera.recipes.schema import Recipe
from tessera.reports.charts import Series
from tessera.reports.losses import curves
from tessera.studio.folder import StudioFolder
from tessera.studio.jobs import Jobs, TrainingJob
from tessera.training.run_folder import RECIPE, read_recipe
from tessera.training.run_lock import Holder, holder
from tessera.training.tracking import Metrics, MetricsReader

State = Literal[
    "preparing", "training", "stopping", "reporting", "elsewhere", "killed", "failed", "stopped",
    "finished", "broken",
]  # fmt: skip
"""What a run is at.

preparing: started here, before its first step; training; stopping: asked to, and saving; reporting:
trained, samples and report are being made; elsewhere: by a process that is not of this machine;
killed: its process ended without saving; failed: it ended with an error; stopped: it can be
resumed; finished; broken: its folder cannot be read.
"""
ALIVE: tuple[State, ...] = ("preparing", "training", "stopping", "reporting")

_KEPT = 16  # runs whose logs are kept in memory
_POINTS = 400  # of a curve


@dataclass(frozen=True)
class LiveRun:
    """A run at this moment.

    Attributes:
        name: in the studio's folder.
        path: its folder.
        state: what it is at.
        recipe: how it is trained; None where it is not written yet or cannot be read.
        images, total: seen so far, and those of a whole training.
        minutes, limit: spent, and at most; None without such a limit.
        speed: images a second of late.
        seconds_left: of training; None where unknown.
        losses: curves, of at most some hundred points each.
        last: the last line of the log that has the loss.
        scores: numbers that were measured on the way, the newest of each.
        preview: the newest picture of samples.
        problem: what is wrong, in words; "" for nothing.
        output: the last lines that it printed, where the studio started it.
        holder: who has the run.
        job: of the studio, if it started the run.
    """

    name: str
    path: Path
    state: State
    recipe: Recipe | None = None
    images: int = 0
    total: int = 0
    minutes: float = 0.0
    limit: float | None = None
    speed: float | None = None
    seconds_left: float | None = None
    losses: tuple[Series, ...] = ()
    last: Metrics = field(default_factory=dict)
    scores: Metrics = field(default_factory=dict)
    preview: Path | None = None
    problem: str = ""
    output: str = ""
    holder: Holder | None = None
    job: TrainingJob | None = None

    @property
    def alive(self) -> bool:
        """Whether a process of this machine is at it."""
        return self.state in ALIVE

    @property
    def share(self) -> float:
        """How far it is, 0 to 1."""
        done = self.images / self.total if self.total else 0.0
        if self.limit:
            done = max(done, self.minutes / self.limit)
        return 1.0 if self.state == "finished" else min(done, 1.0)


class LiveRuns:
    """Looks at the runs of a folder."""

    def __init__(self, folder: StudioFolder, jobs: Jobs) -> None:
        self._folder, self._jobs = folder, jobs
        self._readers: OrderedDict[Path, MetricsReader] = OrderedDict()
        self._recipes: OrderedDict[Path, tuple[Any, Recipe | None]] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Of all runs, those that are being prepared first, then the newest."""
        found = [entry.name for entry in self._folder.entries() if entry.is_run]
        waiting = [job.name for job in self._jobs.all() if job.name not in found and job.recent]
        return [*waiting, *found]

    def look(self, name: str | None) -> LiveRun:
        """A run as it is now.

        Raises:
            TesseraError: the name is none of the folder's.
        """
        path = self._folder.path(name)
        shown = path.relative_to(self._folder.root).as_posix()
        job = self._jobs.of(shown)
        found = holder(path) if path.is_dir() else None
        output = job.output() if job is not None else ""
        state, problem = _state_without_log(found, job, output)
        run = LiveRun(
            shown, path, state or "failed", problem=problem, output=output, holder=found, job=job
        )
        try:
            recipe = self._recipe(path)
        except (TesseraError, OSError) as error:
            if state is None and job is None:
                return replace(run, state="broken", problem=_gone(path, error))
            return run
        lines = self._log(path)
        training = _last_with(lines, "loss_per_pixel")
        images = int(lines[-1]["images"] or 0) if lines else 0
        limit, total = recipe.training.minutes, recipe.training.images
        minutes = (training.get("seconds") or 0) / 60
        over = images >= total or (limit is not None and minutes >= limit)
        if state in (None, "failed") and over:
            state = "finished"
        elif state == "preparing" and over and _written_by(path, job):
            state = "reporting"
        speed = training.get("images_per_second") or None
        return replace(
            run,
            state=state or "stopped",
            recipe=recipe,
            images=images,
            total=total,
            minutes=minutes,
            limit=limit,
            speed=speed,
            seconds_left=None if over else _seconds_left(images, total, minutes, limit, speed),
            losses=tuple(_thinned(series) for series in curves(lines)),
            last=training,
            scores=_scores(lines),
            preview=newest_preview(path),
        )

    def _recipe(self, path: Path) -> Recipe:
        """The recipe of a run, which is read again when its file is another one."""
        try:
            state = (path / RECIPE).stat()
        except OSError:
            return read_recipe(path)  # which says what is missing
        key = state.st_ino, state.st_mtime_ns, state.st_size
        with self._lock:
            known, recipe = self._recipes.pop(path, (None, None))
            if recipe is None or known != key:
                recipe = read_recipe(path)
            self._recipes[path] = key, recipe
            while len(self._recipes) > _KEPT:
                self._recipes.popitem(last=False)
            return recipe

    def _log(self, path: Path) -> list[Metrics]:
        """The lines of a log; those of runs that nobody looked at for long are forgotten."""
        with self._lock:
            reader = self._readers.pop(path, None) or MetricsReader(path)
            self._readers[path] = reader
            while len(self._readers) > _KEPT:
                self._readers.popitem(last=False)
            try:
                return reader.read()
            except OSError:
                return []


def newest_preview(run: Path) -> Path | None:
    """The newest picture of samples of a run."""
    try:
        return max((run / "previews").glob("*.png"), default=None)
    except OSError:
        return None


def _state_without_log(
    found: Holder | None, job: TrainingJob | None, output: str
) -> tuple[State | None, str]:
    """What the processes tell, and what is wrong; None where the log must tell."""
    if found is not None and not found.here:
        return "elsewhere", (
            f"process {found.process or '?'} on {found.host} has it since {found.since}; whether "
            "that one runs cannot be told from here"
        )
    if found is not None and not found.ended:
        asked = job is not None and job.stop_asked(found.process)
        return ("stopping" if asked else "training"), ""
    if job is not None and job.alive():
        return ("stopping" if job.stop_asked(job.process) else "preparing"), ""
    if found is not None:
        return "killed", (
            f"process {found.process}, which had it since {found.since}, ended without saving. "
            "Resuming goes back to the last checkpoint"
        )
    error = _error_in(output)
    if job is not None and error and not job.stop_asked(job.process):
        return "failed", error
    return None, ""


def _error_in(output: str) -> str:
    """The error that a command printed last, in its own words."""
    _, found, text = output.rpartition("error: ")
    return text.strip() if found else ""


def _written_by(path: Path, job: TrainingJob | None) -> bool:
    """Whether the log has grown since a training was started."""
    try:
        return job is not None and (path / "metrics.jsonl").stat().st_mtime > job.begun
    except OSError:
        return False


def _gone(path: Path, error: Exception) -> str:
    if not path.is_dir():
        return f"{path} is not there (any more)"
    return str(error)


def _last_with(lines: list[Metrics], name: str) -> Metrics:
    return next((line for line in reversed(lines) if name in line), {})


def _scores(lines: list[Metrics]) -> Metrics:
    """Numbers of evaluations and of held-out images, the newest of each."""
    found: Metrics = {}
    for line in lines[-200:]:
        if "loss_per_pixel" not in line:
            found |= {k: v for k, v in line.items() if k != "images" and "_q" not in k}
    return found


def _seconds_left(
    images: int, total: int, minutes: float, limit: float | None, speed: float | None
) -> float | None:
    if not speed:
        return None if limit is None else 60 * (limit - minutes)
    left = max(total - images, 0) / speed
    return left if limit is None else max(min(left, 60 * (limit - minutes)), 0)


def _thinned(series: Series) -> Series:
    """The curve with fewer points, the last one among them."""
    points, step = series.points, -(-len(series.points) // _POINTS)
    kept = [*points[::-step]][::-1] if step > 1 else [*points]
    return Series(series.name, kept, series.kind)


def left_text(run: LiveRun) -> str:
    """The time left in words."""
    return "–" if run.seconds_left is None else time_text(run.seconds_left)

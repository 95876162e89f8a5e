"""Metrics of a run: gathered on the device, written as JSON lines, to TensorBoard and to wandb."""

from __future__ import annotations

import datetime
import json
import math
import os
import resource
import secrets
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.commands import install_command
from tessera.errors import TesseraError, TrainingError, require_extra
from tessera.files import atomic_file, writing
from tessera.plain import parse_json
from tessera.progress import quantity
from tessera.recipes.loading import dump_recipe
from tessera.recipes.schema import Recipe
from tessera.training.learner import Update

Metrics = dict[str, float | int | None]

_LONGEST_LINE = 2**20  # of metrics.jsonl, bytes


class Meter:
    """Means over the images of a log interval, without waiting for the device to know them.

    Each term, and `<term>_q0` to `_q3` over the images of a quarter of the noise levels, from the
    cleanest. Skipped steps do not count.
    """

    def __init__(self, device: torch.device) -> None:
        # Apple's GPUs have no float64.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._device = device
        # Sum and count of each of some names, [N, 2]; together, as few operations a step.
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._begin: dict[str, list[float]] = {}

    def add(self, update: Update, images: int) -> None:
        """Count a step over `images` images."""
        terms = {**update.terms, "grad_norm": update.grad_norm}
        values = torch.stack(list(terms.values())).to(self._dtype) * images
        group, step = sums_and_counts(terms, values, images, update.quartiles)
        step = torch.where(update.bad > 0, torch.zeros_like(step), step)
        if group not in self._sums:
            begin = [self._begin.pop(name, [0.0, 0.0]) for name in group]
            self._sums[group] = torch.tensor(begin, dtype=self._dtype, device=self._device)
        self._sums[group] = self._sums[group] + step

    def means(self) -> Metrics:
        """The mean of each term since the last call (None without a good step); waits."""
        sums, self._sums, self._begin = self.state(), {}, {}
        return {name: total / count if count else None for name, (total, count) in sums.items()}

    def state(self) -> dict[str, list[float]]:
        """Sum and count of each term so far, as JSON values; waits for the device."""
        state = dict(self._begin)
        for group, sums in self._sums.items():
            for name, (total, count) in zip(group, sums.tolist(), strict=True):
                before = state.get(name, (0.0, 0.0))
                state[name] = [before[0] + total, before[1] + count]
        return state

    def load(self, state: dict[str, list[float]]) -> None:
        """Put back what `state` gave."""
        self._sums, self._begin = {}, dict(state)


def sums_and_counts(
    names: Iterable[str], sums: Tensor, images: int, quartiles: dict[str, Tensor]
) -> tuple[tuple[str, ...], Tensor]:
    """The names of terms and of their quarters, and the sum and count [N, 2] of each.

    Args:
        names, sums: of the terms, over `images` images.
        quartiles: as of an `Update`.
    """
    named, pairs = [*names], [torch.stack([sums, torch.full_like(sums, images)], dim=1)]
    for name, values in quartiles.items():
        if name != "images":
            named += [f"{name}_q{quarter}" for quarter in range(4)]
            pairs.append(torch.stack([values, quartiles["images"]], dim=1).to(sums.dtype))
    return tuple(named), torch.cat(pairs)


def finite(value: float) -> float | None:
    """The value as lines of metrics hold it; None for NaN and infinity."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Histogram:
    """How the values of a tensor are spread.

    Attributes:
        counts: values in each bin, [N].
        edges: of the bins, rising, [N + 1].
        total, squares: sums of the values and of their squares.
    """

    counts: NDArray[np.float64]
    edges: NDArray[np.float64]
    total: float
    squares: float


class Tracker(Protocol):
    """Somewhere that metrics and pictures go; the horizontal axis is images seen."""

    def log(self, metrics: Metrics) -> None:
        """Take a line of metrics."""
        ...

    def picture(self, name: str, image: NDArray[np.uint8], images: int) -> None:
        """Take a picture [H, W, C]."""
        ...

    def histograms(self, histograms: dict[str, Histogram], images: int) -> None:
        """Take histograms by their names."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class JsonLines:
    """metrics.jsonl: a JSON object for each log interval, in the order of images seen."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path, opening=True):
            self._file = path.open("a")

    def log(self, metrics: Metrics) -> None:
        with writing(self._path):
            self._file.write(json.dumps(metrics) + "\n")
            self._file.flush()

    def picture(self, name: str, image: NDArray[np.uint8], images: int) -> None:
        pass

    def histograms(self, histograms: dict[str, Histogram], images: int) -> None:
        pass

    def close(self) -> None:
        with writing(self._path):
            self._file.close()


class StatusLines:
    """A line on stderr for each log interval, where no terminal shows a progress bar."""

    def __init__(self, total: int, minutes: float | None = None) -> None:
        self._total, self._minutes = total, minutes

    def log(self, metrics: Metrics) -> None:
        if "loss_per_pixel" not in metrics:
            scores = "  ".join(
                f"{name} {format(value or 0, '.5g')}"
                for name, value in metrics.items()
                if name != "images"
            )
            print(f"{metrics['images']:,} images  {scores}", file=sys.stderr, flush=True)
            return
        images, speed = metrics["images"] or 0, metrics["images_per_second"] or 0
        total = likely_end(metrics, self._total, self._minutes)
        # The last step may go beyond the end.
        seconds = max(total - images, 0) / speed if speed else None
        left = "?" if seconds is None else datetime.timedelta(seconds=round(seconds))
        text = (
            f"{images:,} of {total:,} images  {describe_metrics(metrics)}  "
            f"{quantity(speed)} images/s  {left} left"
        )
        print(text, file=sys.stderr, flush=True)

    def picture(self, name: str, image: NDArray[np.uint8], images: int) -> None:
        pass

    def histograms(self, histograms: dict[str, Histogram], images: int) -> None:
        pass

    def close(self) -> None:
        pass


def likely_end(metrics: Metrics, images: int, minutes: float | None) -> int:
    """How many images a run will have seen at its end: all, or what its minutes suffice for.

    Args:
        metrics: of a log interval.
        images, minutes: `training.images` and `training.minutes`.
    """
    if minutes is None:
        return images
    left = max(60 * minutes - (metrics["seconds"] or 0), 0)
    return min(images, round((metrics["images"] or 0) + left * (metrics["images_per_second"] or 0)))


def describe_metrics(metrics: Metrics) -> str:
    """Loss per pixel, memory, time of a VAE, and skipped steps if there are any, in a few words."""
    loss, skipped = metrics["loss_per_pixel"], metrics["skipped"]
    text = f"loss {'not finite' if loss is None else format(loss, '.4g')}"
    text += f"  memory {metrics['memory_gb']:.1f} GB"
    if (share := metrics.get("encoder_share")) is not None:
        text += f"  encoder {share:.0%} of the time"
    return text + (f"  {skipped} steps skipped" if skipped else "")


def cut_lines(path: Path, images: int) -> None:
    """Keep only the lines up to `images`, so that a resumed run continues the file.

    What cannot be a line of this log is left out, and that is said on stderr.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    lines = [line for line in content.split(b"\n") if line]
    numbers = [_images_of(line) for line in lines]
    kept = [line for line, n in zip(lines, numbers, strict=True) if n is not None and n <= images]
    foreign = [str(index) for index, number in enumerate(numbers, 1) if number is None]
    if foreign:
        # The half line of a killed process, or what another program wrote.
        which = ", ".join(foreign[:5]) + (", …" if len(foreign) > 5 else "")
        print(
            f"note: {path}: {len(foreign)} of {len(lines)} lines are none of this log and are left "
            f"out (line {which})",
            file=sys.stderr,
        )
    text = b"".join(line + b"\n" for line in kept)
    if text != content:
        with atomic_file(path) as file:
            file.write(text)


def read_metrics(run_dir: Path) -> list[Metrics]:
    """The lines of a run's log in their order, without what is no line of it; none without a log.

    Lines of the training, of its validation and of its evaluations stand between each other.
    """
    return MetricsReader(run_dir).read()


class MetricsReader:
    """Reads the log of a run again and again while it grows, and each line once.

    Args:
        run_dir: of the run, whose log may be cut or replaced between two calls.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._file: tuple[int, int] | None = None  # which one it is, of the file system
        self._read = 0
        self._lines: list[Metrics] = []

    def read(self) -> list[Metrics]:
        """The lines so far, see `read_metrics`; half a line at the end is none yet."""
        try:
            with self._path.open("rb") as file:
                state = os.fstat(file.fileno())
                this = state.st_dev, state.st_ino
                if this != self._file or state.st_size < self._read:
                    self._file, self._read, self._lines = this, 0, []
                file.seek(self._read)
                added = file.read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            self._file, self._read, self._lines = None, 0, []
            return []
        *lines, rest = added.split(b"\n")
        self._read += len(added) - len(rest)
        self._lines += [values for values in map(_values, lines) if values is not None]
        last = _values(rest) if rest else None
        return [*self._lines, *([] if last is None else [last])]


def _images_of(line: bytes) -> int | None:
    """The images seen of a line of metrics; None if it is no such line."""
    values = _values(line)
    images = None if values is None else values["images"]
    return images if isinstance(images, int) else None


def _values(line: bytes) -> Metrics | None:
    """A line of metrics; None if it is none."""
    try:
        values = parse_json(line, "line", max_bytes=_LONGEST_LINE, max_depth=1)
    except TesseraError:
        return None
    images = values.get("images") if isinstance(values, dict) else None
    return values if type(images) is int and images >= 0 else None


class TensorBoard:
    """Event files for `tensorboard --logdir`."""

    def __init__(self, folder: Path, images: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with writing(folder, opening=True):
            # What a killed process logged beyond its checkpoint is not shown.
            self._writer = SummaryWriter(str(folder), purge_step=images + 1 if images else None)

    def log(self, metrics: Metrics) -> None:
        with writing(self._folder):
            for name, value in metrics.items():
                if name != "images" and value is not None:
                    self._writer.add_scalar(name, value, metrics["images"])

    def picture(self, name: str, image: NDArray[np.uint8], images: int) -> None:
        with writing(self._folder):
            self._writer.add_image(name, image, images, dataformats="HWC")

    def histograms(self, histograms: dict[str, Histogram], images: int) -> None:
        with writing(self._folder):
            for name, found in histograms.items():
                self._writer.add_histogram_raw(
                    name,
                    min=found.edges[0],
                    max=found.edges[-1],
                    num=found.counts.sum(),
                    sum=found.total,
                    sum_squares=found.squares,
                    bucket_limits=found.edges[1:].tolist(),
                    bucket_counts=found.counts.tolist(),
                    global_step=images,
                )

    def close(self) -> None:
        with writing(self._folder):
            self._writer.close()


class WeightsAndBiases:
    """A run of a Weights & Biases project; a resumed run continues it.

    Raises:
        TrainingError: the project cannot be reached, or nobody is logged in.
    """

    def __init__(self, run_dir: Path, project: str, recipe: Recipe) -> None:
        self._wandb: Any = _wandb()
        marker = run_dir / "wandb-id"
        if not marker.exists():
            with atomic_file(marker, "w") as file:
                file.write(secrets.token_hex(4))
        try:
            self._run = self._wandb.init(
                project=project,
                name=run_dir.name,
                id=marker.read_text(),
                resume="allow",
                dir=str(run_dir),
                config=dump_recipe(recipe),
            )
        except self._wandb.Error as error:
            raise TrainingError(
                f"run.wandb: Weights & Biases does not take the run ({error}). Log in with `wandb "
                "login`, keep it on this machine with WANDB_MODE=offline, or set run.wandb=null; "
                f"then go on with: tessera train --resume {run_dir}"
            ) from error
        self._run.define_metric("*", step_metric="images")

    def log(self, metrics: Metrics) -> None:
        self._run.log({name: value for name, value in metrics.items() if value is not None})

    def picture(self, name: str, image: NDArray[np.uint8], images: int) -> None:
        self._run.log({name: self._wandb.Image(image), "images": images})

    def histograms(self, histograms: dict[str, Histogram], images: int) -> None:
        made = {
            name: self._wandb.Histogram(np_histogram=(found.counts, found.edges))
            for name, found in histograms.items()
        }
        self._run.log({**made, "images": images})

    def close(self) -> None:
        self._run.finish()


def _wandb() -> ModuleType:
    return require_extra("wandb", "log", "run.wandb")


def check(recipe: Recipe) -> None:
    """Refuse trackers that cannot be opened.

    Raises:
        TesseraError: a package is missing; the message names the extra that brings it.
    """
    if recipe.run.wandb is not None:
        _wandb()


def open_trackers(run_dir: Path, recipe: Recipe, images: int, shown: bool = True) -> list[Tracker]:
    """The trackers that the recipe asks for, for a run that goes on after `images` images.

    Args:
        shown: print lines where there is no terminal for a bar.
    """
    cut_lines(run_dir / "metrics.jsonl", images)
    trackers: list[Tracker] = [JsonLines(run_dir / "metrics.jsonl")]
    if recipe.run.tensorboard:
        try:
            trackers.append(TensorBoard(run_dir / "tensorboard", images))
        except ImportError:
            print(
                "note: TensorBoard is not installed, so only metrics.jsonl is written "
                f"({install_command('log')}, or run.tensorboard=false)",
                file=sys.stderr,
            )
    if recipe.run.wandb is not None:
        trackers.append(WeightsAndBiases(run_dir, recipe.run.wandb, recipe))
    if shown and not sys.stderr.isatty():
        trackers.append(StatusLines(recipe.training.images, recipe.training.minutes))
    return trackers


def memory_gb(device: torch.device) -> float:
    """Peak memory of the device so far, GB; on the CPU that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

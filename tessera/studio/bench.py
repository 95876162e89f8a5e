"""One loaded pipeline at a time, and the samples that are made of it."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from tessera.errors import TesseraError
from tessera.images import save_png, visible
from tessera.pipelines.base import Pipeline
from tessera.pipelines.loading import load
from tessera.pipelines.options import Option
from tessera.progress import duration
from tessera.reports.making import Frame, frame_of
from tessera.sampling.core import means
from tessera.sampling.output import image_path
from tessera.sampling.seeds import parse_seeds
from tessera.studio.folder import FolderEntry, StudioFolder

MOST = 64
"""Images of one request."""
_AT_ONCE = 16
_STRIPS = 4  # images whose making is shown
_LABELS: dict[str | int, str | int | None] = {"random": None, "none": -1}

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """Samples that somebody wants.

    Attributes:
        name: of the run or pipeline.
        seeds: as text, like "0-7,100".
        label: index or name of a class, "balanced", "none", or "random", one for each seed.
        options: of sampling, `name: value`; values may be text.
    """

    name: str
    seeds: str = "0-7"
    label: str | int = "random"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Making:
    """Samples while they are made, and when they are done.

    Attributes:
        share: how far they are, 0 to 1.
        frames: moments of the first images' making, so far.
        seeds, images, labels: of those that are done: [n], uint8 [n, H, W, C], classes in words.
        facts: what is known of all of them, in words; empty until they are done.
    """

    share: float
    frames: tuple[Frame, ...] = ()
    seeds: tuple[int, ...] = ()
    images: NDArray[np.uint8] | None = None
    labels: tuple[str, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)


class Bench:
    """Holds one pipeline; all that is done with it is done by one thread.

    Args:
        folder: where pipelines are.
        device: that they are moved to; None for the fastest.
    """

    def __init__(self, folder: StudioFolder, device: str | None = None) -> None:
        self._folder, self._device = folder, device
        self._key: tuple[str, float] | None = None
        self._pipe: Pipeline | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="bench")

    def names(self) -> list[str]:
        """Of what makes images."""
        return [entry.name for entry in self._folder.entries() if entry.makes_images]

    def about(self, name: str | None, sampler: str | None = None) -> tuple[Pipeline, list[Option]]:
        """A pipeline and its options, by another kind of sampler if one is named.

        Raises:
            TesseraError: it cannot be loaded, or there is no such sampler.
        """

        def look() -> tuple[Pipeline, list[Option]]:
            pipe = self._open(name)
            return pipe, pipe.options(sampler)

        return self._worker.submit(look).result()

    def make(self, request: Request) -> Iterator[Making]:
        """Make samples; what is there so far, at some of the steps, and at last all of it.

        Left early, it stops after the step.

        Raises:
            TesseraError: no seeds, too many, or options that the model cannot have.
        """
        return _relayed(self._worker, lambda: self._made(request))

    def close(self) -> None:
        """Let go of the pipeline."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._pipe = None

    def _open(self, name: str | None) -> Pipeline:
        entry = self._folder.entry(name)
        if not entry.makes_images:
            raise TesseraError(
                f"{entry.name} has no pipeline yet: a run writes one with its first checkpoint"
            )
        key = entry.name, _written(entry)
        if self._pipe is None or key != self._key:
            self._pipe = self._key = None  # one at a time, also while the next is loaded
            self._pipe, self._key = load(entry.path, device=self._device), key
        return self._pipe

    @torch.no_grad()
    def _made(self, request: Request) -> Generator[Making]:
        pipe = self._open(request.name)
        seeds = parse_seeds(request.seeds)
        if not 0 < len(seeds) <= MOST:
            raise TesseraError(
                f"`seeds={request.seeds}`: {len(seeds)} images. One request makes 1 to {MOST}; "
                "more are made by: tessera sample"
            )
        label = _LABELS.get(request.label, request.label)
        plan = pipe.plan(seeds, label, **request.options)
        began = _now(pipe.device)
        frames: list[Frame] = []
        images: list[NDArray[np.uint8]] = []
        classes: list[int] = []
        parts = np.array_split(np.arange(len(seeds)), -(-len(seeds) // _AT_ONCE))
        for part in parts:
            done = sum(map(len, images))
            with contextlib.closing(pipe.states(plan, part)) as states:
                for step in states:
                    state = step[1]
                    frame = frame_of(pipe, state, _STRIPS) if not done else None
                    frames += [] if frame is None else [frame]
                    share = (done + len(part) * state.step / state.steps) / len(seeds)
                    yield Making(share, tuple(frames))
            labels, state = step
            images.append(pipe.to_pixels(plan.picture(state.x)))
            classes += [] if labels is None else labels.tolist()
        seconds = _now(pipe.device) - began
        facts = {
            "made": f"{len(seeds)} in {duration(seconds)}, "
            f"{len(seeds) / max(seconds, 1e-9):.3g} images/s",
            "model": f"{request.name}, trained on {pipe.images_seen:,} images",
            **{name.replace("_", " "): f"{v:.4g}" for name, v in means(plan.report()).items()},
        }
        names = tuple(class_name(pipe, label) for label in classes)
        yield Making(1.0, tuple(frames), tuple(seeds), np.concatenate(images), names, facts)


def class_name(pipe: Pipeline, label: int) -> str:
    """A class in words."""
    if label < 0:
        return "no class"
    return str(label) if pipe.class_names is None else pipe.class_names[label]


def _written(entry: FolderEntry) -> float:
    """When a pipeline was written: a run that is trained on writes others in its place."""
    config = entry.path / ("pipeline/config.json" if entry.is_run else "config.json")
    try:
        return config.stat().st_mtime
    except OSError:
        return 0.0


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def _relayed(worker: ThreadPoolExecutor, make: Callable[[], Generator[T]]) -> Iterator[T]:
    """What a generator yields in the worker's thread, for whatever threads ask here.

    Arithmetic and gradients are switched by thread, so that a generator must not change it.
    """
    passed: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=2)
    left = threading.Event()

    def put(item: T | None, error: BaseException | None) -> None:
        while not left.is_set():
            with contextlib.suppress(queue.Full):
                passed.put((item, error), timeout=0.1)
                return

    def work() -> None:
        try:
            with contextlib.closing(make()) as items:
                for item in items:
                    put(item, None)
                    if left.is_set():
                        return
        except BaseException as error:
            put(None, error)
        else:
            put(None, None)

    worker.submit(work)
    try:
        while True:
            item, error = passed.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        left.set()


def saved_pngs(made: Making, folder: Path) -> list[Path]:
    """Finished samples as files, named as `tessera sample` names them."""
    assert made.images is not None
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for seed, image in zip(made.seeds, visible(made.images), strict=True):
        path = image_path(folder, seed)
        save_png(path, image)
        paths.append(path)
    return paths

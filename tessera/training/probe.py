"""A few seconds of real training steps, of a learner that is thrown away afterwards.

Nothing of it reaches the run: weights and random numbers of a run follow from its seed, and the
learner of the run is made when this one is gone.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tessera import distributed
from tessera.data.dataset import ImageDataset
from tessera.data.loader import Batch, StepKind
from tessera.data.parallel import cores
from tessera.errors import TesseraError
from tessera.pipelines.loading import build_pipeline
from tessera.progress import progress
from tessera.recipes.parts import NO_PARTS, Parts
from tessera.recipes.schema import Recipe
from tessera.training import tracking
from tessera.training.feed import Feed
from tessera.training.forecast import DISTURBED, Timings, course
from tessera.training.learner import Learner, fresh_model, learner_of
from tessera.training.others import OtherPrograms

SECONDS = 5.0
_SHARE = 0.02  # of the run that may be spent on telling how long it takes
_READ_AHEAD = 12  # steps whose reading is timed
_SAMPLED_AT_ONCE = 64
_WRITTEN = 1 << 24  # bytes
_BUSY = 0.95  # of the processors that a step could use, that it does use


class _Blank:
    """Reads black images, or latents of such, whatever the recipe trains on."""

    def __init__(self, recipe: Recipe) -> None:
        data, (channels, height, width) = recipe.data, recipe.shape
        self._dtype: Any = np.float16
        self.shape = (2 * channels, height, width)
        if recipe.codec.takes_images:
            # Latents are shrunk when they have been made, pixels when they are read.
            side = data.resolution * (1 if recipe.codec.of_pixels else data.shrink)
            self.shape, self._dtype = (data.channels, side, side), np.uint8

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        return np.zeros((len(indices), *self.shape), self._dtype)

    def close(self) -> None:
        pass


def blank_images(recipe: Recipe) -> ImageDataset:
    """Black images in the place of a data set that is not there."""
    count, classes = recipe.training.batch, recipe.data.num_classes
    labels = np.arange(count) % classes if classes else None
    numbers = np.arange(count, dtype=np.int64)
    return ImageDataset("blank", "blank", _Blank(recipe), labels, None, numbers, xflip=False)


def measure(
    recipe: Recipe,
    feed: Feed,
    device: torch.device,
    seconds: float = SECONDS,
    *,
    parts: Parts = NO_PARTS,
    validated: int = 0,
    show: bool = True,
) -> Timings:
    """Time the parts of the run of `recipe` on this machine, and note the memory that they need.

    Steps that do not fit into the time are timed with fewer images. All processes take part.

    Args:
        seconds: about how long; much less for runs that are soon over.
        parts: functions that make external parts.
        validated: images of a validation.
        show: with a progress bar where there is a terminal.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if recipe.run.tensorboard and distributed.is_main():
        with contextlib.suppress(ImportError):  # it needs memory, and the run will say if missing
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    shown = progress("measuring", seconds) if show else contextlib.nullcontext(None)
    with shown as bar:
        tick = bar.update if bar else lambda done: None
        bench = _Bench(recipe, feed, device, parts, validated, seconds, tick)
        result = bench.measured()
    del bench
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return result


class _Bench:
    """A learner like that of the run, and what is timed with it."""

    def __init__(
        self,
        recipe: Recipe,
        feed: Feed,
        device: torch.device,
        parts: Parts,
        validated: int,
        seconds: float,
        tick: Callable[[float], None],
    ) -> None:
        self._recipe, self._feed, self._device = recipe, feed, device
        self._seconds, self._tick = seconds, tick
        self._begin = time.perf_counter()
        self._others = OtherPrograms()
        self._parts, self._validated = parts, validated
        self._learner: Learner = learner_of(
            recipe, fresh_model(recipe, device, parts), device, parts
        )
        self._meter = tracking.Meter(device)
        self._states = self._peak()
        self._stepped = self._worked = 0.0
        self._memory = self._states

    def measured(self) -> Timings:
        """Everything, one after the other."""
        _, plans = course(self._feed.view, 0, self._recipe.training.images)
        read, cpu = self._reading()
        with self._feed.load(plans.values()) as loader:
            batches = dict(zip(plans, loader, strict=True))
        steps: dict[StepKind, float] = {}
        for left, (kind, batch) in zip(range(len(batches), 0, -1), batches.items(), strict=True):
            computed = self._step_seconds(batch, left)
            steps[kind] = self._with_reading(computed, read * kind[0], cpu * kind[0])
        per_image = min(t / images for (images, *_), t in steps.items())
        preview, scores = self._sampling(per_image)
        checkpoint, validation = self._checkpoint(), self._validation(per_image)
        memory = max(self._memory, self._peak()) + self._pages_of_data()
        peak = max(distributed.gather(memory))
        others = max(distributed.gather(self._others.share()))
        alone = self._alone(others)
        return Timings(steps, preview, scores, checkpoint, peak, validation, others, alone)

    # ------------------------------------------------------------------------------------- steps

    def _step_seconds(self, batch: Batch, kinds_left: int) -> float:
        """Seconds of a step over `batch`, without reading it."""
        count = len(batch.numbers)
        if count == 1 or self._recipe.training.compile:  # which compiles for every size anew
            found = self._repeated(batch, count, 0)
            self._memory = max(self._memory, self._peak())
            return found
        size, seconds, slope = 1, self._repeated(batch, 1, 0), 0.0
        run = seconds * self._recipe.training.images
        self._seconds = min(self._seconds, max(_SHARE * run, 1e-3))
        end = self._elapsed() + max(self._seconds - self._elapsed(), 0) / kinds_left
        peak, grown = self._peak(), 0.0
        while size < count:
            # One step to warm up and one that counts; as for one image, until two sizes are known.
            affordable = (end - self._elapsed()) / 2 - seconds
            larger = min(count, size + int(affordable / (slope or seconds)))
            if larger < min(2 * size, count):
                if slope:
                    break
                larger = 2
            found = self._repeated(batch, larger, end - self._elapsed() if larger == count else 0)
            slope = max(found - seconds, 0.1 * found) / (larger - size)
            grown = max(grown, (self._peak() - peak) / (larger - size))
            size, seconds, peak = larger, found, self._peak()
        at_once = min(count, self._recipe.training.micro_batch or count)
        needed = self._peak() + grown * max(at_once - size, 0)
        self._memory = max(self._memory, round(needed))
        return seconds + slope * (count - size)

    def _repeated(self, batch: Batch, count: int, budget: float) -> float:
        """Mean seconds of steps over the first `count` images of `batch`, after a warm-up."""
        part = batch.map(lambda tensor: tensor[:count])
        times = [self._step(part)]
        while len(times) < 2 or sum(times) + times[-1] < budget:
            times.append(self._step(part))
        return sum(times[1:]) / (len(times) - 1)

    def _step(self, batch: Batch) -> float:
        """Seconds of the slowest process, so that all decide alike."""
        begin, cpu = time.perf_counter(), time.process_time()
        update = self._learner.update(
            self._feed.micro_batches(batch), batch.plan.images, batch.plan.first_image
        )
        self._meter.add(update, batch.plan.images)
        self._finish()
        self._tick(self._elapsed())
        self._stepped += time.perf_counter() - begin
        self._worked += time.process_time() - cpu
        return max(distributed.gather(time.perf_counter() - begin))

    def _alone(self, others: float) -> float:
        """Share of a step's time that it would take if other programs took nothing."""
        if self._device.type != "cpu" or others < DISTURBED or not self._worked:
            return 1.0
        ours = min(torch.get_num_threads(), cores())
        share = self._worked / (_BUSY * ours * self._stepped)
        return min(max(distributed.gather(share)), 1.0)

    # ------------------------------------------------------------------------------------- data

    def _reading(self) -> tuple[float, float]:
        """Seconds, and seconds of processor time, for an image of all processes to be read."""
        data, plans, position = self._recipe.data, [], 0
        for _ in range(_READ_AHEAD):
            plans.append(self._feed.view.plan(position))
            position += plans[-1].images
        result = (0.0, 0.0)
        for _ in range(2 if data.cache else 1):  # most of a run reads what is in the cache
            images, begin, cpu = 0, time.perf_counter(), time.process_time()
            with self._feed.load(plans) as loader:
                for batch in loader:
                    images += batch.plan.images
                    if time.perf_counter() - begin > 0.1 * self._seconds:
                        break
                seconds = time.perf_counter() - begin
            result = (seconds / images, (time.process_time() - cpu) / images)
        return result

    def _with_reading(self, computed: float, read: float, cpu: float) -> float:
        """Seconds of a step, given those of its parts."""
        if self._recipe.data.workers == 0:
            return max(distributed.gather(computed + read))
        # Threads read ahead; on a CPU they take their share of the cores.
        busy = 0.0
        if self._device.type == "cpu":
            ours = cores() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            busy = (computed * torch.get_num_threads() + cpu) / ours
        return max(distributed.gather(max(computed, read, busy)))

    def _pages_of_data(self) -> int:
        """Bytes of the data set that this process will hold beside what it has now."""
        dataset, data = self._feed.dataset, self._recipe.data
        held = data.cache or getattr(dataset, "kind", None) in ("packed", "latents")
        if not held or self._device.type != "cpu":
            return 0
        images = min(len(dataset) // (2 if data.xflip else 1), self._recipe.training.images)
        return int(images * dataset.read(np.zeros(1, np.int64)).nbytes)

    # ------------------------------------------------------------------------------------ events

    def _sampling(self, per_image: float) -> tuple[float, float]:
        """Seconds of a preview and of the samples for scores."""
        preview, scores = self._recipe.run.preview, self._recipe.evaluate
        if self._recipe.expert is not None:  # which makes no images alone
            preview = scores = None
        seconds = (0.0, 0.0)
        if distributed.is_main() and (preview is not None or scores is not None):
            shown = preview.rows * preview.columns if preview else 0
            wanted = shown or (scores.batch if scores else 0)
            batch = math.ceil(wanted / math.ceil(wanted / _SAMPLED_AT_ONCE))
            # A training step is three evaluations or so, a step of a sampler at most two.
            affordable = int(0.1 * self._seconds / max(per_image, 1e-9))
            each = self._sampled(max(1, min(batch, affordable)))
            scored = scores.images / distributed.world() if scores else 0
            seconds = (each * shown, each * scored)
        return distributed.broadcast(seconds)

    def _sampled(self, batch: int) -> float:
        """Seconds for an image from the recipe's sampler, from two of its steps."""
        model = fresh_model(self._recipe, self._device, self._parts)
        pipe = build_pipeline(self._recipe, model, parts=self._parts).to(self._device)
        pictures = self._feed.start_pictures(batch)
        start = {} if pictures is None else {"start_from": pictures}
        try:
            plan = pipe.plan(range(batch), **start)
        except TesseraError:  # no decoder: the run says so, and makes no previews
            return 0.0
        seconds, steps, begin = 0.0, 1, time.perf_counter()
        with contextlib.closing(pipe.states(plan, range(batch))) as states:
            for _, state in itertools.islice(states, 2):  # the first is to warm up
                self._finish()
                steps, seconds = state.steps, time.perf_counter() - begin
                begin = time.perf_counter()
        return seconds * steps / batch

    def _validation(self, per_image: float) -> float:
        """Seconds of a validation: forward passes, of which a training step is three or so.

        What encodes the images works as much as in the training.
        """
        encoder = self._feed.reports(self._stepped).get("encoder_share", 0.0)
        return self._validated * per_image * (encoder + (1 - encoder) / 3)

    def _checkpoint(self) -> float:
        """Seconds to write, read back and hash what a checkpoint and a pipeline hold."""
        training = sum(tensor.nbytes for tensor in self._learner.tensors().values())
        weights = sum(parameter.nbytes for parameter in self._learner.parameters)
        total = training + len(self._recipe.ema) * weights
        if self._device.type == "cpu":
            # Gradients, and copies of the largest file's tensors, but no activations.
            self._memory = max(self._memory, self._states + 3 * weights)
        size = min(total, _WRITTEN)
        begin = time.perf_counter()
        # A file without a name: nothing is left of it, whatever happens.
        with (
            contextlib.suppress(OSError),
            tempfile.TemporaryFile(dir=_existing(Path(self._recipe.run.dir or "."))) as file,
        ):
            file.write(bytes(size))
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            hashlib.file_digest(file, "sha256")
        return max(distributed.gather((time.perf_counter() - begin) * total / size))

    # ------------------------------------------------------------------------------------- tools

    def _elapsed(self) -> float:
        """Seconds since the beginning, of the slowest process."""
        return max(distributed.gather(time.perf_counter() - self._begin))

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()

    def _peak(self) -> int:
        return round(tracking.memory_gb(self._device) * 1e9)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(f for f in itertools.chain([folder], folder.absolute().parents) if f.is_dir())

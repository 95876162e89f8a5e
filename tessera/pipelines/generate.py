"""Sampling to files, by one process or several, each making its share of the seeds."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera import distributed
from tessera.channels import MAX_CHANNELS
from tessera.conditioning import NO_CLASS
from tessera.files import atomic_file, user_path
from tessera.images import open_image, read_array, save_image
from tessera.model import is_cut
from tessera.pipelines.base import Pipeline
from tessera.pipelines.plan import Plan, SampledBatch, counting_steps
from tessera.pipelines.usage import Usage
from tessera.progress import progress
from tessera.sampling.core import SamplerState, means
from tessera.sampling.output import (
    SETTINGS_FILE,
    Trajectory,
    claim_folder,
    image_path,
    read_labels,
    write_labels,
)


@dataclass(frozen=True)
class JobSummary:
    """What a sampling job did, over all processes.

    Attributes:
        made: images made.
        skipped: images that were there already.
        seconds: time from the first to the last image.
        evaluations: network evaluations per image made (NFE); guidance counts its two.
        saved_flops: share of the FLOPs that was saved by running parts of networks, as counted on
            the main process; None if all networks ran whole.
        saved_seconds: the same of the time; None if there is nothing to compare with.
        reported: what refinements say about the samples, see `Pipeline.reported`.
    """

    made: int
    skipped: int
    seconds: float
    evaluations: float
    saved_flops: float | None = None
    saved_seconds: float | None = None
    reported: dict[str, float] = field(default_factory=dict)


class Job:
    """Which images to make, and how; everything is checked before anything is written.

    Args:
        seeds: one per image, each once.
        label: class of all images (index, name, "balanced"); None to draw one for each.
        batch: most images at once on one device.
        options: further options of `Pipeline.sample_batches`.

    Attributes:
        plan: the checked options, ready to run.

    Raises:
        TesseraError: those of `Pipeline.sample_batches`.
    """

    def __init__(
        self,
        pipe: Pipeline,
        seeds: Sequence[int],
        label: int | str | None,
        batch: int,
        options: dict[str, Any],
    ) -> None:
        self.pipe, self.seeds, self.label, self.batch = pipe, seeds, label, batch
        self.options = options
        self.plan: Plan = pipe.plan(seeds, label, **options)
        self.rows = {seed: row for row, seed in enumerate(seeds)}

    def settings(self) -> dict[str, Any]:
        """All that decides what the image of a seed looks like, as plain JSON values."""
        return self.pipe.facts(self.plan, self.label)

    def labels(self, seeds: Sequence[int]) -> NDArray[np.int64]:
        """The classes of the images of some of the seeds."""
        return self.pipe.drawn_labels(self.plan, [self.rows[seed] for seed in seeds])

    def saved_flops(self) -> float | None:
        """Share of the FLOPs that running parts of networks saves; None if all run whole."""
        whole = self.pipe.networks()
        if all(any(network is w for w in whole) for network in self.plan.networks()):
            return None
        plain = {name: v for name, v in self.options.items() if name not in self._network_options()}
        own, full = (
            self.pipe.cost(**{k: v for k, v in options.items() if k not in _NOT_COUNTED})
            for options in (self.options, plain)
        )
        return 1 - own.sample_flops / full.sample_flops

    def _network_options(self) -> set[str]:
        return {option.name for option in self.pipe.options() if option.section.endswith("network")}


# Options that are tensors or models, and change nothing of what is computed.
_NOT_COUNTED = {"latents", "guide"}


def share_of_seeds(seeds: Sequence[int], batch: int, rank: int, world: int) -> list[int]:
    """The seeds of one of several processes: every world-th of near-equal batches."""
    count = math.ceil(len(seeds) / (batch * world)) * world
    parts = np.array_split(np.asarray(seeds, dtype=object), max(count, 1))
    return [int(seed) for part in parts[rank::world] for seed in part]


def generate_folder(
    job: Job, folder: Path, *, subdirs: bool = False, trajectory: Trajectory | None = None
) -> JobSummary:
    """Write a PNG (or array) for each seed; images that are there already are not made again.

    Models with classes also leave `dataset.json`, the class of each file.

    Raises:
        TesseraError: the folder holds something else, or images of other settings.
    """
    folder = user_path(folder)
    channels = job.pipe.codec.image_shape(job.plan.shape)[0]
    paths = {seed: image_path(folder, seed, subdirs, channels) for seed in job.seeds}
    with _claim_taken_back(folder, list(paths.values())):
        return _generate(job, folder, paths, trajectory)


@contextlib.contextmanager
def _claim_taken_back(folder: Path, images: Sequence[Path]) -> Iterator[None]:
    """When the block fails before any image is there, remove the settings that it wrote."""
    settings = folder / SETTINGS_FILE
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    claimed = settings.exists()
    try:
        yield
    except BaseException:
        if distributed.is_main() and not claimed and not any(path.exists() for path in images):
            settings.unlink(missing_ok=True)
            for path in [*{image.parent for image in images} - {folder}, *new]:
                with contextlib.suppress(OSError):  # something else is in it
                    path.rmdir()
        raise


def _generate(
    job: Job, folder: Path, paths: dict[int, Path], trajectory: Trajectory | None
) -> JobSummary:
    with distributed.main_first():
        if distributed.is_main():
            claim_folder(folder, job.settings())
    # Decided on by one process before any writes, so that all agree.
    there = distributed.broadcast({seed for seed, path in paths.items() if path.exists()})

    with ThreadPoolExecutor(4) as writers:
        pending: list[Any] = []
        made: dict[int, int] = {}

        def keep(done: SampledBatch) -> None:
            if done.labels is not None:
                made.update(zip(done.seeds, done.labels.tolist(), strict=True))
            # One batch is written while the next is computed.
            for future in pending:
                future.result()
            pending[:] = [
                writers.submit(save_image, paths[seed], image)
                for seed, image in zip(done.seeds, done.images, strict=True)
            ]

        summary = _run(job, there, keep, trajectory)
        for future in pending:
            future.result()
    distributed.barrier()
    gathered = distributed.gather(made)
    if distributed.is_main() and job.pipe.model.num_classes:
        _write_labels(job, folder, paths, {k: v for part in gathered for k, v in part.items()})
    return summary


def _write_labels(job: Job, folder: Path, paths: dict[int, Path], labels: dict[int, int]) -> None:
    """Leave the class of each file; those of images of earlier runs are drawn if not written."""
    names = {seed: path.relative_to(folder).as_posix() for seed, path in paths.items()}
    written = read_labels(folder)
    missing = [s for s, name in names.items() if s not in labels and name not in written]
    labels |= dict(zip(missing, job.labels(missing).tolist(), strict=True))
    write_labels(folder, {names[s]: label for s, label in labels.items() if label != NO_CLASS})


def generate_arrays(
    job: Job, scratch: Path, *, trajectory: Trajectory | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None, JobSummary]:
    """All images uint8 [N, H, W, C] and their classes [N] (None without) in the order of the seeds.

    Only the main process gets the images; those of the others pass through hidden files in the
    folder `scratch`.
    """
    place = {seed: index for index, seed in enumerate(job.seeds)}
    channels, height, width = job.pipe.codec.image_shape(job.plan.shape)
    shape = (len(job.seeds), height, width, channels)
    own: list[SampledBatch] = []
    summary = _run(job, set(), own.append, trajectory)

    rank, world = distributed.rank(), distributed.world()
    key = hashlib.sha256(repr((list(job.seeds), str(scratch))).encode()).hexdigest()[:12]
    files = [scratch / f".samples-{key}-{index}.npy" for index in range(world)]
    seeds = distributed.gather([seed for batch in own for seed in batch.seeds])
    images = np.zeros(shape, np.uint8)
    try:
        if rank != 0:
            with atomic_file(files[rank]) as file:
                np.save(file, np.concatenate([np.zeros((0, *shape[1:]), np.uint8),
                                              *(batch.images for batch in own)]))  # fmt: skip
        distributed.barrier()
        if rank == 0:
            for batch in own:
                images[[place[seed] for seed in batch.seeds]] = batch.images
            for index in range(1, world):
                rows = [place[seed] for seed in seeds[index]]
                images[rows] = np.load(files[index], mmap_mode="r")
    finally:
        if rank == 0:
            for path in files:
                path.unlink(missing_ok=True)
    labels = {
        seed: int(label)
        for batch in own
        if batch.labels is not None
        for seed, label in zip(batch.seeds, batch.labels, strict=True)
    }
    drawn = {seed: label for part in distributed.gather(labels) for seed, label in part.items()}
    if not job.pipe.model.num_classes:
        return images, None, summary
    return images, np.array([drawn[seed] for seed in job.seeds], np.int64), summary


def read_images(folder: Path, seeds: Sequence[int], subdirs: bool = False) -> NDArray[np.uint8]:
    """The images of `generate_folder`, uint8 [N, H, W, C], in the order of the seeds."""
    folder = user_path(folder)
    images = [_read_image(folder, seed, subdirs) for seed in seeds]
    return np.stack([image if image.ndim == 3 else image[:, :, None] for image in images])


def _read_image(folder: Path, seed: int, subdirs: bool) -> NDArray[np.uint8]:
    array = image_path(folder, seed, subdirs, MAX_CHANNELS)
    if array.exists():
        return read_array(array.read_bytes(), str(array))
    return np.asarray(open_image(image_path(folder, seed, subdirs)))


def _run(
    job: Job,
    there: set[int],
    keep: Callable[[SampledBatch], None],
    trajectory: Trajectory | None,
) -> JobSummary:
    """Make this process's share of the images that are not `there`."""
    # The main process makes the images of the animation first, as a batch of their own.
    filmed: list[int] = []
    if trajectory is not None:
        filmed = list(job.seeds[: min(job.batch, trajectory.MAX_IMAGES)])
    rest = [seed for seed in job.seeds if seed not in set(filmed)]
    ours = share_of_seeds(rest, job.batch, distributed.rank(), distributed.world())
    ours = [seed for seed in ours if seed not in there]
    if not distributed.is_main():
        filmed = []

    start = time.perf_counter()
    total = len(filmed) + len(ours)
    usage = Usage(job.plan.networks(), job.pipe.device.type == "cuda")
    with progress("sampling", total, unit="images") as bar, usage.watch():

        def film(seeds: Sequence[int], state: SamplerState) -> None:
            if filmed and trajectory is not None and list(seeds) == filmed:
                trajectory(state)

        on_step = counting_steps(bar, film)

        batches = (
            job.pipe.run(job.plan, [job.rows[seed] for seed in part], job.batch, on_step)
            for part in (filmed, ours)
        )
        for done in itertools.chain.from_iterable(batches):
            keep(done)
    seconds = time.perf_counter() - start
    if filmed and trajectory is not None:
        trajectory.save()

    reports = distributed.gather((total, usage.evaluations, seconds))
    made = sum(report[0] for report in reports)
    return JobSummary(
        made=made,
        skipped=len(job.seeds) - made,
        seconds=max(report[2] for report in reports),
        evaluations=sum(report[1] for report in reports) / max(made, 1),
        saved_flops=job.saved_flops() if total and distributed.is_main() else None,
        # Of a model whose own calls differ in cost there is no whole one to compare with.
        saved_seconds=None if is_cut(job.pipe.model) else usage.seconds_saved(job.pipe.networks()),
        reported=means(*distributed.gather(job.plan.report())),
    )

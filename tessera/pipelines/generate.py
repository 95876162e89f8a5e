"""Sampling to files, by one process or several, each making its share of the seeds."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from tessera import distributed
from tessera.conditioning import NO_CLASS
from tessera.cost import choose_bricks
from tessera.files import atomic_file
from tessera.images import save_png
from tessera.pipelines.bricks import Savings, Usage
from tessera.pipelines.canvas import OPTIONS as CANVAS_OPTIONS
from tessera.pipelines.canvas import choose_canvas
from tessera.pipelines.options import choose_sampler, class_index
from tessera.pipelines.pipeline import Pipeline, SampledBatch
from tessera.progress import progress
from tessera.recipes.build import build_sampler
from tessera.sampling.core import SamplerState
from tessera.sampling.output import (
    SETTINGS_FILE,
    Trajectory,
    claim_folder,
    image_path,
    write_labels,
)


@dataclass(frozen=True)
class Summary:
    """What a sampling job did, over all processes.

    Attributes:
        made: images made.
        skipped: images that were there already.
        seconds: time from the first to the last image.
        evaluations: network evaluations per image made (NFE); guidance counts its two.
        savings: what skipped bricks saved, on the main process; None if none were skipped.
    """

    made: int
    skipped: int
    seconds: float
    evaluations: float
    savings: Savings | None = None


@dataclass(frozen=True)
class Job:
    """Which images to make, and how.

    Attributes:
        seeds: one per image, each once.
        label: class of all images (index, name, "balanced"); None to draw one for each.
        batch: most images at once on one device.
        options: further options of `Pipeline.sample_batches`.
    """

    pipe: Pipeline
    seeds: Sequence[int]
    label: int | str | None
    batch: int
    options: dict[str, Any]

    def __post_init__(self) -> None:
        # Mistakes are found here, before anything is written.
        self.pipe.check(self.seeds, self.label, **self.options)

    def settings(self) -> dict[str, Any]:
        """All that decides what the image of a seed looks like, as plain JSON values."""
        pipe, guide = self.pipe, self.options.get("guide")
        own = {"guidance", "guidance_interval", "guide", "precision", "skip", "bricks", "low_res"}
        own |= {"latents", *CANVAS_OPTIONS}
        sampler = choose_sampler(
            pipe.recipe, {k: v for k, v in self.options.items() if k not in own}
        )
        schedule = choose_bricks(
            pipe.recipe,
            pipe.denoiser,
            build_sampler(sampler),
            self.options.get("skip", 0.0),
            self.options.get("bricks"),
        )
        canvas = choose_canvas(pipe.recipe, **self.options)
        label = self.label
        if label is not None and label != "balanced":
            label = class_index(label, pipe.denoiser.num_classes, pipe.class_names)
        small, latents = self.options.get("low_res"), self.options.get("latents")
        return {
            "recipe": pipe.recipe.name,
            "images_seen": pipe.images_seen,
            "weights": pipe.checksum,
            "class": label,
            "guidance": self.options.get("guidance", 1.0),
            "guidance_interval": self.options.get("guidance_interval"),
            "guide": guide.checksum if guide is not None else None,
            "precision": self.options.get("precision", "fp32"),
            "canvas": None if canvas == choose_canvas(pipe.recipe) else _plain(asdict(canvas)),
            "bricks": None if schedule is None else str(schedule),
            "low_res": None if small is None else _digest(small),
            **({} if latents is None else {"latents": _digest(latents.cpu().numpy())}),
            **({} if pipe.codec.describe() is None else {"codec": pipe.codec.describe()}),
            "sampler": {k: "inf" if v == math.inf else v for k, v in sampler.model_dump().items()},
        }


def _digest(array: NDArray[Any]) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def share(seeds: Sequence[int], batch: int, rank: int, world: int) -> list[int]:
    """The seeds of one of several processes: every world-th of near-equal batches."""
    count = math.ceil(len(seeds) / (batch * world)) * world
    parts = np.array_split(np.asarray(seeds, dtype=object), max(count, 1))
    return [int(seed) for part in parts[rank::world] for seed in part]


def generate_folder(
    job: Job, folder: Path, *, subdirs: bool = False, trajectory: Trajectory | None = None
) -> Summary:
    """Write a PNG for each seed; images that are there already are not made again.

    Models with classes also leave `dataset.json`, the class of each file.

    Raises:
        TesseraError: the folder holds images of other settings.
    """
    paths = {seed: image_path(folder, seed, subdirs) for seed in job.seeds}
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
) -> Summary:
    with distributed.main_first():
        if distributed.is_main():
            claim_folder(folder, job.settings(), list(paths.values()))
    # Decided on by one process before any writes, so that all agree.
    there = distributed.broadcast({seed for seed, path in paths.items() if path.exists()})

    with ThreadPoolExecutor(4) as writers:
        pending: list[Any] = []

        def keep(done: SampledBatch) -> None:
            # One batch is written while the next is computed.
            for future in pending:
                future.result()
            pending[:] = [
                writers.submit(save_png, paths[seed], image)
                for seed, image in zip(done.seeds, done.images, strict=True)
            ]

        summary = _run(job, there, keep, trajectory)
        for future in pending:
            future.result()
    distributed.barrier()
    if distributed.is_main() and job.pipe.denoiser.num_classes:
        labels = job.pipe.labels(job.seeds, job.label, **job.options)
        names = [path.relative_to(folder).as_posix() for path in paths.values()]
        pairs = zip(names, labels.tolist(), strict=True)
        write_labels(folder, {name: label for name, label in pairs if label != NO_CLASS})
    return summary


def generate_arrays(
    job: Job, scratch: Path, *, trajectory: Trajectory | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None, Summary]:
    """All images uint8 [N, H, W, C] and their classes [N] (None without) in the order of the seeds.

    Only the main process gets the images; those of the others pass through hidden files in the
    folder `scratch`.
    """
    place = {seed: index for index, seed in enumerate(job.seeds)}
    canvas = choose_canvas(job.pipe.recipe, **job.options)
    channels, height, width = job.pipe.codec.image_shape((canvas.channels, *canvas.shown))
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
    classes = (
        job.pipe.labels(job.seeds, job.label, **job.options)
        if job.pipe.denoiser.num_classes
        else None
    )
    return images, classes, summary


def read_images(folder: Path, seeds: Sequence[int], subdirs: bool = False) -> NDArray[np.uint8]:
    """The images of `generate_folder`, uint8 [N, H, W, C], in the order of the seeds."""
    images = [np.asarray(Image.open(image_path(folder, seed, subdirs))) for seed in seeds]
    return np.stack([image if image.ndim == 3 else image[:, :, None] for image in images])


def _run(
    job: Job,
    there: set[int],
    keep: Callable[[SampledBatch], None],
    trajectory: Trajectory | None,
) -> Summary:
    """Make this process's share of the images that are not `there`."""
    # The main process makes the images of the animation first, as a batch of their own.
    filmed: list[int] = []
    if trajectory is not None:
        filmed = list(job.seeds[: min(job.batch, trajectory.MAX_IMAGES)])
    rest = [seed for seed in job.seeds if seed not in set(filmed)]
    ours = share(rest, job.batch, distributed.rank(), distributed.world())
    ours = [seed for seed in ours if seed not in there]
    if not distributed.is_main():
        filmed = []

    start = time.perf_counter()
    total = len(filmed) + len(ours)
    usage = Usage(job.pipe)
    with (
        progress("sampling", total, unit="images") as bar,
        counted(job) as evaluated,
        usage.watch(),
    ):

        def on_step(seeds: Sequence[int], state: SamplerState) -> None:
            bar.advance(len(seeds) / state.steps)
            if filmed and trajectory is not None and list(seeds) == filmed:
                trajectory(state)

        batches = (
            job.pipe.sample_batches(
                part, job.label, batch=job.batch, on_step=on_step, **job.options
            )
            for part in (filmed, ours)
        )
        for done in itertools.chain.from_iterable(batches):
            keep(done)
    seconds = time.perf_counter() - start
    if filmed and trajectory is not None:
        trajectory.save()

    reports = distributed.gather((total, evaluated[0], seconds))
    made = sum(report[0] for report in reports)
    return Summary(
        made=made,
        skipped=len(job.seeds) - made,
        seconds=max(report[2] for report in reports),
        evaluations=sum(report[1] for report in reports) / max(made, 1),
        savings=usage.savings(),
    )


@contextlib.contextmanager
def counted(job: Job) -> Iterator[list[int]]:
    """Count the images that pass through the networks during the block, in the list's only item."""
    count = [0]

    def add(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        count[0] += len(inputs[0])

    pipes = {id(pipe): pipe for pipe in (job.pipe, job.options.get("guide")) if pipe is not None}
    handles = [
        network.register_forward_pre_hook(add)
        for pipe in pipes.values()
        for network in pipe.networks()
    ]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()

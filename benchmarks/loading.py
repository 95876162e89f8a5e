"""Reading training batches: packed set, EDM archive, and the archive kept in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness import device, interleaved, markdown, record, show
from tessera.data.convert import convert_images
from tessera.data.dataset import open_dataset
from tessera.data.loader import Loader, StepPlan
from tessera.data.order import EpochOrder

IMAGES, BATCH, BATCHES = 4096, 256, 16


def write_photos(folder: Path, side: int) -> None:
    """PNG files of smooth noise, which compress about as well as photographs do."""
    random = np.random.default_rng(0)
    for index in range(IMAGES):
        coarse = random.integers(0, 256, (side // 4, side // 4, 3), np.uint8)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        image.save(folder / f"{index:05d}.png")


def reader(path: Path, cache: bool, stack: ExitStack) -> Callable[[], Any]:
    """A function that takes the next batches from the loader that training uses."""
    dataset = open_dataset(path, cache=cache)
    plans = (StepPlan(first, BATCH) for first in range(0, 10**12, BATCH))
    loader = stack.enter_context(
        Loader(dataset, EpochOrder(len(dataset), 0), plans, device=device(), workers=2)
    )
    batches: Iterator[Any] = iter(loader)

    def read() -> None:
        for _ in range(BATCHES):
            next(batches)

    return read


def run(rounds: int, record_figures: bool) -> None:
    """Time the formats at two sizes, print the table, and keep it if asked to."""
    columns = ["images", "format", "images/s", "against archive"]
    rows = []
    for side in (32, 64):
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            folder = Path(name) / "photos"
            folder.mkdir()
            write_photos(folder, side)
            for suffix in ("zip", "safetensors"):
                convert_images(folder, Path(name) / f"set.{suffix}")
            archive, packed = Path(name) / "set.zip", Path(name) / "set.safetensors"
            readers = {
                "archive": reader(archive, False, stack),
                "archive, cached": reader(archive, True, stack),
                "packed": reader(packed, False, stack),
            }
            times = interleaved(readers, rounds, warmup=2)
        for label, time in times.items():
            rate = IMAGES / time
            gain = f"{times['archive'] / time:.1f}x"
            rows.append([f"{side}x{side}", label, f"{rate:,.0f}", gain])
    show("Reading training batches, 2 threads", columns, rows)
    if record_figures:
        record("Data loading", markdown(columns, rows))

"""Latents: reading training batches of the four formats side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import device, interleaved, record, section
from tessera.data.latent_formats.base import LatentInfo, LatentPlan
from tessera.data.latent_formats.registry import FORMATS, choose_format, latent_sink
from tessera.data.latents import open_latents
from tessera.data.loader import Loader, StepPlan
from tessera.data.order import EpochOrder

IMAGES, SHAPE, BATCH, BATCHES = 2048, (4, 32, 32), 256, 8
"""Latents of 256x256 pixels; the batches of a round are those of an epoch."""


def write_set(folder: Path, name: str) -> Path:
    """Random moments in a format, as the encoder would write them."""
    path = folder / {"packed": "set.safetensors", "lego": "set.zip"}.get(name, name)
    form = choose_format(path, name, False)
    plan = LatentPlan(
        path.stem, IMAGES, SHAPE, LatentInfo("random", 256, 8, 0.18215, 0.0), not form.drawn,
        np.arange(IMAGES) % 10, None, form.precision or "float16",
    )  # fmt: skip
    random = torch.Generator().manual_seed(0)
    with latent_sink(path, form, plan) as put:
        for first in range(0, IMAGES, BATCH):
            rows = torch.randn(BATCH, 2 * SHAPE[0], *SHAPE[1:], generator=random)
            put(first, rows, rows.flip(3) if plan.mirrored else None)
    return path


def reader(path: Path, workers: int, stack: ExitStack) -> Callable[[], Any]:
    """A function that takes the next batches, shuffled, from the loader that training uses."""
    dataset = open_latents(path)
    plans = (StepPlan(first, BATCH) for first in range(0, 10**12, BATCH))
    order = EpochOrder(len(dataset), 0)
    batches = iter(
        stack.enter_context(Loader(dataset, order, plans, device=device(), workers=workers))
    )

    def read() -> None:
        for _ in range(BATCHES):
            next(batches)

    return read


def reading(rounds: int) -> str:
    """Images/s of each format."""
    columns = ["format", "threads", "images/s", "MB/s", "against npz"]
    rows = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        sets = {form.name: write_set(Path(name), form.name) for form in FORMATS}
        for workers in (0, 2):
            readers = {form: reader(path, workers, stack) for form, path in sets.items()}
            times = interleaved(readers, rounds, warmup=2)
            for form, time in times.items():
                size = open_latents(sets[form]).read(np.arange(1)).nbytes
                rate = BATCH * BATCHES / time
                gain = f"{times['npz'] / time:.1f}x"
                rows.append([form, str(workers), f"{rate:,.0f}", f"{rate * size / 1e6:,.0f}", gain])
    return section("Reading shuffled batches of 256 latents of 4x32x32", columns, rows)


def run(rounds: int, record_figures: bool) -> None:
    """Time the formats, print the table, and keep it if asked to."""
    tables = [reading(rounds)]
    if record_figures:
        record("Latents", "\n\n".join(tables))

"""Latents: encoding by one and two processes, and reading training batches of the four formats."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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
from tessera.data.packed import PackedWriter

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


ENCODED, SIDE = 384, 64
"""Images that are encoded, and their side, pixels."""


def write_vae(folder: Path) -> Path:
    """An autoencoder like Stable Diffusion's of a quarter of its channels, with random weights."""
    import diffusers

    kind: Any = diffusers.AutoencoderKL
    vae = kind(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        latent_channels=4,
        sample_size=SIDE,
    )
    vae.save_pretrained(folder, safe_serialization=True)
    return folder


def encoded(images: Path, vae: Path, target: Path, processes: int, threads: int) -> float:
    """Images/s of `tessera data latents`, as it reports them: without the start of Python."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    command = [*start, "tessera", "data", "latents", str(images), str(target), "--vae", str(vae)]
    told = subprocess.run(
        [*command, "--overwrite"],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.search(r"^time +([\d.]+) s", told, re.M)
    assert found is not None, told
    return ENCODED / float(found[1])


def encoding(rounds: int) -> str:
    """Images/s of one and of two processes, in turn; the best of all rounds."""
    ways = {(1, 1): "one, of one thread", (1, 2): "one, of two threads", (2, 1): "two, of one each"}
    best = dict.fromkeys(ways, 0.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vae = write_vae(folder / "vae")
        with open(folder / "images.safetensors", "wb") as file:
            writer = PackedWriter(file, (3, SIDE, SIDE), "images", None)
            for image in np.random.default_rng(0).integers(0, 256, (ENCODED, 3, SIDE, SIDE)):
                writer.add(image.astype(np.uint8))
            writer.finish(None)
        for _ in range(rounds):
            for processes, threads in ways:
                speed = encoded(
                    folder / "images.safetensors", vae, folder / "set.safetensors",
                    processes, threads,
                )  # fmt: skip
                best[processes, threads] = max(best[processes, threads], speed)
    rows = [
        [text, f"{best[way]:.1f}", f"{best[way] / best[1, 1]:.2f}x"] for way, text in ways.items()
    ]
    columns = ["processes", "images/s", "against one of one thread"]
    return section(f"Encoding {SIDE}x{SIDE} images, encoder of 2.1 M parameters", columns, rows)


def run(rounds: int, record_figures: bool) -> None:
    """Time the formats and the encoder, print the tables, and keep them if asked to."""
    tables = [encoding(min(rounds, 3)), reading(rounds)]
    if record_figures:
        record("Latents", "\n\n".join(tables))

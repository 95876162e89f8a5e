"""Sets of latents from one format to another; nothing is encoded anew."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tessera.data.latent_formats.base import (
    LatentFormat,
    LatentInfo,
    LatentPlan,
    LatentReader,
    Precision,
)
from tessera.data.latent_formats.registry import choose_format, choose_precision, latent_sink
from tessera.data.latents import latent_format
from tessera.data.parallel import ordered_map
from tessera.errors import DataError
from tessera.files import user_path
from tessera.progress import progress


@dataclass
class LatentConversion:
    """What `convert_latents` did.

    Attributes:
        path: where the set is now.
        source, form: names of the formats.
        count: rows.
        shape: (C, h, w) of the latents.
        flips: it holds rows of the mirrored images.
        notes: what the user should know.
        seconds: time taken.
    """

    path: Path
    source: str
    form: str
    count: int
    shape: tuple[int, int, int]
    flips: bool
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def convert_latents(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    form: str | None = None,
    *,
    precision: Precision | None = None,
    scale: float | None = None,
    shift: float | None = None,
    xflip: bool = False,
    seed: int = 0,
    shard: int = 64,
    batch: int = 256,
    overwrite: bool = False,
) -> LatentConversion:
    """Write a set of latents in another format; it appears when it is whole, or not at all.

    Where samples are wanted, one of each image's posterior is drawn, addressed by the seed and the
    number of the row; where moments are wanted of samples, they have no variance.

    Args:
        form: name of the format; None is told by the ending of `target`.
        precision: of the numbers, where the format leaves a choice; None for that of the source.
        scale, shift: of the latents, where the source does not say them.
        xflip: where samples have no mirrored ones, take the mirrored latents for them, as LEGO's
            released code does in training.
        seed: of the draws.
        shard: rows of a file, where the format has several files.
        batch: rows at once.
        overwrite: replace an existing set.

    Raises:
        DataError: no set of latents, a damaged one, or one that the format cannot hold.
    """
    source, target, started = user_path(source), user_path(target), time.monotonic()
    found = latent_format(source)
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise DataError(f"{target}: the result would replace its own source")
    written = choose_format(target, form, overwrite)
    reader = found.open(source)
    info = _complete(source, reader, scale, shift)
    mirrored = not written.drawn and (
        reader.mirrored == "encoded" or (reader.mirrored == "flipped" and xflip)
    )
    if written.mirrored and reader.mirrored == "flipped" and not xflip:
        raise DataError(
            f"{source} holds no latents of mirrored images, which a {written.title} does. --xflip "
            "takes the mirrored latents for them, as LEGO's released code does"
        )
    if xflip and (written.drawn or reader.mirrored == "none"):
        raise DataError(
            f"{target if written.drawn else source} has no latents of mirrored images; leave out "
            "--xflip"
        )
    plan = LatentPlan(
        target.stem, reader.count, reader.shape, info, mirrored, reader.labels, reader.class_names,
        choose_precision(target, written, precision, reader.precision), shard,
    )  # fmt: skip
    report = LatentConversion(
        target, found.name, written.name, reader.count, reader.shape, mirrored
    )
    report.notes += _notes(reader, found, written, plan)
    with (
        latent_sink(target, written, plan, seed) as put,
        progress(f"converting {source.name}", reader.count, unit="images") as bar,
    ):
        for first, rows, others in _batches(reader, mirrored, batch):
            put(first, rows, others, drawn=reader.drawn)
            bar.advance(len(rows))
    reader.close()
    report.seconds = time.monotonic() - started
    return report


def _complete(
    source: Path, reader: LatentReader, scale: float | None, shift: float | None
) -> LatentInfo:
    """What is known of a set, with what the caller knows of it."""
    info = reader.info
    for name, given in (("scale", scale), ("shift", shift)):
        known = getattr(info, name)
        if None not in (given, known) and given != known:
            raise DataError(f"{source} says that its {name} is {known:g}; leave out --{name}")
    info = replace(
        info,
        scale=info.scale if scale is None else scale,
        shift=info.shift if shift is None else shift,
    )
    if info.scale is not None and info.shift is None:
        info = replace(info, shift=0.0)
    return info


def _batches(
    reader: LatentReader, mirrored: bool, batch: int
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """All rows in order: the number of the first, they, and those of the mirrored images."""

    def read(first: int) -> tuple[int, Tensor, Tensor | None]:
        rows = np.arange(first, min(first + batch, reader.count))
        flip = np.ones(len(rows), np.bool_)
        others = torch.from_numpy(reader.read(rows, flip)) if mirrored else None
        return first, torch.from_numpy(reader.read(rows, ~flip)), others

    return ordered_map(read, range(0, reader.count, batch), 2, 2)


def _notes(
    reader: LatentReader, source: LatentFormat, target: LatentFormat, plan: LatentPlan
) -> list[str]:
    notes = []
    if target.drawn and not source.drawn:
        notes.append("one sample of each image was drawn; training will draw no others")
        if reader.mirrored == "encoded":
            notes.append(f"a {target.title} has no place for those of the mirrored images")
    if source.drawn and not target.drawn:
        notes.append(f"a {source.title} holds one sample of each image, so there is no variance")
    if reader.precision == "float32" and plan.precision == "float16":
        notes.append("its numbers of float32 were rounded to float16")
    return notes

"""A packed set of latents that is kept up to date with its images.

Each row is keyed by the SHA-256 of its image's size and pixels, and is of the image or the mirrored
one; the set says for all rows which weights encoded them, in what precision and at what size. So a
row is used again exactly if it would be made again: images that were renamed, moved or given other
labels keep theirs, changed ones do not, and images with the same pixels share one.

What has been encoded is appended to hidden files beside the set, one of each process. The set is
written from them, and from its former self, when everything is there. An interrupted command goes
on from these files; they are named by all that decides the rows, so that no others are taken.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tessera import distributed
from tessera.data.codec import VaeCodec
from tessera.data.dataset import ImageDataset
from tessera.data.latent_formats.base import LatentPlan
from tessera.data.latent_formats.packed import PackedLatents, PackedLatentWriter
from tessera.data.latent_keys import (
    EncodedRows,
    Key,
    RowAppender,
    all_shares,
    alone,
    image_key,
    image_keys,
)
from tessera.data.moments import ChannelStatistics
from tessera.data.parallel import ordered_map
from tessera.errors import DataError, TesseraError
from tessera.files import atomic_file
from tessera.progress import progress

_ROWS = 1024


@dataclass(frozen=True)
class Changes:
    """What bringing a set up to date has done, in images of different content.

    Attributes:
        kept: rows that the set had.
        resumed: encoded by a command that was interrupted.
        encoded: encoded now.
        dropped: rows whose images are gone or have changed.
        repeats: images with the same pixels as others, which share their rows.
        written: the file was written; it stays where nothing has changed.
    """

    kept: int
    resumed: int
    encoded: int
    dropped: int
    repeats: int
    written: bool


def update_cache(
    dataset: ImageDataset,
    codec: VaeCodec,
    path: Path,
    plan: LatentPlan,
    *,
    batch: int,
    device: torch.device,
    overwrite: bool,
) -> Changes:
    """Make or renew the packed set at `path`; all processes take part.

    Args:
        plan: of the set, whose `info` says by which weights and in which precision.
        batch: images that are read and encoded at once.
        overwrite: take nothing from the set that is there.

    Raises:
        DataError: what is there is of another VAE, size or precision, or has none of the images;
            another command is at it; an image changes meanwhile.
    """
    with _on_main(alone(path)):
        old = None if overwrite or not path.exists() else _open_old(path, plan)
        keys = image_keys(dataset, batch)
        work = _Work(path, plan, old, keys, batch, overwrite)
        _refuse_strangers(path, old, keys)
        before = work.encoded_before()
        encoded = sum(all_shares(lambda: work.encode(dataset, codec, device, before)))
        written = distributed.is_main() and work.write()
        return work.changes(encoded, distributed.broadcast(written))


class _Work:
    """One command's work on one set."""

    def __init__(
        self,
        path: Path,
        plan: LatentPlan,
        old: PackedLatents | None,
        keys: list[bytes],
        batch: int,
        anew: bool,
    ) -> None:
        self._path, self._old, self._keys = path, old, keys
        self._plan = replace(plan, keys=np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32))
        self._flips = (False, True) if plan.mirrored else (False,)
        self._old_rows: dict[bytes, int] = {}
        if old is not None and old.keys is not None:
            self._old_rows = {bytes(key): row for row, key in enumerate(np.asarray(old.keys))}
        size = 2 * plan.shape[0] * plan.shape[1] * plan.shape[2]
        self._dtype = np.dtype(plan.precision)
        self._row_bytes = size * self._dtype.itemsize
        first: dict[bytes, int] = {}
        for index, key in enumerate(keys):
            first.setdefault(key, index)
        self._first = first
        missing = [i for key, i in first.items() if any(map(self._lacks, self._both(key)))]
        # Always cut at the same places, because the last bits of an encoding may depend on which
        # images are encoded together.
        self._batches = [missing[n : n + batch] for n in range(0, len(missing), batch)]
        what = {"anew": anew, "row": size, "numbers": plan.precision} | {
            name: getattr(plan.info, name) for name in ("weights", "compute", "resolution")
        }
        self._name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]

    def _both(self, key: bytes) -> list[Key]:
        return [(key, flip) for flip in self._flips]

    def _lacks(self, key: Key) -> bool:
        """Whether the set that is there cannot give a row."""
        return key[0] not in self._old_rows or (key[1] and not _flips_of(self._old))

    def _part(self, rank: int | str, name: str) -> Path:
        return self._path.with_name(f".{self._path.name[:180]}.{name}-{rank}.encoding")

    def _parts(self, every: bool = False) -> list[Path]:
        """The files of encoded rows; `every` one of this set, also those of no use now."""
        hidden = f".{glob.escape(self._path.name[:180])}."
        pattern = f"{hidden}*-*.encoding" if every else f"{hidden}{self._name}-*.encoding"
        return sorted(self._path.parent.glob(pattern))

    def encoded_before(self) -> set[Key]:
        """The rows that an interrupted command has left, as the main process sees them."""
        found: set[Key] = set()
        if distributed.is_main():
            for part in self._parts():
                found |= EncodedRows(part, self._row_bytes).places.keys()
        return distributed.broadcast(found)

    def encode(
        self, dataset: ImageDataset, codec: VaeCodec, device: torch.device, before: set[Key]
    ) -> int:
        """Encode this process's share of what is missing; returns how many images."""
        rank, world = distributed.rank(), distributed.world()
        todo = [b for b in self._batches if not all(k in before for i in b for k in self._need(i))]
        total, own = sum(map(len, todo)), todo[rank::world]
        if not own:
            return 0

        def read(batch: Sequence[int]) -> NDArray[np.uint8]:
            return dataset.read(np.asarray(batch))

        rows = EncodedRows(self._part(rank, self._name), self._row_bytes, self._path)
        with (
            rows.appending() as appender,
            progress("encoding", total, unit="images") as bar,
        ):
            for nth, images in enumerate(ordered_map(read, own, 2, 4)):
                self._encode_batch(own[nth], images, codec, device, appender)
                # The others are about as far; the main process shows the bar.
                bar.update(sum(map(len, todo[: (nth + 1) * world])))
        return sum(map(len, own))

    def _need(self, index: int) -> list[Key]:
        return [key for key in self._both(self._keys[index]) if self._lacks(key)]

    def _encode_batch(
        self,
        batch: Sequence[int],
        images: NDArray[np.uint8],
        codec: VaeCodec,
        device: torch.device,
        appender: RowAppender,
    ) -> None:
        keys = [self._keys[index] for index in batch]
        if [image_key(image) for image in images] != keys:
            raise DataError(
                f"images of {self._plan.name} changed while they were encoded; nothing is lost: "
                "give the command again when they stay"
            )
        pixels = torch.from_numpy(images).to(device)
        rows: dict[bool, NDArray[Any]] = {}
        for flip in self._flips:
            if any(
                (key, flip) in self._need(index) for key, index in zip(keys, batch, strict=True)
            ):
                moments = codec.encode(pixels.flip(3) if flip else pixels).cpu().numpy()
                with np.errstate(over="ignore"):
                    rows[flip] = moments.astype(self._dtype)
                if not np.isfinite(rows[flip]).all():
                    raise DataError(
                        f"the VAE {codec.model} makes numbers that are not finite or do not fit "
                        f"into {self._plan.precision}. Keep `precision=float32`, and encode with "
                        "`vae_precision=fp32`"
                    )
        appender.add(keys, rows)

    def write(self) -> bool:
        """Write the set, unless it is there as it would be written; clean up."""
        written = not self._is_there()
        if written:
            parts = [EncodedRows(part, self._row_bytes) for part in self._parts()]
            with (
                atomic_file(self._path) as file,
                progress("writing", self._plan.count, unit="images") as bar,
            ):
                writer = PackedLatentWriter(file, self._plan)
                statistics = ChannelStatistics(self._plan.shape[0])
                for first, rows, mirrored in self._chunks(parts):
                    writer.put(first, rows, mirrored)
                    statistics.add(rows)
                    bar.advance(len(rows))
                mean, std = map(_short, statistics.result())
                writer.finish(replace(self._plan.info, mean=mean, std=std))
        for part in self._parts(every=True):
            part.unlink(missing_ok=True)
        return written

    def _is_there(self) -> bool:
        old, plan = self._old, self._plan
        if old is None or old.keys is None or plan.keys is None:
            return False
        same = replace(old.info, mean=None, std=None) == plan.info
        labels = (old.labels is None and plan.labels is None) or (
            old.labels is not None
            and plan.labels is not None
            and np.array_equal(old.labels, plan.labels)
        )
        names = plan.class_names if plan.labels is not None else None
        rows = np.array_equal(old.keys, plan.keys) and _flips_of(old) == plan.mirrored
        return same and labels and old.class_names == names and rows

    def _chunks(
        self, parts: Sequence[EncodedRows]
    ) -> Iterator[tuple[int, NDArray[Any], NDArray[Any] | None]]:
        """First row, rows and mirrored rows of the set, in order."""
        channels, height, width = self._plan.shape
        for first in range(0, len(self._keys), _ROWS):
            keys = self._keys[first : first + _ROWS]
            found = []
            for flip in self._flips:
                rows = np.empty((len(keys), 2 * channels, height, width), self._dtype)
                for row, key in zip(rows, keys, strict=True):
                    row[...] = self._row((key, flip), parts).reshape(row.shape)
                found.append(rows)
            yield first, found[0], found[1] if len(found) > 1 else None

    def _row(self, key: Key, parts: Sequence[EncodedRows]) -> NDArray[Any]:
        if not self._lacks(key):
            assert self._old is not None
            index = np.array([self._old_rows[key[0]]])
            kept: NDArray[Any] = self._old.read(index, np.array([key[1]]))[0]
            return kept
        part = next(part for part in parts if key in part.places)
        return np.frombuffer(part.row(key), self._dtype)

    def changes(self, encoded: int, written: bool) -> Changes:
        """What has been done."""
        missing = sum(map(len, self._batches))
        return Changes(
            kept=len(self._first) - missing,
            resumed=missing - encoded,
            encoded=encoded,
            dropped=len(self._old_rows.keys() - self._first.keys()),
            repeats=len(self._keys) - len(self._first),
            written=written,
        )


def _short(values: NDArray[np.float64]) -> tuple[float, ...]:
    """To nine digits, as they are stored."""
    return tuple(float(f"{value:.9g}") for value in values)


@contextlib.contextmanager
def _on_main(lock: contextlib.AbstractContextManager[None]) -> Iterator[None]:
    """The block within `lock`, which the main process takes for all."""
    failure: TesseraError | None = None
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            try:
                stack.enter_context(lock)
            except TesseraError as error:
                failure = error
        text = distributed.broadcast(None if failure is None else str(failure))
        if text is not None:
            raise failure or DataError(text)
        yield


def _flips_of(old: PackedLatents | None) -> bool:
    return old is not None and old.mirrored == "encoded"


def _open_old(path: Path, plan: LatentPlan) -> PackedLatents:
    """The set that is there, if rows of it may be kept."""
    old = PackedLatents(path)
    anew = "Choose another name, or encode everything anew with `overwrite=True`"
    if old.keys is None:
        raise DataError(
            f"{path} exists already, and does not say of which images its latents are: it is of an "
            f"older version, or converted, and cannot be brought up to date. {anew}"
        )
    was, now = old.info, plan.info
    problems = []
    if was.weights != now.weights:
        problems.append(
            f"its VAE ({was.vae}) has other weights than {now.vae}"
            + ("" if was.vae != now.vae else ", as it is now")
        )
    for name, before, after in (
        ("it was encoded in", was.compute, now.compute),
        ("its numbers are", old.precision, plan.precision),
        ("its images are of side", was.resolution, now.resolution),
    ):
        if before != after:
            problems.append(f"{name} {before}, not {after}")
    if problems:
        raise DataError(
            f"{path} exists already, and nothing of it can be kept: {'; '.join(problems)}. {anew}"
        )
    if old.mirrored == "encoded" and not plan.mirrored:
        raise DataError(
            f"{path} holds latents of the mirrored images, too, which would be lost; give "
            f"`xflip=True` to keep them. {anew}"
        )
    return old


def _refuse_strangers(path: Path, old: PackedLatents | None, keys: Sequence[bytes]) -> None:
    """Raise where the set seems to be of other images altogether."""
    if old is None or old.keys is None or not len(old.keys):
        return
    if not {bytes(key) for key in np.asarray(old.keys)} & set(keys):
        raise DataError(
            f"{path} exists already, and holds none of these images. Choose another name, or "
            "replace it with `overwrite=True`"
        )

"""What every format of latents is to the rest: a reader, a writer, and what a set says of itself.

Most formats hold the moments of a VAE's posterior: its mean and log-variance of each image, neither
sampled nor scaled. Others hold one sample of it, as a model is trained on it: scaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Precision = Literal["float16", "float32"]
Mirrored = Literal["encoded", "flipped", "none"]


@dataclass(frozen=True)
class LatentInfo:
    """What a set of latents was made from and how; None for what it does not say.

    Attributes:
        vae: name of the autoencoder.
        resolution: side of the images, pixels.
        downsample: side of the images / side of the latents.
        scale, shift: a model's latents are (z - shift) * scale.
    """

    vae: str | None = None
    resolution: int | None = None
    downsample: int | None = None
    scale: float | None = None
    shift: float | None = None

    def texts(self) -> dict[str, str]:
        """All that is known, as texts by name."""
        values = {name: getattr(self, name) for name in INFO}
        return {
            name: value if isinstance(value, str) else repr(value)
            for name, value in values.items()
            if value is not None
        }


INFO = ("vae", "resolution", "downsample", "scale", "shift")


def read_info(texts: Mapping[str, Any]) -> LatentInfo:
    """What `LatentInfo.texts` has written; what is not there stays unknown.

    Raises:
        ValueError: something else is in its place.
    """
    found = {name: texts[name] for name in INFO if texts.get(name) is not None}
    if not all(isinstance(value, str) for value in found.values()):
        raise ValueError("what it says of its VAE is no text")
    kinds = {"vae": str, "resolution": int, "downsample": int, "scale": float, "shift": float}
    info = LatentInfo(**{name: kinds[name](value) for name, value in found.items()})
    sizes = [size for size in (info.resolution, info.downsample) if size is not None]
    factors = [factor for factor in (info.scale, info.shift) if factor is not None]
    if not (all(0 < size < 2**31 for size in sizes) and all(map(math.isfinite, factors))):
        raise ValueError("its metadata are no sizes and scales")
    return info


@dataclass(frozen=True)
class LatentPlan:
    """A set of latents that is to be written, as it is known before its first row.

    Attributes:
        name: for people.
        count: rows.
        shape: (C, h, w) of the latents.
        info: how they are made.
        mirrored: rows of the mirrored images are written, too.
        labels, class_names: as of an `ImageDataset`.
        precision: of the numbers.
        shard: rows of a file, where the format has several files.
    """

    name: str
    count: int
    shape: tuple[int, int, int]
    info: LatentInfo
    mirrored: bool
    labels: NDArray[Any] | None
    class_names: tuple[str, ...] | None
    precision: Precision
    shard: int = 64


class LatentWriter(Protocol):
    """Writes the rows of a planned set, in order, each once."""

    def put(self, first: int, rows: NDArray[Any], mirrored: NDArray[Any] | None) -> None:
        """Write rows from number `first` on.

        Args:
            rows: means and log-variances [n, 2 C, h, w], or samples [n, C, h, w] in a format
                whose sets are `drawn`.
            mirrored: the same of the mirrored images, if the plan says that there are any.
        """
        ...


class LatentReader(Protocol):
    """The rows of a set.

    Attributes:
        count: rows.
        shape: (C, h, w) of the latents.
        drawn: rows are samples [C, h, w] in model space, not moments [2 C, h, w].
        mirrored: rows of mirrored images have been "encoded"; they are the rows "flipped"; or
            there are "none".
        precision: of the numbers.
        labels, class_names: as of an `ImageDataset`.
        info: how the set was made, as far as it says it.
    """

    count: int
    shape: tuple[int, int, int]
    drawn: bool
    mirrored: Mirrored
    precision: Precision
    labels: NDArray[Any] | None
    class_names: tuple[str, ...] | None
    info: LatentInfo

    def read(self, rows: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> NDArray[Any]:
        """Rows, a fresh array; those of the mirrored images where `mirrored` is set.

        Safe to call from threads.

        Raises:
            DataError: a file is damaged; the message names it.
        """
        ...

    def close(self) -> None:
        """Release the open files."""
        ...


@dataclass(frozen=True)
class LatentFormat:
    """A way to keep latents in a file or a folder.

    Attributes:
        name: what `--format` calls it.
        title: in words.
        endings: of the names of its files; empty where it is a folder only.
        folder: it may be a folder.
        drawn: see `LatentReader`.
        mirrored: it must hold rows of the mirrored images.
        precision: of its numbers; None where it leaves a choice.
        recognise: whether what is at a path looks like a set of this format.
        open: a reader of what is at a path. Raises DataError where the set is damaged; the message
            names the file.
        create: a writer of a set that appears under a path when the block ends well. Raises
            DataError where the format cannot hold such a set.
    """

    name: str
    title: str
    endings: tuple[str, ...]
    folder: bool
    drawn: bool
    mirrored: bool
    precision: Precision | None
    recognise: Callable[[Path], bool]
    open: Callable[[Path], LatentReader]
    create: Callable[[Path, LatentPlan], AbstractContextManager[LatentWriter]]

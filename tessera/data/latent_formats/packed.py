"""The packed format of latents: one safetensors file that is mapped.

Tensors: `moments` float16 or float32 [N, 2 C, h, w], the posterior's mean, then its log-variance;
`moments_flip`, the same of the mirrored images, if wanted; `labels` as in packed sets of images.
Metadata: `format` = "tessera-latents", `version`, `name`, `class_names` (JSON list, if known),
and what `LatentInfo` says.

Neither samples nor scaled latents are stored: a fresh sample is drawn each time that an image is
trained on. float16 is enough: its rounding, once scaled, is a tenth of that of the 8-bit pixels.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tessera.data.latent_formats.base import (
    LatentFormat,
    LatentPlan,
    Mirrored,
    Precision,
    read_info,
)
from tessera.data.packed import DTYPES, LATENTS_FORMAT, read_header, tensor_entry
from tessera.errors import DataError
from tessera.files import atomic_file

VERSION = "1"
_HOW_TO_MAKE = "`tessera data latents IMAGES LATENTS.safetensors --vae MODEL` makes one"
_CODES: dict[Precision, str] = {"float16": "F16", "float32": "F32"}


class PackedLatents:
    """Reads a packed set of latents; see `LatentReader`."""

    drawn = False

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
            DataError: no such set, or damaged.
        """
        try:
            header = read_header(path)
            metadata = header.metadata
            if metadata.get("format") != LATENTS_FORMAT or metadata.get("version") != VERSION:
                raise DataError(f"{path} is no set of latents of version {VERSION}. {_HOW_TO_MAKE}")
            moments = header.map("moments")
            both = "moments_flip" in header.entries
            flipped = header.map("moments_flip") if both else None
            self.labels, self.class_names = header.labels(), header.class_names()
            self.info = read_info(metadata)
            _check_moments(moments, flipped, self.labels)
            self.count, width, *sides = moments.shape
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        except ValueError as error:
            raise DataError(
                f"{path}: not a whole set of latents ({error}). {_HOW_TO_MAKE}"
            ) from error
        self.shape: tuple[int, int, int] = (width // 2, *sides)
        self.mirrored: Mirrored = "encoded" if both else "none"
        self.precision: Precision = "float16" if moments.itemsize == 2 else "float32"
        self._moments, self._flipped = moments, flipped

    def read(self, rows: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> NDArray[Any]:
        """Means and log-variances [n, 2 C, h, w]; one gather from the map."""
        moments = np.asarray(self._moments[rows])
        if self._flipped is not None and mirrored.any():
            moments[mirrored] = self._flipped[rows[mirrored]]
        return moments

    def close(self) -> None:
        """The map goes with the object."""


def _check_moments(
    moments: NDArray[Any], mirrored: NDArray[Any] | None, labels: NDArray[Any] | None
) -> None:
    """Raise ValueError for tensors that do not belong together."""
    if moments.ndim != 4 or moments.shape[1] % 2 or 0 in moments.shape:
        raise ValueError(f"moments of shape {moments.shape}")
    if moments.dtype.kind != "f":
        raise ValueError(f"moments that are {moments.dtype}")
    if mirrored is not None and (mirrored.shape, mirrored.dtype) != (moments.shape, moments.dtype):
        raise ValueError(f"mirrored moments of shape {mirrored.shape}, others of {moments.shape}")
    if labels is not None and len(labels) != len(moments):
        raise ValueError(f"{len(moments)} latents but {len(labels)} labels")


class _Writer:
    """Header and labels at once, then rows at their places, in whatever order they come."""

    def __init__(self, file: IO[bytes], plan: LatentPlan) -> None:
        self._file = file
        labels = plan.labels
        metadata = {"format": LATENTS_FORMAT, "version": VERSION, "name": plan.name}
        metadata |= plan.info.texts()
        if labels is not None and plan.class_names is not None:
            metadata["class_names"] = json.dumps(plan.class_names, ensure_ascii=False)
        code = _CODES[plan.precision]
        self._dtype = DTYPES[code]
        rows = (plan.count, 2 * plan.shape[0], *plan.shape[1:])
        self._row = math.prod(rows[1:]) * self._dtype.itemsize
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        if labels is not None:
            # First, where their numbers of eight bytes are aligned.
            kind = "I64" if labels.ndim == 1 else "F32"
            header["labels"] = tensor_entry(kind, labels.shape, 0, labels.nbytes)
            end = labels.nbytes
        offsets = []
        for tensor in ("moments", "moments_flip")[: 2 if plan.mirrored else 1]:
            size = plan.count * self._row
            header[tensor] = tensor_entry(code, rows, end, end + size)
            offsets.append(end)
            end += size
        text = json.dumps(header, ensure_ascii=False).encode()
        text = text.ljust(-(-(8 + len(text)) // 64) * 64 - 8)
        file.write(struct.pack("<Q", len(text)) + text)
        if labels is not None:
            file.write(np.ascontiguousarray(labels).data)
        self._offsets = [8 + len(text) + offset for offset in offsets]

    def put(self, first: int, rows: NDArray[Any], mirrored: NDArray[Any] | None) -> None:
        """Write rows from number `first` on; see `LatentWriter.put`."""
        arrays = [rows] if mirrored is None else [rows, mirrored]
        for offset, array in zip(self._offsets, arrays, strict=True):
            self._file.seek(offset + first * self._row)
            self._file.write(np.ascontiguousarray(array, self._dtype).data)


def _recognise(path: Path) -> bool:
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return False
    try:
        return read_header(path).metadata.get("format") == LATENTS_FORMAT
    except (OSError, ValueError, DataError):
        return False


@contextlib.contextmanager
def _create(path: Path, plan: LatentPlan) -> Iterator[_Writer]:
    with atomic_file(path) as file:
        yield _Writer(file, plan)


PACKED = LatentFormat(
    "packed",
    "packed set of latents",
    (".safetensors",),
    folder=False,
    drawn=False,
    mirrored=False,
    precision=None,
    recognise=_recognise,
    open=PackedLatents,
    create=_create,
)

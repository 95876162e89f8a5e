"""The EDM archive: a stored ZIP (or folder) of uncompressed PNG files and `dataset.json`.

Images of other numbers of channels than 1 and 3 are `.npy` files, which only this library reads.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tessera.channels import is_picture
from tessera.images import array_bytes, png_bytes

PutFile = Callable[[str, bytes], None]


def member_name(index: int, ending: str = "png") -> str:
    """Name of image `index`: `00012/img00012345.png`."""
    digits = f"{index:08d}"
    return f"{digits[:-3]}/img{digits}.{ending}"


def member_ending(channels: int) -> str:
    """PNG for grey and RGB images, else arrays of NumPy."""
    return "png" if is_picture(channels) else "npy"


def encode_member(image: NDArray[np.uint8]) -> bytes:
    """uint8 [H, W] or [H, W, C] as the file that goes into an archive, see `member_ending`."""
    if member_ending(image.shape[2] if image.ndim == 3 else 1) == "npy":
        return array_bytes(image)
    return png_bytes(image, compress_level=0)


def labels_json(
    labels: Sequence[Any] | None, class_names: Sequence[str] | None, ending: str = "png"
) -> bytes:
    """`dataset.json` for images 0..N-1; readers of the original format ignore `class_names`."""
    pairs = None if labels is None else [[member_name(i, ending), v] for i, v in enumerate(labels)]
    content: dict[str, Any] = {"labels": pairs}
    if class_names is not None:
        content["class_names"] = list(class_names)
    return json.dumps(content).encode()


def zip_putter(archive: zipfile.ZipFile) -> PutFile:
    """A function that adds a stored member; the same files always give the same bytes."""

    def put(name: str, data: bytes) -> None:
        entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
        entry.external_attr = 0o644 << 16
        archive.writestr(entry, data, zipfile.ZIP_STORED)

    return put


def open_zip(file: IO[bytes]) -> zipfile.ZipFile:
    """A new archive in an open file."""
    return zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)


def folder_putter(folder: Path) -> PutFile:
    """A function that writes a file below `folder`."""

    def put(name: str, data: bytes) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    return put

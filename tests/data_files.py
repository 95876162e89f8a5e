"""Small image sets for tests."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tessera.data.archive import encode_member, labels_json, member_name, open_zip, zip_putter
from tessera.data.packed import PackedWriter
from tessera.images import png_bytes


def random_images(count: int, channels: int = 3, size: int = 8, seed: int = 0) -> NDArray[np.uint8]:
    """uint8 [N, C, H, W]."""
    shape = (count, channels, size, size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def last(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[C, H, W] as [H, W] or [H, W, 3]."""
    return image[0] if len(image) == 1 else image.transpose(1, 2, 0)


def write_archive(path: Path, images, labels=None, class_names=None) -> Path:
    """An EDM archive of images [N, C, H, W]."""
    with open(path, "wb") as file, open_zip(file) as archive:
        put = zip_putter(archive)
        for index, image in enumerate(images):
            put(member_name(index), encode_member(last(image)))
        put("dataset.json", labels_json(labels, class_names))
    return path


def write_packed(path: Path, images, labels=None, class_names=None) -> Path:
    """A packed set of images [N, C, H, W]."""
    with open(path, "wb") as file:
        writer = PackedWriter(file, images.shape[1:], path.stem, class_names)
        for image in images:
            writer.add(image)
        writer.finish(None if labels is None else np.asarray(labels))
    return path


def write_folder(path: Path, files: dict[str, NDArray[np.uint8] | bytes]) -> Path:
    """A folder of files; arrays [H, W(, 3)] become PNG."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else png_bytes(content)
        (path / name).write_bytes(data)
    return path


def write_zip(path: Path, files, compression=zipfile.ZIP_STORED) -> Path:
    """A ZIP of files; arrays become PNG."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content if isinstance(content, bytes) else png_bytes(content))
    return path

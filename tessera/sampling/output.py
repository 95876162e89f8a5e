"""Samples as files: a PNG (or array) for each seed, one NPZ for all, and an animation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tessera.channels import is_picture
from tessera.data.labels import LABELS_FILE
from tessera.errors import DataError, TesseraError
from tessera.files import atomic_file, check_writable, read_json, user_path, write_json
from tessera.images import grid, labelled_grid, to_pil
from tessera.sampling.core import SamplerState

SETTINGS_FILE = "sampling.json"
_LABELS_BYTES = 256 * 2**20  # of millions of samples


def image_path(folder: Path, seed: int, subdirs: bool = False, channels: int = 3) -> Path:
    """`000017.png` in the folder, or in a sub-folder of each 1,000 seeds (`000000/000017.png`).

    Images of other channels than grey and RGB are arrays, `000017.npy`.
    """
    if subdirs:
        folder = folder / f"{seed - seed % 1000:06d}"
    return folder / f"{seed:06d}.{'png' if is_picture(channels) else 'npy'}"


def check_folder(folder: Path, ours: Sequence[str] = ()) -> None:
    """Raise if samples would come among files that are not samples of ours.

    Args:
        ours: names of files that may be there.

    Raises:
        TesseraError: the folder holds other files, and no settings that its samples were made with.
    """
    if folder.exists() and not folder.is_dir():
        raise TesseraError(f"{folder} is a file. Name a folder for the images")
    if not folder.is_dir() or (folder / SETTINGS_FILE).exists():
        return
    foreign = sorted(p.name for p in folder.iterdir() if p.name not in ours and p.name[0] != ".")
    if foreign:
        raise TesseraError(
            f"{folder} is not empty, and holds no {SETTINGS_FILE}, by which folders of samples are "
            f"known ({foreign[0]} is there). Choose another folder"
        )


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings beside the images, or check that those there were made with the same.

    Args:
        settings: plain JSON values.

    Raises:
        TesseraError: the folder holds something else, or images of other settings.
    """
    check_folder(folder)
    path = folder / SETTINGS_FILE
    advice = "Choose another folder, or empty this one"
    if path.exists():
        try:
            there = read_json(path)
        except DataError as error:
            raise TesseraError(f"{path} cannot be read ({error}). {advice}") from error
        differing = _differences(there, json.loads(json.dumps(settings)))
        if differing:
            raise TesseraError(
                f"{folder} holds images that were made with other settings "
                f"({'; '.join(differing)}). {advice}"
            )
        return
    write_json(path, settings)


def _differences(there: Any, now: Any, prefix: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(now, dict):
        keys = [*there, *(key for key in now if key not in there)]
        return [
            text
            for key in keys
            for text in _differences(there.get(key), now.get(key), f"{prefix}{key}.")
        ]
    return [] if there == now else [f"{prefix[:-1]}: {_shown(there)} there, {_shown(now)} now"]


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "…"


def write_labels(folder: Path, labels: Mapping[str, int]) -> None:
    """Add the class of each file to `dataset.json`, which makes the folder a labelled data set."""
    known = read_labels(folder) | dict(labels)
    with atomic_file(folder / LABELS_FILE, "w") as file:
        json.dump({"labels": sorted(known.items())}, file)


def read_labels(folder: Path) -> dict[str, int]:
    """The classes that `write_labels` has written, by file; none if there is no such file.

    Raises:
        DataError: it is another file, or damaged.
    """
    path = folder / LABELS_FILE
    try:
        pairs = read_json(path, max_bytes=_LABELS_BYTES)["labels"]
        found = {str(name): int(label) for name, label in pairs}
    except FileNotFoundError:
        return {}
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} does not hold the classes of samples. Choose another folder"
        ) from error
    return found


def write_npz(path: Path, images: NDArray[np.uint8], labels: NDArray[np.int64] | None) -> None:
    """`arr_0` uint8 [N, H, W, C] and, with classes, `arr_1` int64 [N]: the field's sample file."""
    arrays = [images] if labels is None else [images, labels]
    with atomic_file(path) as file:
        np.savez(file, *arrays)


class Trajectory:
    """Collects the steps of a batch of at most 16 images and writes them as an animation.

    On the left is the state of the sampler, scaled down to about unit variance; on the right the
    denoiser's estimate of where it leads.

    Args:
        path: a .gif or .webp file.
        to_pixels: model space [B, C, H, W] to uint8 [B, H, W, C].

    Raises:
        TesseraError: another suffix, or a place that cannot be written to.
    """

    MAX_IMAGES = 16
    MAX_FRAMES = 60
    MAX_SIDE = 512

    def __init__(
        self, path: str | os.PathLike[str], to_pixels: Callable[[Tensor], NDArray[np.uint8]]
    ) -> None:
        self.path = user_path(path)
        if self.path.suffix.lower() not in (".gif", ".webp"):
            raise TesseraError(
                f"{self.path}: an animation is written as .gif or .webp, not as "
                f"{self.path.suffix or 'a file without suffix'}"
            )
        check_writable(self.path)
        self.to_pixels = to_pixels
        self._steps: list[tuple[tuple[str, str], list[Image.Image]]] = []

    def __call__(self, state: SamplerState) -> None:
        """Keep the state as a frame; of very many steps, evenly spaced ones."""
        every = math.ceil(state.steps / self.MAX_FRAMES)
        if (state.steps - state.step) % every:
            return
        pictures = [self._picture(images) for images in (state.unit, state.denoised)]
        captions = (f"noisy, sigma {state.sigma:.3g}", "denoised")
        self._steps.append((captions, pictures))

    def _picture(self, x: Tensor) -> Image.Image:
        """A grid of the first images, shrunk where it would be too large to watch."""
        picture = to_pil(grid(self.to_pixels(x[: self.MAX_IMAGES])))
        picture.thumbnail((self.MAX_SIDE, self.MAX_SIDE))
        return picture

    def _frames(self) -> list[Image.Image]:
        """The frames in one size, though a relay's first states are small."""
        shown = []
        for captions, pictures in self._steps:
            size = self._steps[-1][1][0].size
            large = [np.asarray(p.resize(size, Image.Resampling.NEAREST)) for p in pictures]
            shown.append(to_pil(labelled_grid([large], column_names=captions, gap=12)))
        return shown

    def save(self) -> None:
        """Write the animation; its last frame stays for two seconds."""
        first, *rest = self._frames()
        durations = [100] * len(rest) + [2000]
        options: dict[str, Any] = {"save_all": True, "append_images": rest, "loop": 0}
        with atomic_file(self.path) as file:
            if self.path.suffix.lower() == ".gif":
                first.save(file, "GIF", duration=durations, optimize=False, **options)
            else:
                first.save(file, "WEBP", duration=durations, quality=80, method=4, **options)

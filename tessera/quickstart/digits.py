"""The digits that scikit-learn carries, as a packed data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tessera.data.packed import PackedWriter
from tessera.errors import require_extra
from tessera.files import atomic_file

_LEVELS = 16  # the originals have whole grey levels 0..16


def write_digits(path: Path, resolution: int, count: int | None = None) -> None:
    """Write the 1,797 handwritten digits (or the first `count`), enlarged to `resolution`.

    UCI optical digits (Alpaydin & Kaynak 1998), 8 x 8, classes 0-9 in turn; bicubic enlargement.

    Raises:
        TesseraError: scikit-learn is not installed.
    """
    datasets = require_extra("sklearn.datasets", "quickstart", "The quickstart")
    digits = datasets.load_digits()
    with atomic_file(path) as file:
        names = tuple(str(digit) for digit in range(10))
        writer = PackedWriter(file, (1, resolution, resolution), "digits", names)
        for image in digits.images[:count]:
            writer.add(enlarge(image, resolution)[None])
        writer.finish(np.asarray(digits.target[:count], np.int64))


def enlarge(image: NDArray[np.float64], resolution: int) -> NDArray[np.uint8]:
    """Levels 0..16 [8, 8] to uint8 [resolution, resolution]; what bicubic overshoots is clipped."""
    grey = Image.fromarray((image * (255 / _LEVELS)).astype(np.float32))
    large = np.asarray(grey.resize((resolution, resolution), Image.Resampling.BICUBIC))
    return large.clip(0, 255).round().astype(np.uint8)

"""Arrays in files of NumPy: float32, all of one shape, which the first of them sets."""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray

from tessera.errors import DataError
from tessera.npy import NPY_HEADER, npy_header


class NpyArrays:
    """Reads `.npy` files that have the shape of one of them.

    Args:
        data: of that one.
        where: how messages call it.

    Raises:
        DataError: it is damaged, or no array of float32 in C order.

    Attributes:
        shape: of each.
    """

    def __init__(self, data: bytes, where: str) -> None:
        start, self.shape = _read_header(data, where)
        self._header, self._first = data[:start], where
        self._numbers(data, start, where)

    @property
    def max_bytes(self) -> int:
        """Of a file of this shape."""
        return NPY_HEADER + 4 * math.prod(self.shape)

    def read(self, data: bytes, where: str) -> NDArray[np.float32]:
        """The array in a file, a view of `data`.

        Raises:
            DataError: it is damaged, or of another shape.
        """
        start = len(self._header)
        if not data.startswith(self._header):  # whose padding may differ
            start, shape = _read_header(data, where)
            if shape != self.shape:
                raise DataError(
                    f"{where} has the shape {shape}, but {self._first} has {self.shape}; the "
                    "latents of a set have one shape"
                )
        return self._numbers(data, start, where)

    def _numbers(self, data: bytes, start: int, where: str) -> NDArray[np.float32]:
        if len(data) - start != 4 * math.prod(self.shape):
            raise DataError(f"{where} is not whole, or longer than its array")
        return np.frombuffer(data, "<f4", offset=start).reshape(self.shape)


def _read_header(data: bytes, where: str) -> tuple[int, tuple[int, ...]]:
    """Length of the header, and the shape in it."""
    start, shape, dtype = npy_header(data, where)
    if dtype != np.dtype("<f4"):
        raise DataError(f"{where} is no array of float32, as latents are")
    return start, shape


def npy_bytes(values: NDArray[np.float32]) -> bytes:
    """A `.npy` file of an array."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(values, "<f4"), allow_pickle=False)
    return file.getvalue()

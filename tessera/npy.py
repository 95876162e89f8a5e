"""Headers of NumPy's files, read without more of the file than they are."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from tessera.errors import DataError

NPY = b"\x93NUMPY"
"""How files of NumPy arrays begin."""
NPY_HEADER = 1024
"""Bytes of the longest header of such a file; those of plain arrays have 128 or less."""


def npy_header(data: bytes, what: str) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
    """Length of the header of a `.npy` file, and the shape and type of its array in C order.

    Args:
        data: the file, or its first bytes.
        what: what messages call it.

    Raises:
        DataError: it is no such file, a damaged one, in another order, or of an impossible shape.
    """
    file = io.BytesIO(data[:NPY_HEADER])
    try:
        version = np.lib.format.read_magic(file)
        reader = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, by_columns, dtype = reader(file, max_header_size=NPY_HEADER)
    except Exception as error:  # damaged headers raise nearly anything
        raise DataError(f"{what} is no array of NumPy, or a damaged one") from error
    if by_columns:
        raise DataError(f"{what} is an array in the order of Fortran; save it in C order")
    if not all(type(side) is int and 0 < side < 2**31 for side in shape):
        raise DataError(f"{what} has the impossible shape {str(shape)[:80]}")
    return file.tell(), shape, dtype

"""What all readers of image collections give, and what they are asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tessera.data.decode import decode_image
from tessera.data.labels import Label
from tessera.data.members import MAX_BYTES
from tessera.errors import DataError
from tessera.images import MAX_PIXELS

Pixels = NDArray[np.uint8]
NO_LABELS = "none"
"""As the name of the label column: the set has none."""
CLASSES = 65_536
"""Different names of classes at most; more of them are no classes but captions or names."""
_LARGEST = 2**31


@dataclass(frozen=True)
class Record:
    """One image of a source.

    Attributes:
        name: what messages call it.
        label: class index, vector, or None.
        load: gives uint8 [H, W] or [H, W, C]; may run in any thread; raises DataError.
    """

    name: str
    label: Label
    load: Callable[[], Pixels]


@dataclass(frozen=True)
class Source:
    """An image collection.

    Attributes:
        kind: in words.
        name: for messages and as the name of the set.
        count: number of records.
        records: the images, in order.
        class_names: if known.
        ignored: names of files that are not images.
    """

    kind: str
    name: str
    count: int
    records: Iterable[Record]
    class_names: tuple[str, ...] | None = None
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """How a collection is read.

    Attributes:
        upright: turn photos as the camera's orientation tag says.
        max_file_bytes: the largest image file that is read.
        max_pixels: refuse images of more pixels, before they are decoded.
        image_column, label_column: where a table keeps images and labels; None to look for them.
        split: the part of a collection that has several.
        alpha: make RGBA of all pictures.
    """

    upright: bool = True
    max_file_bytes: int = MAX_BYTES
    max_pixels: int = MAX_PIXELS
    image_column: str | None = None
    label_column: str | None = None
    split: str | None = None
    alpha: bool = False

    def decode(self, data: bytes, name: str) -> Pixels:
        """Pixels of an image file.

        Raises:
            DataError: see `decode.decode_image`; or the file is too large.
        """
        if len(data) > self.max_file_bytes:
            raise DataError(
                f"{name} has {len(data) / 2**20:,.0f} MiB, and images of over "
                f"{self.max_file_bytes / 2**20:,.0f} MiB are not read. If it is what it should be: "
                "tessera data convert --max-file-size MIB"
            )
        return decode_image(
            data, name, upright=self.upright, alpha=self.alpha, max_pixels=self.max_pixels
        )

    def record(self, name: str, label: Label, data: bytes) -> Record:
        """An image whose file is in memory already."""
        return Record(name, label, functools.partial(self.decode, data, name))


@dataclass(frozen=True)
class Kind:
    """A kind of collection.

    Attributes:
        words: how a list of the kinds calls it.
        matches: whether what is at a path is of this kind, told quickly.
        open: the collection, while the block runs.
        takes: names of the `Options` that choose a part of it.
    """

    words: str
    matches: Callable[[Path], bool]
    open: Callable[[Path, Options], AbstractContextManager[Source]]
    takes: frozenset[str] = frozenset()


def number_classes(
    values: Sequence[int | str | None], where: str
) -> tuple[list[int | None], tuple[str, ...] | None]:
    """Class indices of labels that are all numbers, or all names.

    Names are numbered in sorted order. Negative numbers stand for no label.

    Returns:
        Indices, and the names of the classes if they have some.

    Raises:
        DataError: numbers and names, too many names, or a number that is none of a class.
    """
    names = {value for value in values if isinstance(value, str)}
    if not names:
        numbers = [value for value in values if not isinstance(value, str)]
        indices = [None if value is None or value < 0 else value for value in numbers]
        if max((value for value in indices if value is not None), default=0) >= _LARGEST:
            raise DataError(f"{where}: its labels are numbers of {_LARGEST:,} and more, no classes")
        return indices, None
    if any(isinstance(value, int) for value in values):
        raise DataError(f"{where}: its labels are numbers here and names there")
    if len(names) > CLASSES:
        raise DataError(
            f"{where}: its labels have more than {CLASSES:,} different values, so they are no "
            f"classes; choose others, or `label_column={NO_LABELS}`"
        )
    ordered = sorted(names)
    index: dict[int | str | None, int] = {name: i for i, name in enumerate(ordered)}
    return [None if value is None else index[value] for value in values], tuple(ordered)


def choose_name(
    given: str | None,
    found: Sequence[str],
    there: Sequence[str],
    what: str,
    option: str,
    where: str,
) -> str | None:
    """The name that the user gave, or the only one that was found; None if there is none.

    Args:
        found: those that look right.
        there: all that could be named.
        what: what they are called, as in "image column".

    Raises:
        DataError: what was given is not there, or several look right; the message lists them.
    """
    if given is not None:
        if given not in there:
            raise DataError(f"{where}: no {what} {given!r}; there are: {_listed(there)}")
        return given
    if len(found) > 1:
        raise DataError(
            f"{where}: several could be the {what}: {_listed(found)}; choose with `{option}=NAME`"
        )
    return found[0] if found else None


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(name[:60] for name in names[:20]) or "none"
    return shown + (f", and {len(names) - 20} more" if len(names) > 20 else "")

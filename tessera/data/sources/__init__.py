"""Readers of foreign image collections, all giving the same stream of records."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tessera.data.sources.arrow import ARROW
from tessera.data.sources.base import Kind, Options, Pixels, Record, Source
from tessera.data.sources.cifar import CIFAR
from tessera.data.sources.files import FILES, PACKED
from tessera.data.sources.idx import IDX
from tessera.data.sources.listing import LISTING
from tessera.data.sources.lmdb_folder import LMDB
from tessera.data.sources.parquet import PARQUET
from tessera.data.sources.shards import SHARDS, is_pattern
from tessera.errors import DataError
from tessera.files import user_path

__all__ = ["KINDS", "Options", "Pixels", "Record", "Source", "is_foreign", "open_source"]

KINDS: tuple[Kind, ...] = (LMDB, ARROW, PARQUET, CIFAR, SHARDS, LISTING, IDX, PACKED, FILES)
"""All that are read; the first that matches a path is taken."""
_CHOICES = ("image_column", "label_column", "split")


@contextlib.contextmanager
def open_source(path: Path, options: Options | None = None) -> Iterator[Source]:
    """Open a collection of one of the `KINDS`, told by its name and by what is in it.

    Raises:
        DataError: nothing there, of no known kind, or without what the options choose.
    """
    path, options = user_path(path), options or Options()
    kind = find_kind(path)
    given = [name for name in _CHOICES if getattr(options, name) is not None]
    for name in given:
        if name not in kind.takes:
            raise DataError(f"{path}: `{name}` is not for this kind of collection ({kind.words})")
    with kind.open(path, options) as source:
        yield source


def find_kind(path: Path) -> Kind:
    """The kind of the collection at a path.

    Raises:
        DataError: nothing is there, or it is of no known kind.
    """
    if not (path.exists() or is_pattern(path)):
        raise DataError(f"{path}: no such file or folder")
    for kind in KINDS:
        if kind.matches(path):
            return kind
    raise DataError(
        f"{path}: not a kind of image collection that is known here; known are "
        + ", ".join(kind.words for kind in KINDS)
    )


def is_foreign(path: Path) -> bool:
    """Whether a collection is there that has to be converted before it is trained on."""
    kind = next((kind for kind in KINDS if kind.matches(path)), FILES)
    return kind not in (FILES, PACKED) and (path.exists() or is_pattern(path))

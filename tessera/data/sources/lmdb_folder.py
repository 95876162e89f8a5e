"""The databases of LSUN."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tessera.data.sources.base import Kind, Options, Record, Source
from tessera.errors import DataError, require_extra


def _matches(path: Path) -> bool:
    named = path.name.lower().endswith("_lmdb")
    return path.is_dir() and (named or (path / "data.mdb").exists())


@contextlib.contextmanager
def _open(path: Path, options: Options) -> Iterator[Source]:
    lmdb = require_extra("lmdb", "data", "reading an LMDB folder")
    try:
        database = lmdb.open(str(path), readonly=True, lock=False, readahead=True, max_readers=1)
    except lmdb.Error as error:
        raise DataError(f"{path}: not an LMDB folder ({error})") from error
    with database, database.begin() as transaction:

        def records() -> Iterator[Record]:
            # The cursor belongs to this thread; the bytes go to the others.
            for key, value in transaction.cursor():
                name = f"{path}: {key.decode('utf-8', 'backslashreplace')}"
                yield options.record(name, None, bytes(value))

        yield Source("LMDB folder", path.name, int(transaction.stat()["entries"]), records())


LMDB = Kind("LSUN *_lmdb folders", _matches, _open)

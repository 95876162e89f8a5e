"""Parquet files with a column of images, as the Hugging Face hub keeps them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tessera.data.sources.base import Kind, Options, Source, choose_name
from tessera.data.sources.table import ImageTable, table_features, table_source, undamaged
from tessera.data.sources.walk import files_of
from tessera.errors import DataError, require_extra

# `train-00000-of-00004.parquet`, perhaps with a hash behind; or `train/0000.parquet`.
_SHARD = re.compile(r"(.+?)-\d+-of-\d+(-\w+)?")
_SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval")


def _matches(path: Path) -> bool:
    return path.suffix.lower() == ".parquet" or bool(files_of(path, ".parquet"))


@contextlib.contextmanager
def _open(path: Path, options: Options) -> Iterator[Source]:
    paths = _of_split(path, files_of(path, ".parquet") or [path], options.split)
    parquet = require_extra("pyarrow.parquet", "data", "reading parquet files")
    with contextlib.ExitStack() as stack:
        files = []
        for part in paths:
            with undamaged(part):
                # Pages are read as they are needed, not whole groups of rows.
                file = parquet.ParquetFile(part, pre_buffer=False, buffer_size=1 << 20)
                files.append((part, stack.enter_context(file)))
        schema = files[0][1].schema_arrow

        def batches(column: str, rows: int) -> Iterator[tuple[Path, Any]]:
            for part, file in files:
                _check_column(part, file, column, schema, options.max_file_bytes)
                with undamaged(part):
                    yield from (
                        (part, batch.column(0))
                        for batch in file.iter_batches(rows, columns=[column], use_threads=False)
                    )

        count = sum(file.metadata.num_rows for _, file in files)
        features = table_features(schema, str(paths[0]))
        table = ImageTable("parquet", path.stem, str(path), count, schema, features, batches)
        yield table_source(table, options)


def _check_column(path: Path, file: Any, column: str, schema: Any, limit: int) -> None:
    """Raise for a file of other columns than the first one, or rows of impossible size."""
    own = file.schema_arrow
    if column not in own.names or own.field(column).type != schema.field(column).type:
        raise DataError(f"{path}: no column {column!r} of the type {schema.field(column).type}")
    groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
    for group in groups:
        chunks = (group.column(i) for i in range(group.num_columns))
        size = sum(
            chunk.total_uncompressed_size
            for chunk in chunks
            if chunk.path_in_schema.split(".")[0] == column
        )
        if size > limit * max(group.num_rows, 1):
            raise DataError(
                f"{path}: {size / 2**20:,.0f} MiB in {group.num_rows:,} rows, and images of over "
                f"{limit / 2**20:,.0f} MiB are not read. If it is what it should be: "
                "tessera data convert --max-file-size MIB"
            )


def _of_split(path: Path, files: list[Path], split: str | None) -> list[Path]:
    """The files of one split; all of them where nothing tells of splits."""
    splits = [_split(path, file) for file in files]
    names = sorted({name for name in splits if name is not None})
    found = choose_name(split, names, names, "split", "split", str(path))
    return [file for file, name in zip(files, splits, strict=True) if name == found or not names]


def _split(root: Path, file: Path) -> str | None:
    shard = _SHARD.fullmatch(file.stem)
    folders = file.relative_to(root).parts[:-1] if file != root else ()
    for name in (shard[1] if shard else file.stem, *reversed(folders)):
        if shard or name.lower() in _SPLITS:
            return name
    return None


PARQUET = Kind(
    ".parquet files and folders of them",
    _matches,
    _open,
    frozenset({"image_column", "label_column", "split"}),
)

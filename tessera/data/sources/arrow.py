"""Folders that `datasets` of Hugging Face saves by `save_to_disk`, and Arrow streams."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tessera.data.sources.base import Kind, Options, Source, choose_name
from tessera.data.sources.table import (
    ImageTable,
    features_of,
    pyarrow,
    table_features,
    table_source,
    undamaged,
)
from tessera.errors import DataError
from tessera.plain import MIB, parse_json

_SPLITS, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"


def _matches(path: Path) -> bool:
    if path.is_dir():
        return (path / _SPLITS).is_file() or (
            (path / _STATE).is_file() and any(path.glob("*.arrow"))
        )
    return path.suffix.lower() == ".arrow"


@contextlib.contextmanager
def _open(path: Path, options: Options) -> Iterator[Source]:
    folder = _split_folder(path, options.split)
    files = _files(folder) if folder.is_dir() else [folder]
    if not files:
        raise DataError(f"{folder}: no .arrow files in it")
    with _stream(files[0]) as reader:
        schema = reader.schema
    features = table_features(schema, str(files[0]))
    if not features and folder.is_dir():
        features = features_of(_json(folder / _INFO))

    def batches(column: str, rows: int) -> Iterator[tuple[Path, Any]]:
        for file in files:
            yield from ((file, batch.column(column)) for batch in _batches(file, schema))

    count = sum(batch.num_rows for file in files for batch in _batches(file, schema))
    kind = "datasets folder" if path.is_dir() else "Arrow file"
    table = ImageTable(kind, path.stem, str(path), count, schema, features, batches)
    yield table_source(table, options)


def _split_folder(path: Path, split: str | None) -> Path:
    if not (path / _SPLITS).is_file():
        choose_name(split, [], [], "split", "split", str(path))
        return path
    content = _json(path / _SPLITS)
    names = content.get("splits") if isinstance(content, dict) else None
    if not (isinstance(names, list) and all(map(_is_plain, names))):
        raise DataError(f"{path / _SPLITS}: should hold a list of the names of splits")
    found = choose_name(split, names, names, "split", "split", str(path))
    if found is None:
        raise DataError(f"{path}: no splits in it")
    return path / found


def _files(folder: Path) -> list[Path]:
    """The files that the state names, in its order."""
    state = _json(folder / _STATE)
    entries = state.get("_data_files") if isinstance(state, dict) else None
    names = [e.get("filename") if isinstance(e, dict) else None for e in entries or ()]
    if not isinstance(entries, list) or not all(map(_is_plain, names)):
        raise DataError(f"{folder / _STATE}: should name the .arrow files beside it")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{folder}: its rows are chosen by a file of indices, which is not read; save it again "
            "after dataset.flatten_indices()"
        )
    return [folder / str(name) for name in names]


def _is_plain(name: Any) -> bool:
    """Whether it names a file or folder beside, not one elsewhere."""
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def _json(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            return parse_json(file.read(16 * MIB + 1), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


@contextlib.contextmanager
def _stream(path: Path) -> Iterator[Any]:
    arrow = pyarrow()
    with undamaged(path), arrow.memory_map(str(path)) as file:
        yield arrow.ipc.open_stream(file)


def _batches(path: Path, schema: Any) -> Iterator[Any]:
    with _stream(path) as reader:
        if reader.schema != schema:
            raise DataError(f"{path}: other columns than in the first file")
        for batch in reader:
            batch.validate(full=True)  # places within a damaged batch may lie anywhere
            yield batch


ARROW = Kind(
    "folders saved by `datasets` (save_to_disk)",
    _matches,
    _open,
    frozenset({"image_column", "label_column", "split"}),
)

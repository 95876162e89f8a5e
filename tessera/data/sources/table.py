"""Columns of images and labels in tables of Arrow, as parquet and `datasets` keep them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.data.labels import is_names
from tessera.data.sources.base import (
    NO_LABELS,
    Options,
    Record,
    Source,
    choose_name,
    number_classes,
)
from tessera.errors import DataError, require_extra
from tessera.plain import parse_json

Batches = Callable[[str, int], Iterable[tuple[Path, Any]]]
"""The batches of a column, of at most so many rows where that can be chosen, with their files."""

_IMAGE_NAMES = ("image", "img", "picture", "photo", "pixel_values", "jpg", "png")
_LABEL_NAMES = ("label", "labels", "class", "class_id", "class_label", "target", "category")
# Few, because each may be as large as one image may be.
_IMAGES, _LABELS = 16, 1 << 16


@dataclass(frozen=True)
class ImageTable:
    """A table in files.

    Attributes:
        kind, name, where: for messages, and for the name of the set.
        count: rows.
        schema: of pyarrow.
        features: what Hugging Face's `datasets` says of the columns.
        batches: of a column.
    """

    kind: str
    name: str
    where: str
    count: int
    schema: Any
    features: Mapping[str, Any]
    batches: Batches


def pyarrow() -> Any:
    """The package, or an error that says which extra brings it."""
    return require_extra("pyarrow", "data", "reading parquet and Arrow files")


@contextlib.contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Errors of pyarrow in the block are those of a damaged file."""
    try:
        yield
    except (pyarrow().ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
        text = str(error).split("\n", 1)[0][:200]
        raise DataError(f"{path}: damaged, or not the file that its name says ({text})") from error


def table_features(schema: Any, where: str) -> dict[str, Any]:
    """What the metadata of a schema say of its columns in the words of `datasets`."""
    text = (schema.metadata or {}).get(b"huggingface")
    content = None if text is None else parse_json(text, f"{where}: metadata")
    info = content.get("info") if isinstance(content, dict) else None
    return features_of(info)


def features_of(info: Any) -> dict[str, Any]:
    """The columns in a `dataset_info.json`, by name; none if it is something else."""
    features = info.get("features") if isinstance(info, dict) else None
    if not isinstance(features, dict):
        return {}
    return {name: value for name, value in features.items() if isinstance(value, dict)}


def table_source(table: ImageTable, options: Options) -> Source:
    """The images of a table in the order of its rows, a few in memory at once.

    Raises:
        DataError: no such columns, or of types that hold neither images nor classes.
    """
    image, label = _image_column(table, options), _label_column(table, options)
    values: Iterable[int | None] = itertools.repeat(None, table.count)
    names = None
    if label is not None:
        values, names = _labels(table, label)
    records = _records(table, image, values, options)
    return Source(table.kind, table.name, table.count, records, names)


def _records(
    table: ImageTable, column: str, labels: Iterable[int | None], options: Options
) -> Iterator[Record]:
    rows, place, row = iter(labels), None, 0
    for path, values in table.batches(column, _IMAGES):
        place, row = path, row if path == place else 0
        if pyarrow().types.is_struct(values.type):
            index = values.type.get_field_index("bytes")
            values = values.flatten()[index]
        for value in values:
            label = next(rows, ...)
            if label is ...:
                raise DataError(f"{path}: more images than rows were announced")
            data, name = value.as_py(), f"{path}, row {row}"
            if data is None:
                yield Record(name, label, _Missing(name))
            else:
                yield options.record(name, label, data)
            row += 1
    if next(rows, ...) is not ...:
        raise DataError(f"{table.where}: fewer images than rows were announced")


@dataclass(frozen=True)
class _Missing:
    name: str

    def __call__(self) -> Any:
        raise DataError(f"{self.name}: the table holds no image there, at most the path of one")


# -------------------------------------------------------------------------------- images and labels


def _image_column(table: ImageTable, options: Options) -> str:
    where = table.where
    there = [field.name for field in table.schema if _holds_images(field.type)]
    told = [name for name in there if table.features.get(name, {}).get("_type") == "Image"]
    named = [name for name in there if name.lower() in _IMAGE_NAMES]
    given = options.image_column
    if given is not None and given in table.schema.names and given not in there:
        kind = table.schema.field(given).type
        raise DataError(
            f"{where}: column {given!r} is of the type {kind}; images are bytes of image files, "
            "plain or in a struct with a field `bytes`"
        )
    found = choose_name(given, told or named or there, there, "image column", "image_column", where)
    if found is None:
        columns = ", ".join(f"{f.name} ({str(f.type)[:40]})" for f in list(table.schema)[:20])
        raise DataError(
            f"{where}: no column of image files (bytes, or a struct with a field bytes of them); "
            f"there are: {columns or 'none'}"
        )
    return found


def _holds_images(kind: Any) -> bool:
    if pyarrow().types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_bytes(kind.field(index).type)
    return _is_bytes(kind)


def _is_bytes(kind: Any) -> bool:
    types = pyarrow().types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _label_column(table: ImageTable, options: Options) -> str | None:
    given, where = options.label_column, table.where
    if given == NO_LABELS:
        return None
    there = [field.name for field in table.schema if _holds_labels(field.type)]
    told = [name for name in there if table.features.get(name, {}).get("_type") == "ClassLabel"]
    named = [name for name in there if name.lower() in _LABEL_NAMES]
    if given is not None and given in table.schema.names and given not in there:
        kind = table.schema.field(given).type
        raise DataError(
            f"{where}: column {given!r} is of the type {kind}; labels are whole numbers or names"
        )
    return choose_name(given, told or named, there, "label column", "label_column", where)


def _holds_labels(kind: Any) -> bool:
    types = pyarrow().types
    if types.is_dictionary(kind):
        kind = kind.value_type
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return bool(text or types.is_integer(kind) or types.is_boolean(kind))


def _labels(table: ImageTable, column: str) -> tuple[list[int | None], tuple[str, ...] | None]:
    where = f"{table.where}: column {column!r}"
    values: list[int | str | None] = []
    once: dict[Any, Any] = {}  # a million of equal names take the place of one
    for _, batch in table.batches(column, _LABELS):
        for value in batch.to_pylist():
            value = int(value) if isinstance(value, bool) else value
            values.append(once.setdefault(value, value))
    if len(values) != table.count:
        raise DataError(f"{where}: {len(values)} labels for {table.count} rows")
    indices, names = number_classes(values, where)
    feature = table.features.get(column, {})
    told = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    if names is not None or not (told and is_names(told)):
        return indices, names
    if max((index for index in indices if index is not None), default=0) >= len(told):
        raise DataError(f"{where}: labels beyond the {len(told)} names of its classes")
    return indices, tuple(told)

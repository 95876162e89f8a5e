"""Tables of files and labels: CSV, TSV and JSON lines, as `metadata.csv` of an imagefolder."""

from __future__ import annotations

import contextlib
import csv
import functools
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from tessera.data.members import read_file
from tessera.data.sources.base import (
    NO_LABELS,
    Kind,
    Options,
    Pixels,
    Record,
    Source,
    choose_name,
    number_classes,
)
from tessera.errors import DataError
from tessera.plain import MIB, parse_json

_ENDINGS = (".csv", ".tsv", ".jsonl")
_FILE_NAMES = ("file_name", "file", "filename", "path", "image", "image_path", "filepath")
_LABEL_NAMES = ("label", "labels", "class", "class_name", "category", "target")
_LINE = MIB
_Row = tuple[int, dict[str, Any]]


@contextlib.contextmanager
def _open(path: Path, options: Options) -> Iterator[Source]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = _lines(file, path)
            read = _json_rows if path.suffix.lower() == ".jsonl" else _csv_rows
            there, found = read(lines, path)
            columns = _columns(there, path, options)
            rows = [_entry(line, row, columns, path) for line, row in found]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text in UTF-8") from error
    labels, names = number_classes(_numbers([value for _, _, value in rows]), str(path))
    records = [
        Record(
            f"{path}, line {line}: {name}",
            label,
            functools.partial(_load, path, line, name, options),
        )
        for (line, name, _), label in zip(rows, labels, strict=True)
    ]
    yield Source("list of files", path.stem, len(records), records, names)


def _lines(file: IO[str], path: Path) -> Iterator[str]:
    while line := file.readline(_LINE):
        if len(line) == _LINE:
            raise DataError(f"{path}: a line of over {_LINE:,} characters, which is no list")
        yield line


def _csv_rows(lines: Iterator[str], path: Path) -> tuple[list[str], Iterable[_Row]]:
    """The columns and (line, row) of a table with a header: of commas, semicolons or tabs."""
    header = next(lines, "")
    mark = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    rows = _csv_lines(csv.reader(itertools.chain([header], lines), delimiter=mark), path)
    names = [name.strip() for name in next(rows, (1, []))[1]]
    return names, (_named(line, row, names, path) for line, row in rows)


def _csv_lines(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, row) without empty lines."""
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: no row of a table ({error})") from error


def _named(line: int, row: list[str], names: list[str], path: Path) -> _Row:
    if len(row) != len(names):
        raise DataError(f"{path}, line {line}: {len(row)} columns, and the header has {len(names)}")
    return line, dict(zip(names, row, strict=True))


def _json_rows(lines: Iterator[str], path: Path) -> tuple[list[str], Iterable[_Row]]:
    """The columns and (line, row) of a list of JSON objects."""
    rows: list[_Row] = []
    for line, text in enumerate(lines, 1):
        row = parse_json(text, f"{path}, line {line}") if text.strip() else {}
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {line}: should be an object with a file and a label")
        if row:
            rows.append((line, row))
    return list(dict.fromkeys(name for _, row in rows for name in row)), rows


def _entry(
    line: int, row: dict[str, Any], columns: tuple[str, str | None], path: Path
) -> tuple[int, str, Any]:
    """(line, file, label) of a row."""
    name = row.get(columns[0])
    if not (isinstance(name, str) and name.strip()):
        raise DataError(f"{path}, line {line}: no name of a file in column {columns[0]!r}")
    return line, name.strip(), None if columns[1] is None else row.get(columns[1])


def _columns(there: list[str], path: Path, options: Options) -> tuple[str, str | None]:
    files = [name for name in there if name.lower() in _FILE_NAMES]
    file = choose_name(
        options.image_column, files, there, "column of files", "image_column", str(path)
    )
    if file is None:
        raise DataError(
            f"{path}: no column of files; the header should name one file_name or file. There are: "
            f"{', '.join(there)[:300]}; choose with `image_column=NAME`"
        )
    if options.label_column == NO_LABELS:
        return file, None
    labels = [name for name in there if name.lower() in _LABEL_NAMES and name != file]
    where = str(path)
    return file, choose_name(
        options.label_column, labels, there, "label column", "label_column", where
    )


def _numbers(values: list[Any]) -> list[int | str | None]:
    """Labels as they are meant: numbers where all are, else names; nothing stands for none."""
    kept = [value.strip() or None if isinstance(value, str) else value for value in values]
    texts = [str(value) for value in kept if value is not None]
    if all(len(text) <= 10 and text.removeprefix("-").isdecimal() for text in texts):
        return [None if value is None else int(value) for value in kept]
    return [None if value is None else str(value) for value in kept]


def _load(path: Path, line: int, name: str, options: Options) -> Pixels:
    where = f"{path}, line {line}: {name}"
    folder = Path(os.path.abspath(path.parent))
    file = Path(os.path.normpath(folder / name.replace("\\", "/")))
    if not file.is_relative_to(folder):
        raise DataError(
            f"{where} lies outside of the folder of the list. If that is meant, move the list into "
            "a folder that holds all of its files"
        )
    return options.decode(read_file(file, where, options.max_file_bytes), where)


LISTING = Kind(
    "lists of files (.csv, .tsv, .jsonl)",
    lambda path: path.suffix.lower() in _ENDINGS and not path.is_dir(),
    _open,
    frozenset({"image_column", "label_column"}),
)

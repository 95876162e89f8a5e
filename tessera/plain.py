"""JSON from files that anybody may have written: bounded in size and depth."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tessera.errors import DataError, TesseraError

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 64


def read_json(
    source: str | os.PathLike[str] | bytes,
    *,
    name: str | None = None,
    error: type[TesseraError] = DataError,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
) -> Any:
    """The value in a JSON file, or in bytes that were read from one.

    Args:
        source: a path, or the content itself as bytes.
        name: what messages call it; by default the path.
        error: what is raised if it cannot be read.
        max_bytes: no more is read; a longer file is refused.
        max_depth: of lists and objects within each other.

    Raises:
        TesseraError: of the kind `error`: the file is too long, nested too deeply, no JSON, no
            UTF-8, or cannot be opened.
        FileNotFoundError: there is no such file.

    Example:
        >>> read_json(b'{"labels": null}')
        {'labels': None}
    """
    if name is None:
        name = "JSON" if isinstance(source, bytes) else os.fspath(source)
    content = source if isinstance(source, bytes) else _read(Path(source), name, error, max_bytes)
    if len(content) > max_bytes:
        raise error(f"{name} is longer than {max_bytes:,} bytes")
    too_deep = f"{name} is nested more than {max_depth} levels deep"
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise error(too_deep) from None
    except ValueError as problem:
        raise error(f"{name} is no valid JSON ({problem})") from None
    if deeper(value, max_depth):
        raise error(too_deep)
    return value


def deeper(value: Any, limit: int) -> bool:
    """Whether lists and dictionaries lie within each other more than `limit` levels deep."""
    level = _containers([value])
    for _ in range(limit):
        level = _containers(
            item for node in level for item in (node.values() if isinstance(node, dict) else node)
        )
    return bool(level)


def _containers(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, dict | list)]


def _read(path: Path, name: str, error: type[TesseraError], max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{name} cannot be read ({problem.strerror})") from problem

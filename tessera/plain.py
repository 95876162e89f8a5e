"""Plain values from text that anybody may have written: bounded in size and nesting."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import yaml

from tessera.errors import DataError, TesseraError

MIB = 2**20
DEPTH = 32
"""Values within values, of which the deepest files of the library have seven."""
_NODES = 100_000
_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")
}


def parse_json(
    data: bytes | str,
    what: str,
    *,
    max_bytes: int = 16 * MIB,
    max_depth: int = DEPTH,
    error: type[TesseraError] = DataError,
) -> Any:
    """Parse JSON text.

    Args:
        what: what messages call it.
        max_bytes: the longest text that is read.
        max_depth: most lists and objects within each other.
        error: what is raised.

    Raises:
        TesseraError: the text is longer, nested deeper, or no JSON; of the kind `error`.
    """
    if len(data) > max_bytes:
        raise error(f"{what}: {len(data):,} bytes of JSON, of which at most {max_bytes:,} are read")
    deep = f"{what}: lists or objects are nested over {max_depth} deep, which nothing here needs"
    try:
        value = json.loads(data)
    except RecursionError:
        raise error(deep) from None
    except ValueError as problem:
        raise error(f"{what}: no valid JSON ({problem})") from None
    if not _within(value, max_depth):
        raise error(deep)
    return value


def parse_yaml(
    text: str,
    what: str,
    loader: type[yaml.SafeLoader],
    *,
    max_bytes: int = MIB // 4,
    max_depth: int = DEPTH,
    error: type[TesseraError] = DataError,
) -> Any:
    """Parse YAML text by the rules of `loader`; nothing but plain values, lists and mappings.

    Args as for `parse_json`. Parts that an alias repeats count each time.

    Raises:
        TesseraError: the text is longer, nested deeper, repeats itself without bound, or is no
            YAML; of the kind `error`.
    """
    if len(text) > max_bytes:
        raise error(f"{what}: {len(text):,} bytes of YAML, of which at most {max_bytes:,} are read")
    deep = f"{what}: lists or sections are nested over {max_depth} deep, which nothing here needs"
    try:
        reader = loader(text)
        node = reader.get_single_node()
        if node is None:
            return None
        _check_node(node, max_depth)
        return reader.construct_document(node)
    except (RecursionError, _TooDeepError):
        raise error(deep) from None
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise error(f"{what}{where}: {problem.problem or problem.context}") from None
    except yaml.YAMLError as problem:
        raise error(f"{what}: {problem}") from None
    except (ValueError, KeyError) as problem:  # of a value that is not what its tag says
        raise error(f"{what}: a value cannot be read ({problem})") from None


class _TooDeepError(Exception):
    pass


def _within(value: Any, depth: int) -> bool:
    """Whether lists and dictionaries are nested no deeper."""
    level: list[Any] = [value] if isinstance(value, list | dict) else []
    for _ in range(depth):
        level = [x for part in level for x in _items(part) if isinstance(x, list | dict)]
        if not level:
            return True
    return False


def _items(value: list[Any] | dict[str, Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _check_node(root: yaml.Node, max_depth: int) -> None:
    """Refuse tags of other values, deep nesting, and aliases that repeat too much."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        if depth > max_depth:  # also what contains itself
            raise _TooDeepError
        if id(node) in sizes:
            return sizes[id(node)]
        if node.tag not in _TAGS:
            problem = f"a value of the kind {node.tag}, which recipes do not have"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        total = 1
        if isinstance(node, yaml.MappingNode):
            total += sum(size(key, depth + 1) + size(item, depth + 1) for key, item in node.value)
        elif isinstance(node, yaml.SequenceNode):
            total += sum(size(item, depth + 1) for item in node.value)
        if total > _NODES:
            problem = f"with all that its aliases repeat, this is over {_NODES:,} values"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        sizes[id(node)] = total
        return total

    size(root, 1)

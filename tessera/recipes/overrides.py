"""Changes to a recipe while it is still plain data: inheritance and `key.path=value`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tessera.errors import RecipeError
from tessera.recipes.text import read_yaml

Data = dict[str, Any]


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> Data:
    """`base` with the keys of `change`; sections merge, all else (lists too) is replaced.

    A section whose `kind` changes is replaced whole: the keys of the old kind mean nothing there.
    """
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            changed = "kind" in value and value["kind"] != old.get("kind")
            value = merge({} if changed else old, value)
        merged[key] = value
    return merged


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> Data:
    """`data` with every `key.path=value` set; the values are YAML.

    Sections get their new `kind` first, wherever it stands in the list; then the order counts.
    An index addresses an element of a list; the index after the last one adds an element.

    Raises:
        RecipeError: an override has no `=`, or its key leads through a value or past a list's end.
    """
    pairs = [_split(override) for override in overrides]
    result: Any = _copy(data)
    for parts, value in sorted(pairs, key=lambda pair: pair[0][-1] != "kind"):
        _set(result, parts, value)
    return dict(result)


def _split(override: str) -> tuple[list[str], Any]:
    key, separator, text = override.partition("=")
    key = key.strip().removeprefix("--")
    if not separator or not key or not all(key.split(".")):
        raise RecipeError(
            f"{override!r} is not of the form key.path=value, for example training.batch=64"
        )
    return key.split("."), read_yaml(text, override)


def _set(node: Any, parts: Sequence[str], value: Any) -> None:
    key = ".".join(parts)
    if len(parts) > 1 and parts[-1] == "kind":
        # Set the section itself, so that the keys of another kind go.
        section = _get(node, parts[:-1])
        if not isinstance(section, Mapping) or section.get("kind") != value:
            return _set(node, parts[:-1], {"kind": value})
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth])
        last = depth == len(parts) - 1
        if isinstance(node, list):
            index = _index(part, node, where, key)
            if index == len(node):
                node.append({})
            if last:
                node[index] = value
            node = node[index]
        elif isinstance(node, dict):
            if last:
                node[part] = value
            elif node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise RecipeError(f"{key}: {where} is the value {node!r} and has no keys of its own")
    return None


def _index(part: str, items: list[Any], where: str, key: str) -> int:
    if not part.isdecimal() or int(part) > len(items):
        raise RecipeError(
            f"{key}: {where} is a list of {len(items)}; use an index from 0 to {len(items)} "
            f"in the place of {part!r} ({len(items)} adds an element)"
        )
    return int(part)


def _get(node: Any, parts: Sequence[str]) -> Any:
    for part in parts:
        if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, Mapping):
            node = node.get(part)
        else:
            return None
    return node


def _copy(value: Any) -> Any:
    """Dictionaries and lists that may be changed."""
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return value

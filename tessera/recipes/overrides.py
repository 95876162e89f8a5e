"""Changes to a recipe while it is still plain data: YAML values, `key.path=value`, inheritance."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from tessera.errors import RecipeError

Data = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 2e6 is a number, `on` and 2024-01-01 are text, no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen and key != "<<":
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} stands there twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [entry for entry in resolvers if entry[0].rsplit(":", 1)[1] in ("null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    # YAML 1.1 reads 010 as eight.
    return int(loader.construct_scalar(node).replace("_", ""))


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


def read_yaml(text: str, source: str) -> Any:
    """Parse YAML (or JSON) text; `source` names it in errors.

    Raises:
        RecipeError: the text is no valid YAML, or holds a key twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{source}{where}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: {error}") from None


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

"""Recipes as YAML text, read and written by the same rules."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tessera.errors import RecipeError
from tessera.plain import parse_yaml


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 2e6 is a number, `on` and 2024-01-01 are text, no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key, mark = key_node.value, key_node.start_mark
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=mark)
            if key in seen:
                problem = f"the key {key!r} stands there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
            seen.add(key)
            if key_node.tag != "tag:yaml.org,2002:merge":
                key_node.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line, as people write them."""


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    flow = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


_Dumper.add_representer(list, _represent_list)

_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
for _rules in (_Loader, _Dumper):
    _rules.yaml_implicit_resolvers = {
        first: [entry for entry in resolvers if entry[0].rsplit(":", 1)[1] in ("null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for _tag, (_pattern, _first) in _SCALARS.items():
        _rules.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
        )


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    # YAML 1.1 reads 010 as eight.
    return int(loader.construct_scalar(node).replace("_", ""))


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


def read_yaml(text: str, source: str) -> Any:
    """Parse YAML (or JSON) text; `source` names it in errors.

    Raises:
        RecipeError: the text is no valid YAML, holds a key twice, or is long or nested beyond all
            need.
    """
    return parse_yaml(text, source, _Loader, error=RecipeError)


def write_yaml(value: Any) -> str:
    """Plain data as YAML text that `read_yaml` reads back to the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)

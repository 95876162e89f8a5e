"""What is wrong with a recipe, in words, with its dotted keys and the nearest valid ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from tessera.recipes.schema import Recipe

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list such as [1, 2, 2]",
    "model": "a section (keys and values)",
    "model_attributes": "a section (keys and values)",
    "dict": "a section (keys and values)",
}
_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def describe(
    error: ValidationError, data: Mapping[str, Any], root: type[BaseModel] = Recipe
) -> str:
    """Every mistake of `data`, a section `root`, on its own line, as `key: what is wrong`."""
    details: list[dict[str, Any]] = [dict(item) for item in error.errors(include_url=False)]
    places = [detail["loc"] for detail in details]
    # A list with a faulty element also counts as too short: say only the former.
    faulty = {place[:depth] for place in places for depth in range(len(place))}
    return "\n".join(
        _line(detail, data, root)
        for detail in details
        if detail["type"] != "too_short" or detail["loc"] not in faulty
    )


def suggestion(word: str, choices: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest of `choices`, or nothing."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The section types of a field: one, several for a choice by `kind`, none for a value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in sections(part)]


def kinds(section: type[BaseModel]) -> tuple[str, ...]:
    """The values of `kind` that select `section`."""
    field = section.model_fields.get("kind")
    return get_args(field.annotation) if field is not None else ()


def select(choices: Sequence[type[BaseModel]], value: Any) -> type[BaseModel] | None:
    """The section type that `value` is meant to be."""
    if len(choices) == 1:
        return choices[0]
    kind = value.get("kind") if isinstance(value, Mapping) else None
    return next((choice for choice in choices if kind in kinds(choice)), None)


def _line(detail: dict[str, Any], data: Mapping[str, Any], root: type[BaseModel]) -> str:
    parts, section = _locate(detail["loc"], data, root)
    problem, context, value = detail["type"], detail.get("ctx", {}), detail.get("input")
    if problem in ("union_tag_invalid", "union_tag_not_found"):
        # Pydantic reports the section; the mistake is in its `kind`.
        parts.append("kind")
    key = ".".join(parts)
    subject = problem.rsplit("_", 1)[0]
    if problem == "extra_forbidden":
        text = f"unknown key{_nearest_key(parts, section, data, root)}"
    elif problem == "missing":
        text = "is missing"
    elif problem == "union_tag_invalid":
        expected = context["expected_tags"].replace("'", "")
        text = f"{context['tag']!r} is not one of {expected}"
        text += suggestion(str(context["tag"]), expected.split(", "))
    elif problem == "union_tag_not_found":
        text = f"is missing; choose one of {_choices(section, parts[-2])}"
    elif problem == "literal_error":
        expected = context["expected"].replace("'", "")
        text = f"{_show(value)} is not one of {expected}"
        text += suggestion(str(value), expected.replace(" or ", ", ").split(", "))
    elif problem in _BOUNDS:
        words, name = _BOUNDS[problem]
        text = f"must be {words} {context[name]:g}, got {_show(value)}"
    elif problem == "value_error":
        text = str(context["error"])
    elif problem == "int_from_float":
        text = f"expected a whole number, got {_show(value)}"
    elif problem == "too_short":
        text = f"needs at least {context['min_length']} element(s)"
    elif subject in _EXPECTED:
        text = f"expected {_EXPECTED[subject]}, got {_show(value)}"
    else:
        text = f"{detail['msg']}, got {_show(value)}"
    return f"{key}: {text}" if key else text


def _locate(
    location: Sequence[str | int], data: Mapping[str, Any], root: type[BaseModel]
) -> tuple[list[str], type[BaseModel] | None]:
    """A location in pydantic's words as dotted key parts, and the section that holds the last."""
    parts: list[str] = []
    node: Any = data
    holder: type[BaseModel] | None = root
    choices: list[type[BaseModel]] = [root]
    chosen = True
    for part in location:
        kind = node.get("kind") if isinstance(node, Mapping) else node
        if not chosen and kind == part:
            chosen = True  # pydantic adds the kind of a choice to the location; it is no key
            continue
        parts.append(str(part))
        chosen = False
        if isinstance(part, int):
            node = node[part] if isinstance(node, list | tuple) and part < len(node) else None
            continue
        holder = select(choices, node)
        field = holder.model_fields.get(part) if holder is not None else None
        choices = sections(field.annotation) if field is not None else []
        chosen = len(choices) < 2
        node = node.get(part) if isinstance(node, Mapping) else None
    return parts, holder


def _choices(section: type[BaseModel] | None, name: str) -> str:
    field = section.model_fields.get(name) if section is not None else None
    found = sections(field.annotation) if field is not None else []
    return ", ".join(kind for choice in found for kind in kinds(choice))


def _nearest_key(
    parts: Sequence[str],
    section: type[BaseModel] | None,
    data: Mapping[str, Any],
    root: type[BaseModel],
) -> str:
    *prefix, last = parts
    valid = list(section.model_fields) if section is not None else []
    # The right word in the wrong place, such as lr for optimizer.lr.
    elsewhere = [key for key in _all_keys(root, data) if key.rsplit(".", 1)[-1] == last]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    near = difflib.get_close_matches(last, valid, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {'.'.join([*prefix, near[0]])}?"
    where = f"{'.'.join(prefix)} has" if prefix else "a recipe has"
    return f"; {where} {', '.join(valid)}" if valid else ""


def _all_keys(section: type[BaseModel], data: Any) -> Iterator[str]:
    """Every dotted key of a recipe with the kinds that `data` chooses."""
    for name, field in section.model_fields.items():
        yield name
        value = data.get(name) if isinstance(data, Mapping) else None
        listed = isinstance(value, list | tuple)
        inner = select(sections(field.annotation), value)
        if inner is not None:
            prefix = f"{name}.0" if listed else name
            first = value[0] if listed and value else value
            yield from (f"{prefix}.{key}" for key in _all_keys(inner, first))


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a section"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else text[:57] + "..."

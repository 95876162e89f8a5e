"""Every key of a recipe with its type, default and meaning, read from the schema."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tessera.recipes.messages import kinds, sections
from tessera.recipes.schema import Recipe
from tessera.recipes.text import write_yaml

_PLAIN = {int: "whole number", float: "number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Key:
    """One key of a section.

    Attributes:
        name: without the section's.
        type: in words.
        default: as a recipe file says it; "" where there is none.
        meaning: in a few words.
        choices: all values, where they are few.
    """

    name: str
    type: str
    default: str
    meaning: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class SectionKeys:
    """One kind of a section.

    Attributes:
        path: of the section, as `network`; "" for the recipe itself.
        kind: as `kind` selects it; "" where there is one only.
        meaning: of the kind, a sentence or two.
        keys: those that hold values; sections inside have entries of their own.
    """

    path: str
    kind: str
    meaning: str
    keys: tuple[Key, ...]


def recipe_keys() -> list[SectionKeys]:
    """All sections and kinds, as they stand in a recipe.

    Example:
        >>> [entry.kind for entry in recipe_keys() if entry.path == "view"]
        ['full', 'patches']
    """
    return list(_walk(Recipe, "", set()))


def markdown() -> str:
    """All sections and keys as a page of documentation."""
    lines = ["# Every key of a recipe", "", _PAGE, ""]
    for entry in recipe_keys():
        if not entry.path:
            title = "The recipe itself"
        else:
            path = entry.path.replace(".0", "")
            title = f"`{path}`" + (", each" if ".0" in entry.path else "")
            title += f", kind `{entry.kind}`" if entry.kind else ""
        lines += [f"## {title}", "", entry.meaning, ""]
        if entry.keys:
            lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
            lines += [
                f"| `{key.name}` | {key.type} | {f'`{key.default}`' if key.default else 'needed'} "
                f"| {key.meaning} |".replace("<", "&lt;")
                for key in entry.keys
            ]
            lines.append("")
    return "\n".join(lines)


_PAGE = (
    "Written by `tessera recipes keys --markdown`. `tessera recipes keys network` prints a part of "
    "it on the terminal. [Recipes](recipes.md) says how they are written and changed."
)


def _walk(section: type[BaseModel], path: str, seen: set[tuple[str, str]]) -> Iterator[SectionKeys]:
    """Those of a section and of the ones inside, each kind at a place once."""
    if (path, section.__name__) in seen:
        return
    seen.add((path, section.__name__))
    own, inner = [], []
    for name, field in section.model_fields.items():
        found = sections(field.annotation)
        if found:
            listed = str(field.annotation).startswith("tuple")
            inner += [(choice, f"{path}.{name}".lstrip(".") + ".0" * listed) for choice in found]
        if name != "kind" or len(kinds(section)) != 1:
            meaning, choices = field.description or "", _choices(field.annotation)
            own.append(Key(name, _type_of(field), _default(field), meaning, choices))
    text = " ".join((inspect.getdoc(section) or "").split())
    kind = kinds(section)
    yield SectionKeys(path, kind[0] if len(kind) == 1 else "", text, tuple(own))
    for choice, place in inner:
        yield from _walk(choice, place, seen)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return f"kind {value.kind}" if hasattr(value, "kind") else "its defaults"
    if isinstance(value, tuple) and any(isinstance(item, BaseModel) for item in value):
        return "one, with its defaults"
    plain = list(value) if isinstance(value, tuple) else value
    return write_yaml({"x": plain}).removeprefix("x:").strip() if plain != "" else "''"


def _choices(annotation: Any) -> tuple[str, ...]:
    """The values of a type of few, as a change of a recipe gives them."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is bool:
        return "true", "false"
    if origin is Literal:
        return tuple(str(value) for value in arguments)
    if origin is Annotated:
        return _choices(arguments[0])
    if origin in (Union, UnionType):
        return tuple(choice for part in arguments for choice in _choices(part))
    return ()


def _type_of(field: FieldInfo) -> str:
    return _text(field.annotation, field.metadata)


def _text(annotation: Any, metadata: Any = ()) -> str:
    """A type in words, with its bounds."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        extra = [m for item in arguments[1:] for m in getattr(item, "metadata", [item])]
        return _text(arguments[0], [*extra, *metadata])
    if origin in (Union, UnionType):
        rest = [part for part in arguments if part is not NoneType]
        if sections(annotation):
            texts = ["section"]
        else:
            texts = list(dict.fromkeys(_text(part, metadata) for part in rest))
        return " or ".join([*texts, *(["null"] if NoneType in arguments else [])])
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is tuple:
        if sections(annotation):
            return "list of sections"
        same = len(arguments) == 2 and arguments[1] is Ellipsis
        if same:
            return f"list ({_text(arguments[0])})"
        return f"{len(arguments)} of: {_text(arguments[0])}"
    if origin is dict:
        return "section"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return " ".join([_PLAIN.get(annotation, str(annotation)), *_bounds(metadata)])


def _bounds(metadata: Any) -> list[str]:
    signs = ((Gt, "gt", ">"), (Ge, "ge", "≥"), (Lt, "lt", "<"), (Le, "le", "≤"))
    return [
        f"{sign} {getattr(item, name):,}"
        for kind, name, sign in signs
        for item in metadata
        if isinstance(item, kind)
    ]

"""What stands on the page for each option of a model, by its type, bounds and usual values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

from tessera.errors import TesseraError
from tessera.pipelines.options import Option
from tessera.recipes.schema import Section, Usual
from tessera.studio.control import read_changes

Kind = Literal["switch", "choice", "slider", "number", "text"]
NONE = "none"


@dataclass(frozen=True)
class Knob:
    """One control.

    Attributes:
        name: of the option.
        section: that it belongs to.
        kind: switch, choice among `choices`, slider from `low` to `high`, number, or text.
        value: that it begins with, and that is left unsaid.
        meaning: in a few words.
        whole: a whole number.
        first: people try it first.
    """

    name: str
    section: str
    kind: Kind
    value: Any
    meaning: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0
    step: float = 0.01
    whole: bool = False
    first: bool = False


def knobs(options: Iterable[Option]) -> list[Knob]:
    """A control for each option that one control can hold; others are typed as `name=value`."""
    return [made for option in options if (made := knob(option)) is not None]


def knob(option: Option) -> Knob | None:
    """The control of an option; None for a whole section of options."""
    types, checks = _taken_apart(option.annotation)
    if any(_holds_several(kind) for kind in types):
        return None
    usual = next((check for check in checks if isinstance(check, Usual)), None)
    about: dict[str, Any] = {"meaning": option.meaning, "first": usual is not None}
    optional, types = NoneType in types, [kind for kind in types if kind is not NoneType]
    literals = [kind for kind in types if get_origin(kind) is Literal]
    if types == [bool] and not optional:
        return Knob(option.name, option.section, "switch", bool(option.value), **about)
    if literals and len(literals) == len(types):
        choices = [str(choice) for kind in literals for choice in get_args(kind)]
        choices = [NONE] * optional + choices
        value = NONE if option.value is None else str(option.value)
        return Knob(option.name, option.section, "choice", value, choices=tuple(choices), **about)
    if types in ([int], [float]) and not optional and math.isfinite(option.value):
        return _number(option, types == [int], usual, checks, about)
    return Knob(option.name, option.section, "text", shown_value(option.value), **about)


def _holds_several(kind: Any) -> bool:
    """Whether values of a type are sections of options."""
    return get_origin(kind) is dict or (isinstance(kind, type) and issubclass(kind, Section))


def _number(
    option: Option, whole: bool, usual: Usual | None, checks: list[Any], about: dict[str, Any]
) -> Knob:
    """A slider where a range is usual, or the only possible one; else a field."""
    low, high = _bounds(checks, whole)
    if usual is not None and usual.low is not None:
        low = usual.low if low is None else max(usual.low, low)
    if usual is not None and usual.high is not None:
        high = usual.high if high is None else min(usual.high, high)
    small = usual is not None or (high is not None and high <= 100)
    if low is None or high is None or not small:
        return Knob(option.name, option.section, "number", option.value, whole=whole, **about)
    low, high = min(low, option.value), max(high, option.value)
    step = 1.0 if whole else 10.0 ** math.floor(math.log10((high - low) / 20))
    return Knob(
        option.name, option.section, "slider", option.value, **about,
        low=low, high=high, step=step, whole=whole,
    )  # fmt: skip


def _bounds(checks: list[Any], whole: bool) -> tuple[float | None, float | None]:
    """The least and largest value; one that is just excluded counts as the largest."""
    found = {
        name: float(getattr(check, name))
        for check in checks
        for kind, name in ((Ge, "ge"), (Gt, "gt"), (Le, "le"), (Lt, "lt"))
        if isinstance(check, kind)
    }
    low, high = found.get("ge"), found.get("le")
    if "gt" in found and whole:
        low = found["gt"] + 1
    if "lt" in found:
        high = found["lt"] - (1 if whole else 0)
    return low, high


def _taken_apart(annotation: Any) -> tuple[list[Any], list[Any]]:
    """The types that a value may have, and what it must be."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        types, checks = _taken_apart(arguments[0])
        more = [c for item in arguments[1:] for c in getattr(item, "metadata", [item])]
        return types, [*checks, *more]
    if origin in (Union, UnionType):
        parts = [_taken_apart(part) for part in arguments]
        return [t for types, _ in parts for t in types], [c for _, checks in parts for c in checks]
    return [annotation], []


def shown_value(value: Any) -> str:
    """A value as it is typed."""
    if value is None:
        return NONE
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def given_options(shown: Iterable[Knob], values: Iterable[Any], more: str) -> dict[str, Any]:
    """The options that differ from what the model does by itself.

    Args:
        values: of the controls, in their order.
        more: `name=value` words, which take the place of controls.

    Raises:
        TesseraError: a word is none of them, or a field is empty.
    """
    given: dict[str, Any] = {}
    for one, value in zip(shown, values, strict=True):
        if value is None:
            raise TesseraError(f"`{one.name}`: give a number, such as {shown_value(one.value)}")
        if one.kind == "text":
            value = str(value).strip() or NONE
        if one.whole and isinstance(value, float) and value.is_integer():
            value = int(value)
        if value != one.value:
            given[one.name] = None if value == NONE else value
    return given | _typed(more)


def _typed(more: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in read_changes(more):
        name, _, value = word.partition("=")
        found[name] = None if value.lower() in (NONE, "null") else value
    return found

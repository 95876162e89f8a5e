"""Methods whose signature and help name what the instance at hand takes."""

from __future__ import annotations

import functools
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterable
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from tessera.pipelines.options import Option
from tessera.recipes.schema import Section

_WIDTH = 88


class PerModel:
    """A method that ends in `**options`, shown with the options of its instance in their place.

    `help(pipe.sample)`, a notebook's `pipe.sample?` and completion then list what this model takes,
    with types, defaults and meanings. Calls are those of the plain method.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> Callable[..., Any]:
        function = self.function
        if instance is None:
            return function

        @functools.wraps(function)
        def method(*args: Any, **options: Any) -> Any:
            return function(instance, *args, **options)

        signature, text = self._shown(instance)
        method.__signature__ = signature  # type: ignore[attr-defined]
        method.__doc__ = text
        return method

    def _shown(self, instance: Any) -> tuple[inspect.Signature, str]:
        """Signature and documentation; made once for each instance and recipe."""
        kept: dict[str, Any] = instance.__dict__.setdefault("_shown", {})
        key, name = instance.recipe, self.function.__name__
        if name not in kept or kept[name][0] is not key:
            options = instance.options()
            shown = _signature(self.function, options), _documentation(self.function, options)
            kept[name] = key, shown
        found: tuple[inspect.Signature, str] = kept[name][1]
        return found


def _signature(function: Callable[..., Any], options: Iterable[Option]) -> inspect.Signature:
    plain = inspect.signature(function)
    rest = inspect.Parameter.VAR_KEYWORD
    own = [p for p in list(plain.parameters.values())[1:] if p.kind is not rest]
    taken = {p.name for p in own}
    added = [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.value,
            annotation=_shown_type(option.annotation),
        )
        for option in options
        if option.name.isidentifier() and option.name not in taken
    ]
    last = [p for p in plain.parameters.values() if p.kind is rest]
    return plain.replace(parameters=[*own, *added, *last])


def _shown_type(annotation: Any) -> Any:
    """A field's type for people: without its checks; sections are given as mappings."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _shown_type(arguments[0])
    if origin in (Union, UnionType):
        return functools.reduce(operator.or_, dict.fromkeys(map(_shown_type, arguments)))
    if origin is tuple:
        return tuple[tuple(map(_shown_type, arguments))]  # type: ignore[misc]
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return dict
    return annotation


def _documentation(function: Callable[..., Any], options: Iterable[Option]) -> str:
    """The method's own text, then the options by section."""
    lines = [inspect.getdoc(function) or "", "", "Options of this model, with their defaults:"]
    section = None
    for option in options:
        if option.section != section:
            section = option.section
            lines += ["", f"  {section}"]
        text = f"{option.name}={option.value!r}" + (f": {option.meaning}" if option.meaning else "")
        lines += textwrap.wrap(text, _WIDTH, initial_indent="    ", subsequent_indent="        ")
    return "\n".join(lines) + "\n"

"""What all commands share: `~` in their paths, and errors that speak of their options."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import typer
from typer.models import ArgumentInfo, OptionInfo

from tessera.errors import TesseraError
from tessera.files import user_path

Command = TypeVar("Command", bound=Callable[..., Any])


class App(typer.Typer):
    """A group of commands whose paths may begin with `~`, and whose errors name options.

    Errors of the library mark its parameters by backquotes (see `TesseraError`); those that the
    command has become its options.
    """

    def command(self, *args: Any, **options: Any) -> Callable[[Command], Command]:
        """Register a command, as Typer does."""
        register = super().command(*args, **options)

        def decorate(function: Command) -> Command:
            register(_on_the_command_line(function))
            return function

        return decorate


def _on_the_command_line(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **values: Any) -> Any:
        values = {
            name: user_path(value) if isinstance(value, Path) else value
            for name, value in values.items()
        }
        try:
            return function(*args, **values)
        except TesseraError as error:
            error.args = (in_options(str(error), option_names(function)),)
            raise

    return run


def option_names(function: Callable[..., Any]) -> dict[str, str]:
    """How the command line calls the parameters of a command: `steps` is `--steps`."""
    names: dict[str, str] = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        for info in (parameter.default, *get_args(parameter.annotation)):
            if isinstance(info, OptionInfo):
                # Typer takes the first name within `Annotated` for a default.
                given = (info.default, *(info.param_decls or ()))
                declared = [str(part) for part in given if str(part).startswith("--")]
                names[name] = (declared or [f"--{name.replace('_', '-')}"])[0].split("/")[0]
            elif isinstance(info, ArgumentInfo):
                names[name] = info.metavar or name.upper()
    return names


def in_options(text: str, names: Mapping[str, str]) -> str:
    """`text` with the parameters in backquotes as options: `steps=4` becomes --steps 4."""

    def option(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if name not in names:
            return match[0]
        return names[name] if value in (None, "True") else f"{names[name]} {value}"

    return re.sub(r"`(?P<name>\w+)(?:=(?P<value>[^`]*))?`", option, text)

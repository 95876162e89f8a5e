"""What all commands share: options in the words of errors, and `~` in paths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from tessera import cli
from tessera.cli.app import App, in_options, option_names
from tessera.errors import TesseraError


def functions(app: typer.Typer) -> list[Any]:
    """The functions of all commands below `app`."""
    own = [command.callback for command in app.registered_commands]
    groups = [group.typer_instance for group in app.registered_groups]
    return own + [function for group in groups if group for function in functions(group)]


@pytest.mark.parametrize("function", functions(cli.app), ids=lambda f: f.__name__)
def test_names_are_those_of_the_help(function: Any) -> None:
    app = typer.Typer()
    app.command()(function)
    text = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["--help"]).output
    names = option_names(function)
    assert names
    for name in names.values():
        assert all(part.lower() in text.lower() for part in name.split(" and ")), name


def test_every_group_speaks_of_options() -> None:
    def groups(app: typer.Typer) -> list[typer.Typer]:
        inner = [group.typer_instance for group in app.registered_groups]
        return [app, *(found for group in inner if group for found in groups(group))]

    assert all(isinstance(group, App) for group in groups(cli.app))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("give `noise_schedule=linear` or", "give --noise-schedule linear or"),
        ("leave out `skip`.", "leave out --skip."),
        ("add `overwrite=True`", "add --overwrite"),
        ("see `tessera recipes` and `training.batch=4`", "see `tessera recipes` and `training.b"),
        ("`other=3`", "`other=3`"),
        ("`skip=`: nothing", "--skip : nothing"),
    ],
)
def test_parameters_become_options(text: str, expected: str) -> None:
    names = {"noise_schedule": "--noise-schedule", "skip": "--skip", "overwrite": "--overwrite"}
    assert in_options(text, names).startswith(expected)


def test_a_command() -> None:
    app = App()
    seen: list[Any] = []

    @app.command()
    def first(
        path: Path = typer.Argument(metavar="FOLDER"),
        other: Annotated[Path | None, typer.Option("--elsewhere")] = None,
        text: str = typer.Option("~", "--text", "-t"),
        flag: bool = typer.Option(True, "--flag/--no-flag"),
    ) -> None:
        """Note the arguments."""
        seen.extend([path, other, text])
        raise TesseraError("`path`, `other=3`, `text`, `flag`")

    @app.command()
    def second() -> None:
        """Do nothing."""

    result = CliRunner(env={"HOME": "/home/me"}).invoke(app, ["first", "~/a", "--elsewhere=~/b"])
    assert seen == [Path("/home/me/a"), Path("/home/me/b"), "~"]
    assert str(result.exception) == "FOLDER, --elsewhere 3, --text, --flag"
    first_function: Any = first
    assert first_function.__name__ == "first"

"""The `tessera` command: one thin file a command; each parses, calls the library, prints."""

from __future__ import annotations

import sys

import typer
from typer.completion import completion_init  # type: ignore[attr-defined]

from tessera import memory
from tessera._version import __version__
from tessera.cli.app import App
from tessera.cli.bricks import bricks
from tessera.cli.compare import compare_models
from tessera.cli.completing import completion
from tessera.cli.convert import convert
from tessera.cli.cost import cost
from tessera.cli.data import data_app
from tessera.cli.edit import edit
from tessera.cli.energy import energies
from tessera.cli.eval import eval_app
from tessera.cli.experts import experts
from tessera.cli.export import export
from tessera.cli.plan import plan_data
from tessera.cli.push import push
from tessera.cli.quickstart import quickstart
from tessera.cli.recipes import recipes_app
from tessera.cli.relay import relay
from tessera.cli.report import report
from tessera.cli.sample import sample
from tessera.cli.studio import studio
from tessera.cli.train import train_model
from tessera.errors import TesseraError

# Command modules import torch inside their functions, so that `tessera --help` answers at once.
app = App(
    name="tessera",
    help="Train, sample and score image diffusion models at a fraction of the usual compute.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(value: bool) -> None:
    if value:
        print(f"tessera {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


app.command()(quickstart)
app.add_typer(data_app, name="data")
app.add_typer(recipes_app, name="recipes")
app.command("plan")(plan_data)
app.command()(cost)
app.command("train")(train_model)
app.command()(sample)
app.command()(report)
app.command()(studio)
app.command()(edit)
app.command()(experts)
app.command()(relay)
app.command()(bricks)
app.command("energy")(energies)
app.command("compare")(compare_models)
app.command()(convert)
app.command()(export)
app.command()(push)
app.add_typer(eval_app, name="eval")
app.command()(completion)


# What Typer's own options would do; `tessera completion` prints what makes shells ask.
completion_init()


def main() -> None:
    """Run the command; errors that the user can put right exit with code 2 and no traceback."""
    text = _run()
    if text is not None:
        typer.secho("error:", fg="red", bold=True, err=True, nl=False)
        print("", text, file=sys.stderr)
        sys.exit(2)


def _run() -> str | None:
    """Run the command; what is wrong, if the user can put it right.

    When it returns, the failed command's memory is free again, for there may be no other.
    """
    try:
        app()
    except Exception as error:
        text = _in_words(error)
        if text is None:
            raise
        return text
    return None


def _in_words(error: Exception) -> str | None:
    """What is wrong, of errors that the user can put right; None for those of the program."""
    if isinstance(error, TesseraError):
        return str(error)
    if memory.used_up(error):
        return (
            "the memory is used up. Take fewer images at once: training.micro_batch of a recipe, "
            "--batch of a command"
        )
    if isinstance(error, OSError) and error.strerror:  # a full disk, a folder without permission
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return None

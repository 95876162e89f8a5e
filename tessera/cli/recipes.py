"""`tessera recipes`: what ships, and every key of a recipe."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.table import Column
from rich.text import Text

from tessera.cli.app import App
from tessera.cli.completing import offer_changes, offer_recipes, offer_sections
from tessera.cli.tables import make_table

recipes_app = App(
    help="List the shipped recipes, or show every key of one.", invoke_without_command=True
)


@recipes_app.callback()
def list_recipes(context: typer.Context) -> None:
    """List the shipped recipes, or show every key of one."""
    if context.invoked_subcommand is not None:
        return
    from tessera.recipes.loading import shipped

    table = make_table(
        Column("recipe", style="cyan", no_wrap=True), Column("what"),
        Column("images", no_wrap=True), Column("classes", justify="right"),
    )  # fmt: skip
    for name, make in shipped().items():
        recipe = make()
        data = recipe.data
        colour = "grey" if data.channels == 1 else "RGB"
        colour = "VAE" if recipe.codec.kind == "vae" else colour
        size = f"{data.resolution}×{data.resolution} {colour}"
        table.add_row(name, recipe.description, size, str(data.num_classes or "-"))
    Console().print(table)


@recipes_app.command("show")
def show(
    recipe: str = typer.Argument(
        help="A shipped recipe, or a .yaml or .json file.", autocompletion=offer_recipes
    ),
    overrides: list[str] = typer.Argument(
        None,
        metavar="KEY=VALUE",
        help="Changes, such as training.batch=64.",
        autocompletion=offer_changes,
    ),
) -> None:
    """Print a recipe with all its keys as YAML; the output is a recipe file itself."""
    from tessera.recipes.loading import dump_recipe, load_recipe
    from tessera.recipes.text import write_yaml

    text = write_yaml(dump_recipe(load_recipe(recipe, overrides or ())))
    if not sys.stdout.isatty():
        print(text, end="")
        return
    from rich.syntax import Syntax

    Console().print(Syntax(text, "yaml", theme="ansi_dark", background_color="default"))


@recipes_app.command("keys")
def keys(
    section: str | None = typer.Argument(
        None,
        metavar="[SECTION]",
        help="Such as network, or sampling.refine. (default: all)",
        autocompletion=offer_sections,
    ),
    as_markdown: bool = typer.Option(False, "--markdown", help="Print the page of the docs."),
) -> None:
    """Print every key of a recipe with its type, default and meaning."""
    from tessera.errors import RecipeError
    from tessera.recipes.keys import markdown, recipe_keys
    from tessera.recipes.messages import suggestion

    if as_markdown:
        print(markdown(), end="")
        return
    entries, console = recipe_keys(), Console(highlight=False)
    places = sorted({entry.path for entry in entries if entry.path})
    if section is not None and section not in places:
        raise RecipeError(
            f"there is no section {section!r}{suggestion(section, places)}. There are "
            + ", ".join(places)
        )
    for entry in entries:
        if section is not None and entry.path != section:
            continue
        head = " ".join([entry.path or "recipe", *([f"kind={entry.kind}"] if entry.kind else [])])
        console.print(Text(head, "bold cyan"), Text(entry.meaning))
        if not entry.keys:
            continue
        table = make_table(
            Column("key", no_wrap=True), Column("value"), Column("default"), Column("meaning")
        )
        for key in entry.keys:
            table.add_row(*(Text(text) for text in (key.name, key.type, key.default, key.meaning)))
        console.print(table)
        console.print()

"""`tessera plan`: what a set of images asks for at each noise level."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Column
from rich.text import Text

from tessera.cli.tables import make_table, print_rows

if TYPE_CHECKING:
    from tessera.planning.proposal import DataProposal
    from tessera.planning.study import DataStudy

_OTHERS = {
    "bands": "views by noise level, in any recipe with EDM's objective",
    "experts": "a pair of experts, 0 for low noise and 1 for high",
    "relay": "the second stage of a relay",
    "lego": "a stack of LEGO bricks, whose depths are yours to choose",
}


def plan_data(
    data: Path = typer.Argument(
        metavar="DATA", help="Images of any kind that `tessera data convert` reads, or latents."
    ),
    images: int | None = typer.Option(
        None, min=2, help="Look at a random sample; by default what takes less than a minute."
    ),
    resolution: int | None = typer.Option(
        None, min=8, help="Crop images of any size to squares, and resize them."
    ),
    bound: float = typer.Option(
        1.03, help="Error that is accepted, relative to that of the full image."
    ),
    luma: bool = typer.Option(False, "--luma", help="Look at the luma of RGB images only."),
    base: str | None = typer.Option(
        None, metavar="RECIPE", help="Write the keys as changes of this recipe, and check them."
    ),
    save: Path | None = typer.Option(None, help="YAML file for the keys of recipes."),
    plot: Path | None = typer.Option(
        None, help="Picture (.svg, or .png with matplotlib) or page (.html) to write."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the files."),
    seed: int = typer.Option(0, help="Chooses the sample."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of tables."),
) -> None:
    """Tell from images how much of them a denoiser must see at each noise level.

    Prints errors of the best linear denoiser by what it sees, and proposes keys of recipes, each
    with its reason: noise levels, coarse views, crops, experts, relay, bricks. Nothing is trained.
    """
    from tessera.errors import RecipeError
    from tessera.files import atomic_file, check_free
    from tessera.planning.proposal import propose
    from tessera.planning.sample import Reading
    from tessera.planning.spectrum import measure_set
    from tessera.planning.study import study_set
    from tessera.planning.text import as_plain
    from tessera.reports.planned import check_plot, write_plot

    for path in filter(None, (save, plot)):
        check_free(path, overwrite)
    if plot is not None:
        check_plot(plot)
    if save is not None and save.suffix.lower() not in (".yaml", ".yml"):
        raise RecipeError(f"{save}: recipes are files NAME.yaml")
    reading = Reading(images=images, seed=seed, resolution=resolution)
    study = study_set(measure_set(data, reading, "luma" if luma else "all"))
    proposal = propose(study, bound)
    recipe = recipe_text(proposal, study, None if resolution else data, base)
    if as_json:
        plain = as_plain(study, proposal)
        print(json.dumps(plain, indent=2, ensure_ascii=False))
    else:
        _show(study, proposal, recipe)
    if save is not None:
        with atomic_file(save) as file:
            file.write(recipe.encode())
    if plot is not None:
        write_plot(plot, study, proposal, recipe)
    if not as_json:
        for path in filter(None, (save, plot)):
            print(f"written to {path}")


def recipe_text(
    proposal: DataProposal, study: DataStudy, data: Path | None, base: str | None
) -> str:
    """The keys of recipes as YAML; those of other recipes as comments.

    Args:
        data: the set that is trained on; None: it has to be converted first.
        base: a recipe that they change.

    Raises:
        RecipeError: they do not fit to the base.
    """
    from tessera.planning.text import commented
    from tessera.recipes.loading import dump_recipe, load_recipe, parse_recipe
    from tessera.recipes.overrides import merge
    from tessera.recipes.text import write_yaml

    keys: dict[str, Any] = {**proposal.recipe}
    channels, height, _ = study.measured.shape
    section: dict[str, Any] = {} if data is None else {"path": str(data)}
    if study.measured.of_pixels:
        section |= {"resolution": height, "channels": channels}
    if section:
        keys = {"data": section, **keys}
    if base is not None:
        parse_recipe(merge(dump_recipe(load_recipe(base)), keys), f"the plan for {base}")
        keys = {"base": base, **keys}
    text = write_yaml(keys)
    for name, words in _OTHERS.items():
        if name in proposal.others:
            lines = write_yaml(dict(proposal.others[name])).splitlines()
            text += "\n" + commented([f"For {words}:", *lines])
    return text


def _show(study: DataStudy, proposal: DataProposal, recipe: str) -> None:
    from tessera.planning.text import HEAD, error_rows, looked_at

    console = Console(highlight=False)
    console.print(Text(looked_at(study)))
    console.print("Error of the best linear denoiser, relative to that of the full image:\n")
    print_rows(HEAD, error_rows(study))
    console.print()
    table = make_table(
        Column(style="bold", no_wrap=True), Column(overflow="fold"), Column(style="dim")
    )
    for advice in proposal.advice:
        table.add_row(*map(Text, (advice.name, advice.value, advice.why)))
    console.print(table)
    console.print()
    print(recipe, end="")

"""Every key of a recipe is explained, on the terminal and in the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from tessera.cli import app
from tessera.errors import RecipeError
from tessera.recipes.keys import markdown, recipe_keys
from tessera.recipes.loading import dump_recipe, load_recipe, shipped
from tessera.recipes.messages import sections
from tessera.recipes.schema import Recipe

DOCS = Path(__file__).parents[2] / "docs"


def leaves(section: type[BaseModel], prefix: str = "") -> set[str]:
    """Every dotted key of every kind, as the schema has them."""
    found = set()
    for name, field in section.model_fields.items():
        inner = sections(field.annotation)
        found.add(f"{prefix}{name}")
        listed = ".0" if str(field.annotation).startswith("tuple") else ""
        for choice in inner:
            found |= leaves(choice, f"{prefix}{name}{listed}.")
    return found


def test_every_key_has_a_meaning_and_a_type() -> None:
    for entry in recipe_keys():
        assert entry.meaning, entry.path
        for key in entry.keys:
            assert key.meaning, f"{entry.path}.{key.name}"
            assert key.type, f"{entry.path}.{key.name}"
            assert "<class" not in key.type, key
            assert "typing" not in key.type, key


def test_no_key_is_left_out() -> None:
    entries = recipe_keys()
    listed = {f"{entry.path}.{key.name}".lstrip(".") for entry in entries for key in entry.keys}
    kinds = {f"{entry.path}.kind" for entry in entries if entry.kind}
    assert listed | kinds == leaves(Recipe)


def test_defaults_are_those_of_the_schema() -> None:
    entries = {(entry.path, entry.kind): entry for entry in recipe_keys()}
    patches = {key.name: key for key in entries["view", "patches"].keys}
    assert patches["real_p"].default == "0.5"
    assert patches["real_p"].type == "number ≥ 0 ≤ 1"
    assert patches["sizes"].default == "null"
    song = {key.name: key for key in entries["network", "song_unet"].keys}
    assert song["channel_mult"].default == "[1, 2, 2, 2]"
    assert {key.name: key.default for key in entries["", ""].keys}["network"] == ""


def test_the_page_of_the_documentation_is_up_to_date() -> None:
    assert (DOCS / "recipe-keys.md").read_text() == markdown(), (
        "write it anew: tessera recipes keys --markdown > docs/recipe-keys.md"
    )


def test_on_the_command_line() -> None:
    run = CliRunner().invoke(app, ["recipes", "keys", "sampling.refine"], env={"COLUMNS": "120"})
    assert run.exit_code == 0
    assert "kind=mcmc" in run.output
    assert "leave out steps that raise a sample's energy" in run.output
    assert "channel_mult" not in run.output
    whole = CliRunner().invoke(app, ["recipes", "keys"], env={"COLUMNS": "120"}).output
    assert all(entry.path in whole for entry in recipe_keys())
    with pytest.raises(RecipeError, match="did you mean view"):
        CliRunner().invoke(app, ["recipes", "keys", "vew"], catch_exceptions=False)


@pytest.mark.parametrize("name", ["quickstart-digits", "cifar10-small-mar"])
def test_keys_of_recipes_are_among_them(name: str) -> None:
    assert name in shipped()
    kinds = {(entry.path, entry.kind): {key.name for key in entry.keys} for entry in recipe_keys()}
    recipe = dump_recipe(load_recipe(name))
    for section in ("network", "objective", "data"):
        own = recipe[section]
        assert own.keys() - {"kind"} <= kinds[section, own.get("kind", "")]

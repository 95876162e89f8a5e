"""The documentation of recipes says what is so."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

from tessera.pipelines.relay import STAGES
from tessera.recipes.build import build_model
from tessera.recipes.loading import load_recipe, shipped
from tessera.recipes.messages import sections
from tessera.recipes.parts import Parts
from tessera.recipes.schema import SAMPLERS, GuidanceConfig, Recipe, Section
from tessera.training.probe import blank_images

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.glob("**/*.md")])
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def keys(section: type[Section], prefix: str = "") -> set[str]:
    """Every dotted key of every kind; elements of lists by `0` and `1`."""
    found = set()
    for name, field in section.model_fields.items():
        found.add(prefix + name)
        inner = [f"{prefix}{name}."]
        if str(field.annotation).startswith("tuple"):
            inner = [f"{prefix}{name}.{index}." for index in (0, 1)]
        for choice in sections(field.annotation):
            for start in inner:
                found |= keys(choice, start)
    return found


def keys_in(page: Path) -> set[str]:
    """The dotted keys that a page sets; of options of somebody's own parts, where they stand."""
    text = page.read_text().replace("training.batc=", "")
    text = re.sub(r"\boptions\.\w+=", "options=", text)
    return set(re.findall(r"\b([a-z]+(?:\.[a-z0-9_]+)+)=", text)) - {"key.path"}


@every_page
def test_keys_exist(page: Path) -> None:
    found = keys_in(page)
    of_stages = {key for key in found if key.split(".")[0] in STAGES}
    # The stages of a relay take what samplers take.
    taken = set().union(*(keys(section) for section in (*SAMPLERS.values(), GuidanceConfig)))
    assert found - of_stages <= keys(Recipe) | taken
    assert {key.partition(".")[2] for key in of_stages} <= taken


def test_keys_are_found() -> None:
    assert len(set().union(*map(keys_in, PAGES))) > 50


@every_page
def test_recipes_exist(page: Path) -> None:
    text = page.read_text()
    used = re.findall(r"tessera (?:train|cost|recipes show) ([a-z0-9][a-z0-9-]*)(?![\w./-])", text)
    for name in re.findall(
        r"`((?:edm|patch|lego|pdm|relay|dit|energy|mar|photos|cifar10|quickstart)-[a-z0-9{},-]+)`",
        text,
    ):
        # Not the names of modules and options, which have no digits.
        if re.search(r"\d|digits", name):
            choices = [part.split(",") for part in re.split(r"[{}]", name)]
            used += map("".join, itertools.product(*choices))
    assert set(used) <= set(shipped())


@pytest.mark.slow
def test_parameters_of_the_table() -> None:
    rows = re.findall(r"^\| `(\S+)` \|.*\| ([\d.]+) M \|$", (DOCS / "recipes.md").read_text(), re.M)
    listed = set()
    for names, millions in rows:
        pattern = re.sub(r"{([^}]*)}", lambda m: f"({m[1].replace(',', '|')})", names)
        for name in filter(re.compile(pattern).fullmatch, shipped()):
            with torch.device("meta"):
                count = sum(p.numel() for p in build_model(shipped()[name]()).parameters())
            assert abs(count / 1e6 - float(millions)) < (1 if "." not in millions else 0.06), name
            listed.add(name)
    assert listed == set(shipped())


def test_the_example_of_a_recipe_of_ones_own(tmp_path: Path) -> None:
    text = (DOCS / "recipes.md").read_text()
    start = text.index("    # flowers.yaml")
    example = text[start : text.index("    tessera train flowers.yaml", start)]
    path = tmp_path / "flowers.yaml"
    path.write_text("\n".join(line[4:] for line in example.splitlines()))
    recipe = load_recipe(path)
    assert (recipe.name, recipe.data.num_classes) == ("flowers", 102)
    assert recipe.training.images == 20_000_000


def test_the_example_of_overrides() -> None:
    text = (DOCS / "recipes.md").read_text()
    table = text[text.index("| you write") : text.index("A wrong key")]
    overrides = re.findall(r"^\| `([^`]+=[^`]+)`", table, re.M)
    assert len(overrides) > 7
    for override in overrides:
        load_recipe("edm-cifar10-cond-vp", [override], Parts(dataset=blank_images))

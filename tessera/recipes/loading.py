"""Recipes by name or from a file, with overrides; and back to plain data."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tessera.errors import RecipeError
from tessera.files import user_path
from tessera.recipes import edm, energy, laptop, lego, mar, patch, pdm, photos, relay
from tessera.recipes.messages import describe, sections, select, suggestion
from tessera.recipes.overrides import Data, apply_overrides, merge
from tessera.recipes.parts import NO_PARTS, Parts
from tessera.recipes.schema import Epoch, Recipe
from tessera.recipes.text import read_yaml

_SUFFIXES = (".yaml", ".yml", ".json")
_SOME = 1_000_000  # images in the place of an epoch, while its size is not known


def shipped() -> dict[str, Callable[[], Recipe]]:
    """The recipes of the library: name to the function that makes it."""
    methods = (laptop, photos, edm, patch, lego, pdm, relay, energy, mar)
    return {name: made for method in methods for name, made in method.RECIPES.items()}


def load_recipe(
    name_or_path: str | os.PathLike[str], overrides: Sequence[str] = (), parts: Parts = NO_PARTS
) -> Recipe:
    """A shipped recipe, or one from a YAML or JSON file, with `key.path=value` overrides.

    A file may begin with `base: NAME` (a shipped recipe or another file, relative to it), and then
    holds only what differs. Its `name` defaults to the file's.

    Numbers of images may be given in epochs, such as `training.images=20 epochs`: then the data
    set is opened to count its images.

    Args:
        parts: of which `dataset`, if it is there, stands in the place of `data.path`.

    Raises:
        RecipeError: no such recipe or file, or a key or value that does not fit; the message names
            every such key.

    Example:
        >>> load_recipe("cifar10-small", ["training.batch=8", "view.kind=patches"]).patch_sizes
        (8, 16, 32)
    """
    source = os.fspath(name_or_path)
    return parse_recipe(apply_overrides(_read(source), overrides), source, parts)


def parse_recipe(
    data: Mapping[str, Any], source: str = "recipe", parts: Parts = NO_PARTS
) -> Recipe:
    """Validate plain data; `source` names it in the message, `parts` are as of `load_recipe`.

    Raises:
        RecipeError: keys or values that do not fit, all of them listed; or epochs without data.
    """
    complete, epoch = _default_kinds(data), Epoch(_SOME)
    recipe = _validated(complete, source, epoch)
    if not epoch.asked:
        return recipe
    from tessera.recipes.datasets import epoch_images

    return _validated(complete, source, Epoch(epoch_images(recipe, parts)))


def _validated(complete: Data, source: str, epoch: Epoch) -> Recipe:
    try:
        return Recipe.model_validate(complete, context=epoch)
    except ValidationError as error:
        lines = describe(error, complete).splitlines()
        text = f" {lines[0]}" if len(lines) == 1 else "\n  " + "\n  ".join(lines)
        raise RecipeError(f"{source}:{text}") from None


def dump_recipe(recipe: Recipe) -> Data:
    """Every key of a recipe as plain data that JSON and YAML can hold; `parse_recipe` reads it."""
    data: Data = _plain(recipe.model_dump())
    return data


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        ordered = sorted(value.items(), key=lambda pair: pair[0] != "kind")
        return {key: _plain(item) for key, item in ordered}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    # JSON has no infinity.
    return "inf" if isinstance(value, float) and math.isinf(value) and value > 0 else value


def _read(source: str, seen: tuple[Path, ...] = ()) -> Data:
    """The data of a shipped recipe or of a file with its bases, not yet validated."""
    recipes = shipped()
    if source in recipes:
        return dump_recipe(recipes[source]())
    path = user_path(source)
    if (path / "recipe.yaml").is_file():
        raise RecipeError(
            f"{path} is the folder of a run. To go on with it: tessera train --resume {path}\n"
            f"To begin another one with its recipe, name the file {path / 'recipe.yaml'}"
        )
    if not (path.suffix in _SUFFIXES or path.is_file() or os.sep in source):
        raise RecipeError(
            f"no recipe is called {source!r}{suggestion(source, recipes)}\n"
            "`tessera recipes` lists them; a recipe of your own is a .yaml or .json file."
        )
    data = _read_file(path)
    if "base" not in data:
        return {"name": path.stem, **data}
    base = data.pop("base")
    if not isinstance(base, str):
        raise RecipeError(f"{path}: base: expected the name of a recipe or a file, got {base!r}")
    if base not in recipes and Path(base).suffix in _SUFFIXES:
        base = str(path.parent / user_path(base))
    seen = (*seen, path.resolve())
    if Path(base).resolve() in seen:
        raise RecipeError(f"{path}: base: {base} is built on this file itself")
    try:
        inherited = _read(base, seen)
    except RecipeError as error:
        raise RecipeError(f"{path}: base: {error}") from None
    return merge(inherited, {"name": path.stem, **data})


def _read_file(path: Path) -> Data:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    data = read_yaml(text, str(path))
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    return data


def _default_kinds(data: Mapping[str, Any]) -> Data:
    """Give sections without `kind` that of their default, so that it need not be written."""
    complete = dict(data)
    for name, field in Recipe.model_fields.items():
        value, choices = complete.get(name), sections(field.annotation)
        if isinstance(value, Mapping) and "kind" not in value and len(choices) > 1:
            default = getattr(field.default, "kind", None)
            if select(choices, {"kind": default}) is not None:
                complete[name] = {"kind": default, **value}
    return complete

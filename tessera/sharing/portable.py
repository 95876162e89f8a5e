"""A pipeline folder that means the same on other machines: no path of this one is in it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from tessera.errors import CheckpointError, TesseraError
from tessera.files import is_hub_id, read_json, sha256, write_json
from tessera.pipelines.folder import read_config
from tessera.recipes.build import build_codec
from tessera.recipes.loading import dump_recipe, parse_recipe
from tessera.recipes.schema import Recipe

_HUB_IDS = {("codec", "model"), ("training", "initial_weights")}
"""Keys whose value may be an id of the hub, which means the same everywhere."""
_ABSOLUTE = re.compile(r"/|\\\\|~[^/\\ ]*[/\\]|[A-Za-z]:[\\/]")


def portable_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain JSON values, of whose local paths only the last names are left.

    The folder of the run goes altogether; ids of the hub stay.
    """
    data = dump_recipe(recipe)
    data["run"]["dir"] = None
    _shorten(data, recipe, ())
    return data


def _shorten(data: Any, section: Any, place: tuple[str, ...]) -> None:
    """Shorten the paths in plain values of (a section of) a recipe, in place."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in list(items):
        below = (*place, str(key))
        if isinstance(value, dict | list):
            inner = getattr(section, str(key), None) if isinstance(section, BaseModel) else None
            _shorten(value, inner, below)
        elif isinstance(value, str) and _is_local(value, section, below):
            data[key] = last_name(value)


def _is_local(value: str, section: Any, place: tuple[str, ...]) -> bool:
    """Whether a value of a recipe is a path of this machine."""
    if place in _HUB_IDS and is_hub_id(value):
        return False
    return bool(_ABSOLUTE.match(value)) or _names_path(section, place[-1])


def last_name(path: str) -> str:
    """The last name of a path of whatever system."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _names_path(section: Any, key: str) -> bool:
    """Whether a key of a section holds a path: whether the schema expands its `~`."""
    field = type(section).model_fields.get(key) if isinstance(section, BaseModel) else None
    if field is None:
        return False
    return any(_expands(item) for item in field.metadata) or _holds_path(field.annotation)


def _holds_path(annotation: Any) -> bool:
    found = any(_expands(item) for item in getattr(annotation, "__metadata__", ()))
    return found or any(_holds_path(part) for part in get_args(annotation))


def _expands(validator: Any) -> bool:
    return getattr(validator, "func", None) is os.path.expanduser


def copy_pipeline(
    folder: Path, target: Path, *, link: bool = False, include_vae: bool = False
) -> None:
    """Copy a pipeline folder, checked, with portable recipes, and nothing else that lies there.

    The autoencoder of a model of latents goes along where the recipe names a folder of this
    machine.

    Args:
        link: link to the weights where that is possible, which saves their space.
        include_vae: also an autoencoder that the recipe names by an id of the hub.

    Raises:
        CheckpointError: a file is missing or damaged.
        TesseraError: `include_vae` for a model of pixels.
    """
    _copy_level(folder, target, link)
    config = read_json(target / "config.json")
    codec = parse_recipe(read_json(folder / "config.json")["recipe"]).codec
    model = getattr(codec, "model", None)
    if model is None and include_vae:
        raise TesseraError(f"{folder} is a model of pixels; leave out `include_vae`")
    wanted = model is not None and (include_vae or not is_hub_id(model))
    if wanted and "codec" not in config.get("parts", {}):
        build_codec(codec).save(target / "codec")
        config["parts"] = {**config.get("parts", {}), "codec": "codec"}
        write_json(target / "config.json", config)


def _copy_level(folder: Path, target: Path, link: bool) -> None:
    """Copy a pipeline and the parts in it."""
    known = read_config(folder)
    config = read_json(folder / "config.json")
    recipe = parse_recipe(config["recipe"], str(folder / "config.json"))
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "config.json", {**config, "recipe": portable_recipe(recipe)})
    for entry in known.weights:
        path = folder / entry.file
        if Path(entry.file).name != entry.file or not path.is_file():
            raise CheckpointError(f"{path} is missing. Save or download the pipeline again")
        if sha256(path) != entry.sha256:
            raise CheckpointError(
                f"{path} is damaged or was changed: its checksum is not the one in config.json. "
                "Save or download the pipeline again"
            )
        _take(path, target / entry.file, link)
    _copy_parts(folder, target, known.parts, link)


def _copy_parts(folder: Path, target: Path, parts: Mapping[str, str], link: bool) -> None:
    for name, kind in parts.items():
        if kind == "pipeline":
            _copy_level(folder / name, target / name, link)
            continue
        (target / name).mkdir()
        for path in sorted((folder / name).iterdir()):
            if path.name == "config.json":
                config = read_json(path)
                config.pop("_name_or_path", None)  # which may be a path of this machine
                write_json(target / name / path.name, config)
            elif path.suffix == ".safetensors":
                _take(path, target / name / path.name, link)


def _take(source: Path, target: Path, link: bool) -> None:
    if link:
        try:
            target.symlink_to(source.resolve())
            return
        except OSError:  # a system without links
            pass
    shutil.copyfile(source, target)

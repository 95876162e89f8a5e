"""The folder of a run: where it is, that it is the right one, and the recipe in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tessera import distributed
from tessera.errors import CheckpointError, RecipeError, TrainingError
from tessera.files import atomic_file, is_left_over, tidy, user_path
from tessera.recipes.loading import dump_recipe, load_recipe, parse_recipe
from tessera.recipes.parts import NO_PARTS, Parts
from tessera.recipes.schema import Recipe
from tessera.recipes.text import write_yaml
from tessera.training import run_lock

RECIPE = "recipe.yaml"

# What is written in a run folder, by the place: of these, killed processes may leave halves.
_WRITTEN = {
    ".": r"recipe\.yaml|metrics\.jsonl|pipeline|best|run\.lock|wandb-id|evaluation.*\.ref\.npz"
    r"|report\.html",
    "checkpoints": r"\d{12}",
    "previews": r"\d{12}\.png",
}

# What may change when a run is resumed: nothing that would make another model of its past.
_CHANGEABLE = (
    "name",
    "description",
    "run",
    "evaluate",
    "validation",
    "sampling",
    "training.images",
    "training.minutes",
    "training.micro_batch",
    "training.precision",
    "training.compile",
    "training.channels_last",
    "training.parallel",
    "training.max_skipped",
    "codec.micro_batch",
    "data.path",
    "data.validation",
    "data.cache",
    "data.workers",
)


_NONE = object()  # of a key that is not there


def create(recipe: Recipe, run_dir: str | Path | None) -> Path:
    """Make the folder of a new run and write its recipe there; the same on all processes.

    Raises:
        TrainingError: the folder holds something already.
    """
    chosen = run_dir or recipe.run.dir
    result: Path | str | None = None
    if distributed.is_main():
        folder = user_path(chosen) if chosen is not None else _next_folder(recipe.name)
        try:
            _begin(folder, recipe)
            result = folder
        except TrainingError as error:
            result = str(error)
    result = distributed.broadcast(result)
    if isinstance(result, str) or result is None:
        raise TrainingError(str(result))
    return result


def _begin(folder: Path, recipe: Recipe) -> None:
    _check_vacant(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock.hold_alone(folder):
        _check_vacant(folder)  # still, now that nobody else can come
        clean(folder)
        write_recipe(folder, recipe)


def _check_vacant(folder: Path) -> None:
    """Refuse a folder that holds more than what is left of a run killed before it began."""
    if folder.is_dir():
        left = [p for p in folder.iterdir() if p.name == run_lock.LOCK or _is_left_over(p)]
        if len(left) == len(list(folder.iterdir())):
            return
    elif not folder.exists():
        return
    raise TrainingError(f"{folder} is not empty. {_advice(folder)}")


def _is_left_over(path: Path) -> bool:
    return is_left_over(path, _WRITTEN["."])


def clean(folder: Path) -> None:
    """Remove what killed processes left half written; for who holds the lock of the run."""
    for place, names in _WRITTEN.items():
        tidy(folder / place, names)


def _advice(folder: Path) -> str:
    other = "choose another folder with run.dir=..."
    if (folder / RECIPE).exists():
        return f"To go on with the run in it: tessera train --resume {folder}\nOr {other}"
    return other[0].upper() + other[1:]


def _next_folder(name: str) -> Path:
    """runs/<name>-<number>, the first number above those that are there."""
    runs = Path("runs")
    found = [re.fullmatch(re.escape(name) + r"-(\d+)", p.name) for p in runs.glob(f"{name}-*")]
    number = max((int(match[1]) for match in found if match), default=0) + 1
    return runs / f"{name}-{number:03d}"


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the complete recipe of a run, unless it is there."""
    path = folder / RECIPE
    text = write_yaml(dump_recipe(recipe))
    if not path.is_file() or path.read_bytes() != text.encode():
        with atomic_file(path) as file:
            file.write(text.encode())


def anchored(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths of images and VAE, so that the run goes on from any folder.

    Spelt as in a file, where a default of 0 is 0.0: a resumed run, which has it from there, writes
    the same bytes.
    """
    data = dump_recipe(recipe)
    for section, keys in (("data", ("path", "validation")), ("evaluate", ("reference", "weights"))):
        for key in keys:
            if data[section] is not None:
                data[section][key] = _absolute(data[section][key])
    vae = data["codec"].get("model")  # or an id of the hub
    if vae is not None and Path(vae).expanduser().is_dir():
        data["codec"]["model"] = _absolute(vae)
    return parse_recipe(data)


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


def read_recipe(
    folder: str | Path, overrides: list[str] | None = None, parts: Parts = NO_PARTS
) -> Recipe:
    """The recipe of an existing run, with changes; `parts` are as of `load_recipe`.

    Raises:
        CheckpointError: there is no run.
        RecipeError: a change that would not continue the run; the message names the key.
    """
    path = user_path(folder) / RECIPE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not the folder of a run: it has no {RECIPE}. "
            "Give the folder that `tessera train` printed when the run began"
        )
    recipe = load_recipe(path)
    if not overrides:
        return recipe
    changed = load_recipe(path, overrides, parts)
    check_same(recipe, changed)
    return changed


def check_length(before: Recipe, after: Recipe, images_seen: int) -> None:
    """Refuse to end a run before where it is.

    Raises:
        RecipeError: names the key.
    """
    images = after.training.images
    if images != before.training.images and images < images_seen:
        raise RecipeError(
            f"training.images={images}: the run has seen {images_seen:,} images already. Give as "
            "many or more; fewer are another run, to be started in another folder"
        )


def longer(recipe: Recipe) -> str:
    """The changes that train a run twice as long, as words of a command."""
    words = f"training.images={2 * recipe.training.images}"
    minutes = recipe.training.minutes
    return words if minutes is None else f"{words} training.minutes={2 * minutes:g}"


def check_same(recipe: Recipe, changed: Recipe) -> None:
    """Refuse changes that would not continue the run of `recipe`.

    Raises:
        RecipeError: names the keys.
    """
    before, after = (_flatten(dump_recipe(anchored(made))) for made in (recipe, changed))
    # Values, not their spelling: a default may be 0 where a file gives 0.0.
    differ = [k for k in sorted({*before, *after}) if before.get(k, _NONE) != after.get(k, _NONE)]
    wrong = [k for k in differ if not any(k == c or k.startswith(c + ".") for c in _CHANGEABLE)]
    if wrong:
        raise RecipeError(
            f"a resumed run cannot change {', '.join(wrong)}: start a new run with it. "
            f"What can change: {', '.join(_CHANGEABLE[2:])}"
        )


def _flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix: data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat

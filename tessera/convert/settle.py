"""From what a file says, a preset and the caller's options to a recipe, and where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tessera.convert.checkpoint import CheckpointFile, Data, Description, Settings
from tessera.errors import CheckpointError, RecipeError
from tessera.recipes.loading import dump_recipe, load_recipe, parse_recipe
from tessera.recipes.overrides import apply_overrides, merge
from tessera.recipes.schema import Recipe

# Keys of a network that change no weights: a file may differ in them from its preset.
_FREE = {"dropout", "recompute", "positions"}


@dataclass(frozen=True)
class Settled:
    """A recipe, and where its values came from.

    Attributes:
        recipe: of the model in the file.
        origins: "the file", "shapes of tensors", "recipe NAME", "options", "defaults of the
            released code" to what came from there, as `key=value`.
        published: the recipe of the published file that this is, by its name and its network.
    """

    recipe: Recipe
    origins: Mapping[str, tuple[str, ...]]
    published: str | None = None


def settle(source: CheckpointFile, found: Description, settings: Settings) -> Settled:
    """The recipe of a file.

    Raises:
        CheckpointError: something is said nowhere, or the preset is another network's.
        RecipeError: the library has no such model, or an option does not fit.
    """
    preset = None if settings.preset is None else _preset(settings.preset, found)
    published = None
    if preset is None and found.published is not None:
        if not _differences(source, found, base := _preset(found.published, found)):
            preset, published = base, found.published
    elif preset is not None and (different := _differences(source, found, preset)):
        raise source.error(
            f"`preset={settings.preset}` is another network: {'; '.join(different[:5])}. Name the "
            "preset that it was trained by, or say by key=value what the file does not"
        )
    _check_needs(source, found, settings, preset)
    data = apply_overrides(_merged(source, found, preset), settings.overrides)
    recipe = parse_recipe(data, str(source.path))
    name = settings.preset or published
    return Settled(recipe, _origins(found, settings, preset, name, recipe), published)


def _check_needs(
    source: CheckpointFile, found: Description, settings: Settings, preset: Data | None
) -> None:
    given = {override.partition("=")[0] for override in settings.overrides} | {*settings.own}
    given |= {key for key, value in _leaves(preset or {}) if value is not None}
    open_ = [
        f"{' or '.join(f'{key}=...' for key in need.keys)} ({need.meaning})"
        for need in found.needs
        if not given & {*need.keys}
    ]
    if open_:
        raise source.error(
            "the file does not say, and its tensors do not show: "
            + "; ".join(open_)
            + ". Add them to the command, or preset=NAME with the name of its recipe"
        )


def _preset(name: str, found: Description) -> Data:
    if name in found.presets:
        return found.presets[name]
    try:
        return dump_recipe(load_recipe(name))
    except RecipeError as error:
        names = f" Presets of this family: {', '.join(found.presets)}." if found.presets else ""
        raise CheckpointError(f"`preset={name}`: {error}.{names}") from None


def _merged(source: CheckpointFile, found: Description, preset: Data | None) -> Data:
    """All sections, the strongest last."""
    origin = f"converted from {source.path.name}"
    described = "" if preset is None else preset.get("description", "")
    data: Data = merge(found.assumed, preset or {})
    for sections in (found.inferred, found.said):
        data = merge(data, sections)
    text = f"{described}, {origin}" if described else origin
    return {**data, "name": source.path.stem, "description": text}


def _differences(source: CheckpointFile, found: Description, preset: Data) -> list[str]:
    """What a preset says of the network that the file denies, in words; nothing if it is silent."""
    own = dict(_leaves(merge(found.inferred, found.said)))
    theirs = dict(_leaves(preset))
    wrong = []
    for key, value in own.items():
        section, _, name = key.partition(".")
        fixed = section in ("network", "preconditioning", "codec") and name not in _FREE
        if not fixed and key not in ("data.resolution", "data.channels", "data.num_classes"):
            continue
        if key in found.free:
            continue
        if key in theirs and _normal(theirs[key]) != _normal(value):
            wrong.append(f"{key} is {_text(value)} in the file and {_text(theirs[key])} there")
    augmented = [sections.get("augment") is not None for sections in (found.said, preset)]
    if "augment" in found.said and augmented[0] != augmented[1]:
        wrong.append(f"the file's has {'' if augmented[0] else 'no '}augmentation labels")
    return wrong


def _normal(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_normal(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _normal(item) for key, item in value.items()}
    return float(value) if isinstance(value, int | float) else value


def _origins(
    found: Description, settings: Settings, preset: Data | None, name: str | None, recipe: Recipe
) -> dict[str, tuple[str, ...]]:
    final = dict(_leaves(dump_recipe(recipe)))
    options = [o.partition("=")[0].removeprefix("--") for o in settings.overrides]
    taken: set[str] = {*options}
    origins: dict[str, tuple[str, ...]] = {}
    base = {k: v for k, v in (preset or {}).items() if k not in ("name", "description")}
    for title, keys in (
        ("options", options),
        ("the file", [key for key, _ in _leaves(found.said)]),
        ("shapes of tensors", [key for key, _ in _leaves(found.inferred)]),
        (f"preset {name}", [key for key, _ in _leaves(base)]),
        ("defaults of the released code", [key for key, _ in _leaves(found.assumed)]),
    ):
        mine = [key for key in dict.fromkeys(keys) if key in options or key not in taken]
        taken |= {*mine}
        if title.startswith("preset") and mine:
            # A whole recipe: the sections are enough.
            origins[title] = tuple(dict.fromkeys(key.partition(".")[0] for key in mine))
        elif mine:
            origins[title] = tuple(f"{key}={_text(final.get(key))}" for key in mine)
    own = [f"{key}={_text(value)}" for key, value in settings.own.items()]
    if own:
        origins["options"] = (*origins.get("options", ()), *own)
    return origins


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))
    if isinstance(value, Mapping):
        return "/".join(_text(item) for item in value.values())
    return f"{value:g}" if isinstance(value, float) else str(value)

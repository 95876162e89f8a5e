"""From a folder, a run, a hub id or a recipe to a pipeline of its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera import distributed
from tessera.data.codec import VaeCodec
from tessera.errors import CheckpointError, TesseraError
from tessera.files import is_hub_id
from tessera.model import Model
from tessera.pipelines import folder as folders
from tessera.pipelines.base import Pipeline
from tessera.pipelines.counting import Cost
from tessera.pipelines.diffusion import DiffusionPipeline
from tessera.pipelines.experts import ExpertsPipeline
from tessera.pipelines.mar import MarPipeline
from tessera.pipelines.relay import RelayPipeline
from tessera.recipes.build import build_codec, build_model
from tessera.recipes.loading import parse_recipe
from tessera.recipes.parts import NO_PARTS, Parts
from tessera.recipes.schema import Recipe

KINDS: dict[str, type[Pipeline]] = {
    kind.kind: kind for kind in (DiffusionPipeline, ExpertsPipeline, RelayPipeline, MarPipeline)
}
"""Every kind of pipeline, by the name that stands in its folder."""


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    ema: str | int | None = None,
    device: torch.device | str | None = None,
    vae: str | Path | None = None,
    parts: Parts = NO_PARTS,
) -> Pipeline:
    """Open a pipeline folder, the folder of a run, or `user/name` on the Hugging Face hub.

    Args:
        source: a hub id may name its revision itself: `user/name@revision`.
        revision: branch, tag or commit of the hub id, its main branch by default.
        ema: name of another average than the default, see `Pipeline.emas`.
        device: where the model goes; by default the fastest of this machine, as on the command
            line: a GPU, Apple's, or the CPU.
        vae: folder or hub id of the VAE of a model of latents, in place of the recipe's.
        parts: functions that make the recipe's external parts.

    Raises:
        CheckpointError: there is none, it is damaged or of a kind not known here, or a revision of
            what is no hub id.
        RecipeError: the recipe has external parts that were not handed over.
        TesseraError: a VAE for a model of pixels, or a device that this machine has not.

    Example:
        >>> from tessera import load_recipe
        >>> build_pipeline(load_recipe("quickstart-digits")).save("digits")
        >>> load("digits", device="cpu").model.num_classes
        10
    """
    where = distributed.device(None if device is None else str(device))
    if revision is not None:
        source = _at(source, revision)
    pipe = _open(folders.find_folder(source), None if ema is None else str(ema), parts)
    if vae is not None:
        _use_vae(pipe, source, vae)
    return pipe.to(where)


def _at(source: str | Path, revision: str) -> str:
    """A hub id with its revision."""
    name = f"{source}@{revision}"
    if "@" in str(source) or not is_hub_id(source) or not is_hub_id(name):
        raise CheckpointError(
            f"`revision={revision}` is a branch, tag or commit of an id like user/name on the "
            f"Hugging Face hub, and {source} is none, or has one already"
        )
    return name


def _open(folder: Path, ema: str | None, own_parts: Parts) -> Pipeline:
    config = folders.read_config(folder)
    if config.kind not in KINDS:
        raise CheckpointError(
            f"{folder} is a pipeline of kind {config.kind!r}, which this tessera does not know "
            f"({', '.join(KINDS)}). Install a newer tessera"
        )
    for name in config.parts:
        if not (folder / name).is_dir():
            raise CheckpointError(
                f"{folder / name} is missing. Save or download the pipeline again, with all its "
                "folders"
            )
    pipes = {
        name: _open(folder / name, ema, own_parts)
        for name, kind in config.parts.items()
        if kind == "pipeline"
    }
    recipe = parse_recipe(config.recipe, str(folder / "config.json"))
    # The caller's random numbers are not used up by weights that are overwritten.
    with torch.random.fork_rng(devices=[]):
        pipe = KINDS[config.kind].open(
            folders.Opened(folder, config, recipe, pipes, ema, own_parts)
        )
    codec = next((name for name, kind in config.parts.items() if kind == "codec"), None)
    pipe.keep_codec(None if codec is None else build_codec(recipe.codec, str(folder / codec)))
    return pipe


def _use_vae(pipe: Pipeline, source: str | Path, vae: str | Path) -> None:
    if not isinstance(pipe.codec, VaeCodec):
        raise TesseraError(f"{source} is a model of pixels and needs no VAE ({vae}). Leave it out")
    pipe.codec = build_codec(pipe.recipe.codec, str(vae))


def build_pipeline(
    recipe: Recipe,
    model: Model | None = None,
    *,
    images_seen: int = 0,
    class_names: Sequence[str] | None = None,
    other_emas: Sequence[Mapping[str, Tensor]] = (),
    parts: Parts = NO_PARTS,
) -> Pipeline:
    """A pipeline around a model in memory.

    Args:
        model: with the weights of the recipe's first average; None for fresh weights.
        other_emas: network state dicts of the recipe's further averages, in its order; they are
            saved along.
        parts: functions that make the recipe's external parts.
    """
    names = recipe.ema_names[: 1 + len(other_emas)]
    if len(names) != 1 + len(other_emas):
        raise ValueError(f"{1 + len(other_emas)} averages, but the recipe has {len(names)}")
    if model is None:
        model = build_model(recipe, parts)
    kinds = (kind for kind in KINDS.values() if kind.of_model is not None)
    kind = next(kind for kind in kinds if isinstance(model, kind.of_model))  # type: ignore[arg-type]
    return kind(
        recipe,
        model,
        images_seen=images_seen,
        class_names=class_names,
        other_emas=dict(zip(names[1:], other_emas, strict=True)),
        parts=parts,
    )


def estimate(recipe: Recipe, parts: Parts = NO_PARTS, **options: Any) -> Cost:
    """Count what `recipe` costs; takes seconds and next to no memory for models of any size.

    Args:
        options: of sampling, see `Pipeline.cost`.

    Raises:
        TesseraError: options that such a model cannot have.
    """
    with torch.device("meta"):
        model = build_model(recipe, parts)
    return build_pipeline(recipe, model, parts=parts).cost(**options)

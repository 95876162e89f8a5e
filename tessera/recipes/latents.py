"""What a recipe takes from its set of latents: which VAE made them, and how they are scaled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tessera.data.latents import LatentDataset, channel_statistics, is_latents, open_latents
from tessera.errors import RecipeError
from tessera.progress import note
from tessera.recipes.build import build_codec
from tessera.recipes.schema import Recipe
from tessera.recipes.schema.data import VaeCodecConfig

_MEASURED = 0.1
"""Images that come and go change what is measured, and a run that is resumed keeps its numbers."""


def with_latents_told(recipe: Recipe, before: Recipe | None = None) -> Recipe:
    """The recipe with what its set of latents says: its VAE's weights, and scale or shift "data".

    So a pipeline samples without the set. The shift is the mean of the latents over all channels,
    and the scale makes their standard deviation, over all channels, 1: as 0.18215 does for Stable
    Diffusion's.

    Args:
        before: the recipe of a run that goes on; what it has been told stays.

    Raises:
        RecipeError: there is no set to take scale or shift from, or it is of samples.
    """
    codec = recipe.codec
    if not isinstance(codec, VaeCodecConfig):
        return recipe
    old = before.codec if before is not None else None
    told: dict[str, Any] = {}
    if isinstance(old, VaeCodecConfig):
        told = {key: getattr(old, key) for key in ("scale", "shift") if getattr(codec, key) == DATA}
        if codec.weights is None:
            told["weights"] = old.weights
        codec = codec.model_copy(update=told)
    wanted = [key for key in ("scale", "shift") if getattr(codec, key) == DATA]
    path = recipe.data.path
    if codec.takes_images or path is None or not is_latents(path):
        if wanted:
            raise RecipeError(
                f"codec.{wanted[0]}=data is measured on a set of latents, which data.path does not "
                "name: make one with `tessera data latents`, or give the number"
            )
    else:
        dataset = open_latents(path)
        if dataset.info.weights is None:
            note(
                f"note: {path} does not say by which weights of a VAE it was made, so it is not "
                f"compared with {codec.model}"
            )
        codec = codec.model_copy(update=_told(codec, wanted, dataset))
        dataset.close()
    return recipe.model_copy(update={"codec": codec})


DATA = "data"


def _told(codec: VaeCodecConfig, wanted: list[str], dataset: LatentDataset) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if codec.weights is None and dataset.info.weights is not None:
        told["weights"] = dataset.info.weights
    if wanted:
        if dataset.drawn:
            raise RecipeError(
                f"{dataset.name} holds samples that are scaled already: codec.{wanted[0]}=data "
                "cannot tell by how much; give the number"
            )
        measured = dict(zip(("scale", "shift"), measured_scaling(dataset), strict=True))
        told |= {key: measured[key] for key in wanted}
    return told


def measured_scaling(dataset: LatentDataset) -> tuple[float, float]:
    """Scale and shift that give the latents of a set, over all channels, mean 0 and deviation 1.

    Read from the set where it has its statistics; otherwise all of it is read.
    """
    info = dataset.info
    if info.mean is not None and info.std is not None:
        means, stds = list(info.mean), list(info.std)
    else:
        scaled, spread = channel_statistics(dataset)
        scale, shift = info.scale or 1.0, info.shift or 0.0
        means = [float(value) / scale + shift for value in scaled]
        stds = [float(value) / scale for value in spread]
    mean = math.fsum(means) / len(means)
    square = math.fsum(s**2 + m**2 for m, s in zip(means, stds, strict=True)) / len(means)
    deviation = math.sqrt(max(square - mean**2, 0))
    if not deviation:
        raise RecipeError(f"{dataset.name}: all of its latents are the same, so there is no scale")
    return float(f"{1 / deviation:.6g}"), float(f"{mean:.6g}")


def fits_measured(codec: VaeCodecConfig, dataset: LatentDataset) -> bool:
    """Whether the scaling of a recipe is, or once was, what is measured on a set.

    The set must have its statistics.
    """
    info = dataset.info
    if info.mean is None or info.std is None or codec.scale == DATA or codec.shift == DATA:
        return False
    scale, shift = measured_scaling(dataset)
    near = abs(float(codec.scale) / scale - 1) < _MEASURED
    told = info.shift is not None and math.isclose(float(codec.shift), info.shift, abs_tol=1e-9)
    return near and (told or abs(float(codec.shift) - shift) * scale < _MEASURED)


def check_vae(recipe: Recipe) -> None:
    """Compare the VAE of a recipe with the one that made its latents, if it lies in a folder here.

    Others are compared whenever they are loaded. A missing one is not needed for training.

    Raises:
        CheckpointError: it has other weights.
    """
    codec = recipe.codec
    if isinstance(codec, VaeCodecConfig) and codec.weights is not None:
        folder = Path(codec.model)
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            build_codec(codec).prepare()

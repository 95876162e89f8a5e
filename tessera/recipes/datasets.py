"""The data set of a recipe: opened, and compared with what the recipe says of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.data.dataset import Dataset, PartDataset, ShrunkDataset, open_dataset
from tessera.data.latents import LatentDataset, is_latents, open_latents
from tessera.errors import DataError, RecipeError
from tessera.randomness import derive_seed, numpy_generator
from tessera.recipes.external import trained_dataset
from tessera.recipes.parts import NO_PARTS, Parts
from tessera.recipes.schema import Recipe, VaeCodecConfig


def open_training_set(recipe: Recipe, parts: Parts = NO_PARTS) -> Dataset:
    """The data set that a recipe trains on, checked against the recipe.

    Args:
        parts: of which `dataset`, if it is there, makes the set in place of `data.path`.

    Raises:
        RecipeError: nothing to train on, or it does not fit; every difference is named.
        DataError: the set is damaged.
    """
    dataset = _open_whole(recipe, parts)
    held_out = _held_out(recipe, dataset)
    if held_out is None:
        return dataset
    return PartDataset(dataset, np.flatnonzero(~np.tile(held_out, 1 + recipe.data.xflip)))


def open_validation_set(recipe: Recipe, parts: Parts = NO_PARTS) -> Dataset | None:
    """Images that a recipe does not train on, on which the loss is measured, checked likewise.

    Raises:
        RecipeError, DataError: as of `open_training_set`.
    """
    data = recipe.data
    if data.validation is not None:
        dataset = shrunk(_open(_changed(recipe, max_images=None), 0, "validation"), recipe)
        _check(recipe, dataset, data.validation, "give another data.validation", subset=True)
        return dataset
    if data.held_out is None:
        return None
    dataset = _open_whole(_changed(recipe), parts)
    held_out = _held_out(_changed(recipe), dataset)
    assert held_out is not None
    return PartDataset(dataset, np.flatnonzero(held_out))


def epoch_images(recipe: Recipe, parts: Parts = NO_PARTS) -> int:
    """Images of an epoch: those trained on, of which mirrored copies do not count.

    Raises:
        RecipeError, DataError: as of `open_training_set`.
    """
    if recipe.data.path is None and parts.dataset is None:
        raise RecipeError(
            "an epoch is as long as the data set, and data.path is not set: set it, or give "
            "numbers of images in the place of epochs"
        )
    dataset = open_training_set(_changed(recipe), parts)
    if parts.dataset is None:  # the caller's own may be handed over once more
        dataset.close()
    return len(dataset)


def _changed(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe for sets that are read as they are: not mirrored, not kept in memory."""
    data = recipe.data.model_copy(update={"xflip": False, "cache": False, **changes})
    return recipe.model_copy(update={"data": data})


def _held_out(recipe: Recipe, dataset: Dataset) -> NDArray[np.bool_] | None:
    """Which images of a whole set, mirrored copies aside, are not trained on; None: there are none.

    Raises:
        RecipeError: nothing is left to train on.
    """
    share = recipe.data.held_out
    if share is None:
        return None
    total = len(dataset) // (2 if recipe.data.xflip else 1)
    count = max(1, round(share * total))
    if count >= total:
        raise RecipeError(
            f"data.held_out={share:g} takes all of the {total} images; nothing is left to train on"
        )
    chosen = np.zeros(total, np.bool_)
    generator = numpy_generator(recipe.training.seed, "held_out")
    chosen[generator.permutation(total)[:count]] = True
    return chosen


def _open_whole(recipe: Recipe, parts: Parts) -> Dataset:
    """The images of a recipe, those held out included."""
    seed = derive_seed(recipe.training.seed, "subset")
    if parts.dataset is None:
        dataset = shrunk(_open(recipe, seed), recipe)
        _check(
            recipe, dataset, str(recipe.data.path), "convert the images with: tessera data convert"
        )
    else:
        dataset = shrunk(trained_dataset(recipe, parts, seed), recipe)
        _check(recipe, dataset, f"the own data set {dataset.name}", "the data set")
    return dataset


def shrunk(dataset: Dataset, recipe: Recipe) -> Dataset:
    """The images of `data.path`, as small as the recipe trains on them.

    Raises:
        RecipeError: they cannot be shrunk so.
    """
    factor = recipe.data.shrink
    if factor == 1:
        return dataset
    try:
        if isinstance(dataset, LatentDataset):
            return dataset.shrunk(factor)
        if not recipe.codec.of_pixels:
            raise DataError(f"{dataset.name} is an own set of latents; let it shrink them itself")
        return ShrunkDataset(dataset, factor)
    except DataError as error:
        raise RecipeError(f"data.shrink={factor}: {error}") from None


def _open(recipe: Recipe, seed: int, key: str = "path") -> Dataset:
    """The set at data.`key`."""
    path: str | None = getattr(recipe.data, key)
    if path is None:
        raise RecipeError(
            "data.path is not set: give the images to train on, for example data.path=photos.zip, "
            "or a `dataset` of your own (--with MODULE on the command line, parts=Parts(dataset="
            "...) in Python)"
        )
    max_images, xflip = recipe.data.max_images, recipe.data.xflip
    if not Path(path).exists():
        raise RecipeError(
            f"data.{key}: there is nothing at {path} (seen from {Path.cwd()}). Say where the "
            f"images are with data.{key}=...; a run that is resumed takes it too"
        )
    if not isinstance(recipe.codec, VaeCodecConfig):
        if is_latents(path):
            raise RecipeError(
                f"{path} holds latents, but the recipe trains on pixels. Use a recipe with "
                f"codec.kind=vae, or give data.{key} the images"
            )
        return open_dataset(
            path, max_images=max_images, seed=seed, xflip=xflip, cache=recipe.data.cache
        )
    if not is_latents(path):
        raise RecipeError(
            f"{path} holds no latents, but the recipe trains on those (codec.kind=vae). Encode the "
            f"images once: tessera data latents {path} LATENTS.safetensors --vae "
            f"{recipe.codec.model}"
        )
    return open_latents(path, max_images=max_images, seed=seed, xflip=xflip)


def _check(
    recipe: Recipe, dataset: Dataset, source: str, remedy: str, subset: bool = False
) -> None:
    """Compare the data with the recipe; every difference is named.

    Args:
        subset: images of some of the classes only are welcome, too.
    """
    data, problems = recipe.data, list[str]()
    shape = dataset.shape
    if not recipe.codec.of_pixels:
        # Of the images that the latents were made of.
        shape = data.channels, data.resolution, data.resolution
    if isinstance(dataset, LatentDataset):
        problems += _latent_problems(recipe, dataset)
        remedy = "make the latents anew with: tessera data latents"
    channels, height, width = shape
    if height != width:
        problems.append(f"its images are {width}x{height} pixels; they must be square")
    elif height != data.resolution:
        problems.append(
            f"its images are {width}x{height} pixels{_smaller(data.shrink)}, but data.resolution "
            f"is {data.resolution}"
        )
    if channels != data.channels:
        problems.append(
            f"its images have {channels} channel{'s' if channels > 1 else ''}, "
            f"but data.channels is {data.channels}"
        )
    few = subset and 0 < dataset.num_classes < data.num_classes
    if data.num_classes and dataset.num_classes != data.num_classes and not few:
        found = f"{dataset.num_classes} classes" if dataset.num_classes else "no labels"
        problems.append(
            f"it has {found}, but data.num_classes is {data.num_classes} (0 trains without labels)"
        )
    if problems:
        raise RecipeError(
            f"{source} does not fit the recipe:\n  "
            + "\n  ".join(problems)
            + f"\nChange those keys, or {remedy}"
        )


def _smaller(factor: int) -> str:
    return "" if factor == 1 else f" once they are shrunk {factor} times (data.shrink)"


def _latent_problems(recipe: Recipe, dataset: LatentDataset) -> list[str]:
    """What a set of latents was made with, other than the recipe says."""
    assert isinstance(recipe.codec, VaeCodecConfig)
    info, codec = dataset.info, recipe.codec
    channels, height, width = dataset.shape
    side = recipe.data.resolution // codec.downsample
    problems = []
    if (height, width) != (side, side) and info.resolution in (None, recipe.data.resolution):
        problems.append(
            f"its latents are {width}x{height}, but those of images of data.resolution="
            f"{recipe.data.resolution} are {side}x{side} at codec.downsample={codec.downsample}"
        )
    pairs = (
        ("data.resolution", info.resolution, recipe.data.resolution),
        ("codec.channels", channels, codec.channels),
        ("codec.downsample", info.downsample, codec.downsample),
        ("codec.scale", info.scale, codec.scale),
        ("codec.shift", info.shift, codec.shift),
    )
    # What a set does not say is taken from the recipe.
    return problems + [
        f"it was made with {key}={found:g} (VAE {info.vae or 'unknown'}), but the recipe has "
        f"{wanted:g}"
        for key, found, wanted in pairs
        if found is not None and not math.isclose(found, wanted, rel_tol=1e-6)
    ]

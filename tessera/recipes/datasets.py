"""The data set of a recipe: opened, and compared with what the recipe says of it."""

from __future__ import annotations

import math
from pathlib import Path

from tessera.data.dataset import Dataset, ShrunkDataset, open_dataset
from tessera.data.latents import LatentDataset, is_latents, open_latents
from tessera.errors import DataError, RecipeError
from tessera.randomness import derive_seed
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


def _open(recipe: Recipe, seed: int) -> Dataset:
    if recipe.data.path is None:
        raise RecipeError(
            "data.path is not set: give the images to train on, for example data.path=photos.zip, "
            "or a `dataset` of your own (--with MODULE on the command line, parts=Parts(dataset="
            "...) in Python)"
        )
    path, max_images, xflip = recipe.data.path, recipe.data.max_images, recipe.data.xflip
    if not Path(path).exists():
        raise RecipeError(
            f"data.path: there is nothing at {path} (seen from {Path.cwd()}). Say where the images "
            "are with data.path=...; a run that is resumed takes it too"
        )
    if not isinstance(recipe.codec, VaeCodecConfig):
        if is_latents(path):
            raise RecipeError(
                f"{path} holds latents, but the recipe trains on pixels. Use a recipe with "
                "codec.kind=vae, or give data.path the images"
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


def _check(recipe: Recipe, dataset: Dataset, source: str, remedy: str) -> None:
    """Compare the data with the recipe; every difference is named."""
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
    if data.num_classes and dataset.num_classes != data.num_classes:
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
    pairs = (
        ("data.resolution", info.resolution, recipe.data.resolution),
        ("codec.channels", dataset.shape[0], codec.channels),
        ("codec.downsample", info.downsample, codec.downsample),
        ("codec.scale", info.scale, codec.scale),
        ("codec.shift", info.shift, codec.shift),
    )
    return [
        f"it was made with {key}={found:g} (VAE {info.vae}), but the recipe has {wanted:g}"
        for key, found, wanted in pairs
        if not math.isclose(found, wanted, rel_tol=1e-6)
    ]

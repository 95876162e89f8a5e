"""Views that the training images decide."""

from __future__ import annotations

from dataclasses import replace

from tessera.errors import RecipeError
from tessera.planning.proposal import band_sections, bands_for
from tessera.planning.sample import Reading
from tessera.recipes.latents import DATA
from tessera.recipes.loading import dump_recipe, parse_recipe
from tessera.recipes.schema import AutoViewConfig, Recipe, VaeCodecConfig


def with_bands_told(recipe: Recipe) -> Recipe:
    """The recipe with the bands that its images ask for, if its view leaves them open.

    Raises:
        RecipeError: there are no images at data.path, or the bands do not fit the recipe.
        DataError: the images cannot be read.
    """
    view = recipe.view
    if not isinstance(view, AutoViewConfig):
        return recipe
    if recipe.data.path is None:
        raise RecipeError(
            "view.kind=auto asks the training images, and data.path names none. Set it, or the "
            "bands themselves: view.kind=bands"
        )
    codec = recipe.codec
    if codec.takes_images and not codec.of_pixels:
        raise RecipeError(
            "view.kind=auto looks at what is trained on, and codec.encode=online makes the latents "
            "later. Set codec.encode=cached, or the bands themselves: view.kind=bands"
        )
    reading = Reading(shrink=recipe.data.shrink)
    if isinstance(codec, VaeCodecConfig) and DATA not in (codec.scale, codec.shift):
        reading = replace(reading, scale=float(codec.scale), shift=float(codec.shift))
    side, network = recipe.shape[1], recipe.network
    largest = max(f for f in (1, 2, 4, 8) if not side % f and network.fits(side // f))
    bands = bands_for(recipe.data.path, reading, bound=view.bound, crops=False, largest=largest)
    plain = dump_recipe(recipe)
    plain["view"] = {"kind": "bands", "bands": band_sections(bands)}
    return parse_recipe(plain)

"""Export to the names of DiT (Peebles & Xie 2023)."""

from __future__ import annotations

from tessera.convert import dit
from tessera.convert.target import (
    ReleasedFile,
    Target,
    discrete,
    picture_options,
    process_note,
    process_options,
    refuse,
)
from tessera.pipelines.base import Pipeline
from tessera.recipes.schema import DiTConfig


def _export(pipe: Pipeline) -> ReleasedFile:
    recipe, network = pipe.recipe, pipe.recipe.network
    if not isinstance(network, DiTConfig):
        refuse(recipe, "dit", f"its network is {network.kind}, not dit")
    process = discrete(recipe, "dit")
    if process.prediction == "v":
        refuse(recipe, "dit", "it predicts v, and DiT's code knows the noise and the image only")
    state = pipe.model.network.state_dict()
    return ReleasedFile(
        {dit.NAMES.to_theirs(name): tensor for name, tensor in state.items()},
        (
            f"network.heads={network.dimensions.heads}",
            *picture_options(recipe),
            *process_options(process),
        ),
        (process_note(process),),
    )


TARGET = Target("dit", _export)

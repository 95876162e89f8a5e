"""Export to the names of MAR (Li et al. 2024)."""

from __future__ import annotations

from tessera.convert import mar
from tessera.convert.target import ReleasedFile, Target, discrete, picture_options, refuse
from tessera.pipelines.base import Pipeline
from tessera.recipes.schema import MarConfig


def _export(pipe: Pipeline) -> ReleasedFile:
    recipe, network = pipe.recipe, pipe.recipe.network
    if not isinstance(network, MarConfig):
        refuse(recipe, "mar", f"its network is {network.kind}, not mar")
    process = discrete(recipe, "mar")
    if (process.schedule, process.prediction, process.timesteps) != ("cosine", "eps", 1000):
        refuse(recipe, "mar", "its head is trained otherwise than on MAR's 1000 steps of a cosine")
    heads = network.dimensions.heads
    state = pipe.model.network.state_dict()
    return ReleasedFile(
        {mar.NAMES.to_theirs(name): tensor for name, tensor in state.items()},
        (
            f"network.heads={heads}",
            f"network.decoder_heads={network.decoder_heads or heads}",
            f"network.patch={network.patch}",
            *picture_options(recipe),
        ),
    )


TARGET = Target("mar", _export)

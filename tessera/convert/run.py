"""Released checkpoints to pipeline folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tessera.convert import edm
from tessera.convert.checkpoint import Checkpoint, Converter, read_checkpoint
from tessera.convert.unpickle import module_state
from tessera.errors import CheckpointError, DataError
from tessera.files import user_path
from tessera.pipelines.folder import mismatches, not_finite, write_folder
from tessera.recipes.build import build_network
from tessera.recipes.loading import dump_recipe
from tessera.recipes.schema import Recipe

# A converter for another family is one file with a `CONVERTER`, and its entry here.
CONVERTERS = (edm.CONVERTER,)


@dataclass(frozen=True)
class Converted:
    """What a conversion has made.

    Attributes:
        folder: the pipeline folder.
        family: whose checkpoint it was.
        recipe: of the model.
        weights: names of the weights in the folder, the default first.
        parameters: trainable numbers of the network.
        images_seen: images trained on; 0 if the file does not say.
    """

    folder: Path
    family: str
    recipe: Recipe
    weights: tuple[str, ...]
    parameters: int
    images_seen: int


def convert_checkpoint(source: Path, dest: Path, *, snapshot: Path | None = None) -> Converted:
    """Write the model in a released checkpoint as a pipeline folder. Nothing in it is run.

    Args:
        source: a network snapshot (`.pkl`), which gives weights called "ema", or a training state
            (`.pt`), which gives the trained weights themselves, called "raw".
        dest: the folder to write, which must not exist.
        snapshot: with a training state, the network snapshot of the same moment: its averaged
            weights become the default, beside "raw".

    Raises:
        CheckpointError: `dest` exists, or a file cannot be read or is of another kind.
        RecipeError: the network is one that the library has not.
    """
    source, dest = user_path(source), user_path(dest)
    snapshot = None if snapshot is None else user_path(snapshot)
    if dest.exists():
        raise CheckpointError(f"{dest} exists already. Name another folder, or remove it first")
    classes = {pair for converter in CONVERTERS for pair in converter.classes}
    checkpoints = [
        read_checkpoint(path, classes) for path in (snapshot, source) if path is not None
    ]
    _check_pair(checkpoints)
    first = checkpoints[0]
    converter = _converter(first)
    recipe, images_seen = _recipe(first, converter)
    # Not on the meta device, which imports the compiler: slower than drawing the weights.
    with torch.random.fork_rng(devices=[]):
        network = build_network(recipe)
    states: dict[str, Mapping[str, Tensor]] = {
        c.weights: _state(c, converter, recipe, network) for c in checkpoints
    }
    write_folder(
        dest, "diffusion", dump_recipe(recipe), states, images_seen=images_seen, class_names=None
    )
    parameters = sum(p.numel() for p in network.parameters())
    return Converted(dest, converter.family, recipe, tuple(states), parameters, images_seen)


def _check_pair(checkpoints: list[Checkpoint]) -> None:
    """Raise unless this is one file, or a snapshot and the training state that belongs to it."""
    if len(checkpoints) == 1:
        return
    snapshot, state = checkpoints
    if (snapshot.weights, state.weights) != ("ema", "raw"):
        raise CheckpointError(
            "two files make one pipeline only if the first is a training state (.pt) and "
            f"--snapshot its network snapshot (.pkl); these are {state.path} and {snapshot.path}"
        )
    if snapshot.images_seen != state.images_seen:
        raise CheckpointError(
            f"{state.path} and {snapshot.path} are not of the same moment of a training: their "
            f"names say {state.images_seen} and {snapshot.images_seen} images"
        )


def _converter(checkpoint: Checkpoint) -> Converter:
    name = checkpoint.network.class_name
    for converter in CONVERTERS:
        if name in converter.networks:
            return converter
    known = "; ".join(f"{c.family}: {', '.join(c.networks)}" for c in CONVERTERS)
    raise checkpoint.error(f"its network is a {name}, which is not known here. Known are {known}")


def _recipe(checkpoint: Checkpoint, converter: Converter) -> tuple[Recipe, int]:
    try:
        return converter.recipe(checkpoint)
    except (TypeError, ValueError, AttributeError) as error:  # numbers where there should be none
        reason = " ".join(str(error).split())
        raise checkpoint.error(f"its configuration makes no sense ({reason})") from error


def _state(
    checkpoint: Checkpoint, converter: Converter, recipe: Recipe, network: nn.Module
) -> Mapping[str, Tensor]:
    """The checkpoint's weights as the state dict of `network`."""
    try:
        state = converter.state(checkpoint, recipe, module_state(checkpoint.network))
    except DataError as error:
        raise checkpoint.error(f"{error}. Download or copy it again") from error
    problems = mismatches(state, network.state_dict())
    other = [name for name, tensor in state.items() if tensor.dtype != torch.float32]
    if other:
        problems.append(f"{len(other)} tensors are not float32 ({', '.join(other[:3])})")
    if problems:
        raise checkpoint.error(
            "its tensors are not those of the network that it describes: " + "; ".join(problems)
        )
    broken = not_finite(state)
    if broken:
        raise checkpoint.error(f"{broken}; its training had failed before it was saved")
    return state

"""Released checkpoints to pipeline folders: everything is known before anything is written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tessera.convert.checkpoint import CheckpointFile, Description, Family, Ignored, Settings
from tessera.convert.families import find_family, open_checkpoint
from tessera.convert.records import brief, check_stored, read_tensors
from tessera.convert.settle import Settled, settle
from tessera.errors import CheckpointError, DataError
from tessera.model import Model
from tessera.pipelines.base import Pipeline
from tessera.pipelines.folder import mismatches, not_finite, write_folder
from tessera.pipelines.loading import build_pipeline
from tessera.recipes.build import build_network, model_around
from tessera.recipes.loading import dump_recipe
from tessera.recipes.schema import Recipe
from tessera.recipes.size import hollow
from tessera.torch_files import StoredTensor


class TensorFacts(NamedTuple):
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Part:
    """A model that was found in a file, or in two: its average and its trained weights.

    Attributes:
        source: the file.
        family: what it is of.
        settled: the recipe, and where it came from.
        pipe: the pipeline of our model, without numbers.
        states: its state dict for each named state, the default first.
        ignored: tensors of the file that have no place in it, and why.
        images_seen: images trained on; 0 if the file does not say.
        notes: what else the caller should know.
    """

    source: CheckpointFile
    family: Family
    settled: Settled
    pipe: Pipeline
    states: Mapping[str, Mapping[str, Tensor]]
    ignored: Mapping[str, str]
    images_seen: int
    notes: Sequence[str]

    @property
    def recipe(self) -> Recipe:
        """Of the model."""
        return self.settled.recipe

    @property
    def parameters(self) -> int:
        """Trainable numbers of the network."""
        return sum(parameter.numel() for parameter in self.pipe.model.network.parameters())

    def write(self, folder: Path) -> None:
        """Write it as a pipeline folder."""
        write_folder(
            folder,
            self.pipe.kind,
            dump_recipe(self.recipe),
            self.states,
            images_seen=self.images_seen,
            class_names=None,
        )


@dataclass(frozen=True)
class Read:
    """A file whose family has described it.

    Attributes:
        source, family, settings: the file, what it is of, and what the caller says of it.
        description: what the family found.
        options: what the caller said, as it was given.
    """

    source: CheckpointFile
    family: Family
    settings: Settings
    description: Description
    options: Sequence[str] = ()

    @property
    def tensors(self) -> Mapping[str, Sequence[TensorFacts]]:
        """The tensors of each state in the file, none of them read."""
        return {
            name: [_facts(key, tensor) for key, tensor in tensors.items()]
            for name, tensors in self.description.weights.items()
        }

    def settled(self) -> Settled:
        """The recipe of the model in the file.

        Raises:
            CheckpointError, RecipeError: see `settle`.
        """
        return settle(self.source, self.description, self.settings)


def read_source(path: Path, kind: str | None = None, options: Sequence[str] = ()) -> Read:
    """Open a file and find out what is in it; no tensor is read.

    Args:
        kind: of checkpoint; by default it is found out.
        options: `key=value`: of the family, of the recipe, and `preset=NAME`.

    Raises:
        CheckpointError: it cannot be read, or is of no kind known here.
    """
    source = open_checkpoint(path)
    family = find_family(source, kind)
    read = describe_source(source, family, settings_of(family, options))
    return replace(read, options=options)


def describe_source(source: CheckpointFile, family: Family, settings: Settings) -> Read:
    """What a family finds in a file of its own.

    Raises:
        CheckpointError: something that the library has not, or that makes no sense.
    """
    try:
        description = family.describe(source, settings)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        reason = brief(" ".join(str(error).split()) or type(error).__name__)
        raise source.error(f"its configuration makes no sense ({reason})") from error
    return Read(source, family, settings, description)


def settings_of(family: Family, options: Sequence[str], first: int | None = None) -> Settings:
    """The caller's options for a file: the family's own, a preset, and keys of the recipe.

    Args:
        first: side of the pictures that the stage before makes, of a relay in two files.

    Raises:
        CheckpointError: an option without a value.
    """
    preset: str | None = None
    own: dict[str, Any] = {}
    overrides: list[str] = []
    for option in options:
        key, separator, value = option.partition("=")
        key = key.removeprefix("--")
        if not separator or not key:
            raise CheckpointError(f"{option!r} is not of the form key=value")
        if key == "preset":
            preset = value
        elif key in family.options:
            own[key] = value
        else:
            overrides.append(f"{key}={value}")
    return Settings(preset, own, overrides, first)


def read_part(read: Read) -> Part:
    """The model in a file, with all its tensors in place.

    Raises:
        CheckpointError: they are damaged, or not those of the network that the file describes.
        RecipeError: the library has no such network.
    """
    settled = read.settled()
    for tensors in read.description.weights.values():
        with reading(read.source):
            check_stored(tensors)  # before a network of their sizes is made
    model = _model(read.source, settled.recipe)
    network = model.network
    states: dict[str, Mapping[str, Tensor]] = {}
    ignored: dict[str, str] = {}
    for name, tensors in read.description.weights.items():
        states[name], left = _state(read, settled.recipe, network, tensors)
        ignored |= left
    # Of a published file that is recognised, the training is known.
    images = read.description.images_seen
    if settled.published is not None and not images:
        images = settled.recipe.training.images
    return Part(
        read.source,
        read.family,
        settled,
        build_pipeline(settled.recipe, model, images_seen=images),
        states,
        ignored,
        images,
        read.description.notes,
    )


@contextlib.contextmanager
def reading(source: CheckpointFile) -> Iterator[None]:
    """A region in which damage is said to be that of a file.

    Raises:
        CheckpointError: its numbers are damaged.
    """
    try:
        yield
    except DataError as error:
        raise source.error(f"{error}. Download or copy it again") from error


def _model(source: CheckpointFile, recipe: Recipe) -> Model:
    try:
        network = hollow(partial(build_network, recipe))
    except (RuntimeError, OverflowError, MemoryError) as error:  # sizes that no tensor can have
        raise source.error("its network would be larger than tensors can be") from error
    return model_around(recipe, network)


def _state(
    read: Read, recipe: Recipe, network: nn.Module, tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict of `network`, and what of the file has no place in it."""
    source, expected = read.source, network.state_dict()
    with reading(source):
        found = read_tensors(tensors)
    state: dict[str, Tensor] = {}
    ignored: dict[str, str] = {}
    place = read.description.place(recipe)
    for name, tensor in found.items():
        put = _put(source, place, name, tensor)
        if isinstance(put, Ignored):
            ignored[name] = put.reason
        elif put[0] in state:
            raise source.error(f"{brief(name)} and another of its tensors are one of ours")
        else:
            # Copies in half precision are exact in ours.
            half = put[1].dtype in (torch.float16, torch.bfloat16)
            state[put[0]] = (put[1].to(torch.float32) if half else put[1]).contiguous()
    for name, constant in expected.items():
        if name not in state and read.description.constant(name) and not constant.is_meta:
            state[name] = constant
    problems = mismatches(state, expected)
    other = [name for name, tensor in state.items() if tensor.dtype != torch.float32]
    if other:
        problems.append(f"{len(other)} tensors are not float32 ({', '.join(other[:3])})")
    if problems:
        raise source.error(
            "its tensors are not those of the network that it describes: " + "; ".join(problems)
        )
    broken = not_finite(state)
    if broken:
        raise source.error(f"{broken}; its training had failed before it was saved")
    return state, ignored


def _put(
    source: CheckpointFile, place: Callable[[str, Tensor], Any], name: str, tensor: Tensor
) -> Any:
    try:
        return place(name, tensor)
    except RuntimeError as error:  # of reshaping
        raise source.error(
            f"its tensor {brief(name)} of shape {tuple(tensor.shape)} does not fit the network"
        ) from error


def merged(averaged: Part, trained: Part) -> Part:
    """A model whose average is in one file and whose trained weights are in another."""
    return replace(averaged, states={**averaged.states, **trained.states})


def _facts(name: str, tensor: StoredTensor) -> TensorFacts:
    return TensorFacts(name, tensor.shape, str(tensor.storage.dtype).removeprefix("torch."))

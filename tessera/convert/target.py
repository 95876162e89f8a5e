"""What a target of `tessera export` provides, and the file that most of them write."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

import safetensors.torch
from torch import Tensor

from tessera.errors import TesseraError
from tessera.files import atomic_file, check_free
from tessera.pipelines.base import Pipeline
from tessera.recipes.schema import DiscretePreconditioningConfig, Recipe


class Exported(Protocol):
    """A model in another form, ready to be written.

    Attributes:
        notes: what whoever uses it must know beside it, in sentences.
    """

    @property
    def notes(self) -> tuple[str, ...]: ...

    def write(self, dest: Path, *, overwrite: bool = False) -> None:
        """Write it, whole or not at all.

        Raises:
            TesseraError: something is in the way, or it cannot be written there.
        """
        ...


class Target(NamedTuple):
    """A form that models can be exported to.

    Attributes:
        name: the value of `--to`.
        export: a pipeline in that form. Raises TesseraError, which says why, where there is none.
    """

    name: str
    export: Callable[[Pipeline], Exported]


@dataclass(frozen=True)
class ReleasedFile:
    """Tensors under the names of released code.

    Attributes:
        tensors: by name.
        options: what `tessera convert` has to be told to make the same model of them.
        said: what the tensors do not say, in sentences.
    """

    tensors: Mapping[str, Tensor]
    options: tuple[str, ...]
    said: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Also how it becomes a pipeline again."""
        return (*self.said, f"back: tessera convert FILE FOLDER {shlex.join(self.options)}")

    def write(self, dest: Path, *, overwrite: bool = False) -> None:
        """Write a file of safetensors.

        Raises:
            TesseraError: something is in the way, or the name ends otherwise.
        """
        if dest.suffix != ".safetensors":
            raise TesseraError(f"{dest}: it is written as .safetensors; end the name so")
        check_free(dest, overwrite)
        whole = {name: t.detach().cpu().contiguous().clone() for name, t in self.tensors.items()}
        with atomic_file(dest) as file:
            file.write(safetensors.torch.save(whole, metadata={"format": "pt"}))


def refuse(recipe: Recipe, target: str, why: str) -> NoReturn:
    """Raise for a model without a counterpart.

    Raises:
        TesseraError: always.
    """
    raise TesseraError(f"{recipe.name} cannot be exported to {target}: {why}")


def discrete(recipe: Recipe, target: str) -> DiscretePreconditioningConfig:
    """The process of a model whose input and output are those of networks of discrete time alone.

    Raises:
        TesseraError: it is none.
    """
    section = recipe.preconditioning
    if not isinstance(section, DiscretePreconditioningConfig):
        refuse(
            recipe,
            target,
            f"its network is preconditioned as {section.kind}, and the code there knows steps of a "
            "discrete process only (preconditioning.kind=discrete)",
        )
    if recipe.augment_dim:
        refuse(recipe, target, "its network takes augmentation labels, which there are none of")
    if recipe.coord_frequencies is not None and not recipe.network.own_coordinates:
        refuse(recipe, target, "its network takes coordinates, which there are none of")
    return section


def process_options(section: DiscretePreconditioningConfig) -> tuple[str, ...]:
    """A process as options of `tessera convert`."""
    values = {
        "schedule": section.schedule,
        "prediction": section.prediction,
        **section.model_dump(exclude_defaults=True, exclude={"kind"}),
    }
    return tuple(f"preconditioning.{key}={value}" for key, value in values.items())


def process_note(section: DiscretePreconditioningConfig) -> str:
    """A process in words."""
    return (
        f"it was trained on {section.timesteps} steps, schedule {section.schedule}, to predict "
        f"{section.prediction}"
    )


def picture_options(recipe: Recipe) -> tuple[str, ...]:
    """The pictures of a model, and its codec, as options of `tessera convert`."""
    codec = recipe.codec.model_dump(mode="json")
    data = {"resolution": recipe.data.resolution, "channels": recipe.data.channels}
    return (
        *(f"data.{key}={value}" for key, value in data.items()),
        *(f"codec.{key}={'null' if value is None else value}" for key, value in codec.items()),
    )

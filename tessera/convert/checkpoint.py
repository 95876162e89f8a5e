"""What a converter for one family of checkpoints provides, and what it finds in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tessera.errors import CheckpointError
from tessera.recipes.schema import Recipe
from tessera.torch_files import StoredTensor

Data = dict[str, Any]
"""Sections of a recipe as plain data."""

AVERAGE, TRAINED = "ema", "raw"
"""What the averaged weights are called, and the trained weights themselves."""


@dataclass(frozen=True)
class CheckpointFile:
    """A file that was opened with nothing run.

    Attributes:
        path: the file.
        data: what it holds: plain values, records and stored tensors.
        container: how it is packed, in words.
    """

    path: Path
    data: Any
    container: str

    def error(self, text: str) -> CheckpointError:
        """An error about the file."""
        return CheckpointError(f"{self.path} cannot be converted: {text}")


@dataclass(frozen=True)
class Settings:
    """What the caller says of a file beside the file itself.

    Attributes:
        preset: a recipe, or a published model, that says what the file does not.
        own: options of the family, by name.
        overrides: options that are keys of the recipe, as `key.path=value`.
        first: side of the pictures that the stage before makes, of a relay in two files.
    """

    preset: str | None = None
    own: Mapping[str, Any] = field(default_factory=dict)
    overrides: Sequence[str] = ()
    first: int | None = None


class Ignored(NamedTuple):
    """Why a tensor of a file has no place in the network."""

    reason: str


Place = Callable[[str, Tensor], tuple[str, Tensor] | Ignored]
"""A tensor of the file, with its name, to its name and values in our network."""


class Renamed(NamedTuple):
    """Released names of tensors that begin otherwise than ours."""

    theirs: str
    ours: str

    def to_ours(self, name: str) -> str:
        """Our name of a released tensor."""
        return _begun(name, self.theirs, self.ours)

    def to_theirs(self, name: str) -> str:
        """The released name of one of our tensors."""
        return _begun(name, self.ours, self.theirs)


def _begun(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


class Need(NamedTuple):
    """Something that no file of a family says, and that cannot be guessed.

    Attributes:
        keys: of options, any of which says it.
        meaning: what to give.
    """

    keys: tuple[str, ...]
    meaning: str


@dataclass(frozen=True)
class Description:
    """What a family has found in a file, before the caller's options are looked at.

    Of a key in several of the sections, the first that has it counts: options, `said`, `inferred`,
    the preset, `assumed`.

    Attributes:
        weights: the tensors of each named state, the default first, by their names in the file.
        said: sections of the recipe that the file's own configuration gives.
        inferred: those that the shapes of its tensors give.
        assumed: those of the released code's defaults.
        needs: what must come from a preset or from options.
        published: the preset of a published file of this name; used if its network is the file's.
        free: keys in which the file may differ from its preset all the same.
        presets: sections of presets that are no recipes, by name.
        place: where each tensor belongs, in the network of the settled recipe.
        constant: whether a tensor of our network is a constant that files need not have.
        images_seen: images trained on; 0 if the file does not say.
        notes: what else the caller should know, in sentences.
    """

    weights: Mapping[str, Mapping[str, StoredTensor]]
    place: Callable[[Recipe], Place]
    said: Data = field(default_factory=dict)
    inferred: Data = field(default_factory=dict)
    assumed: Data = field(default_factory=dict)
    needs: Sequence[Need] = ()
    published: str | None = None
    free: frozenset[str] = frozenset()
    presets: Mapping[str, Data] = field(default_factory=dict)
    constant: Callable[[str], bool] = lambda name: False
    images_seen: int = 0
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one family become pipelines.

    Attributes:
        kind: the value of `--kind`.
        title: what messages call it.
        recognise: whether a file is of this family, by its content alone.
        describe: what is in such a file. Raises CheckpointError for what the library has not.
        options: its own options, name to meaning, beside keys of the recipe.
        classes: (module, name) of classes that its files refer to, beside those of PyTorch.
    """

    kind: str
    title: str
    recognise: Callable[[CheckpointFile], bool]
    describe: Callable[[CheckpointFile, Settings], Description]
    options: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[tuple[str, str], ...] = ()


def prefixed(prefix: str) -> Callable[[Recipe], Place]:
    """For families whose names are ours behind a prefix."""

    def place(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        return name.removeprefix(prefix), tensor

    return lambda recipe: place

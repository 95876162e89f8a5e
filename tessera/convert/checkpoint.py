"""What a released checkpoint consists of, and what a converter for one family of them provides."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from tessera.convert.unpickle import ClosedObject, read_container
from tessera.errors import CheckpointError
from tessera.recipes.schema import Recipe


def brief(value: Any) -> str:
    """A value of a file in a message: shortened, whatever is in it."""
    return value[:40] if isinstance(value, str) else reprlib.repr(value)[:80]


@dataclass(frozen=True)
class Checkpoint:
    """A network snapshot or a training state of the released training loop, closed.

    Attributes:
        path: the file.
        weights: "ema" for the average in a snapshot, "raw" for the trained weights themselves.
        network: the preconditioned network.
        loss, augment: what it was trained by; None where the file does not hold it.
        dataset: arguments of the data reader, empty where the file does not hold them.
    """

    path: Path
    weights: Literal["ema", "raw"]
    network: ClosedObject
    loss: ClosedObject | None = None
    augment: ClosedObject | None = None
    dataset: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images_seen(self) -> int:
        """Images trained on, by the thousands in the name of the file; 0 if it has none."""
        found = re.fullmatch(r"(?:network-snapshot|training-state)-(\d+)", self.path.stem)
        return 1000 * int(found[1]) if found else 0

    def error(self, text: str) -> CheckpointError:
        """An error about the file."""
        return CheckpointError(f"{self.path} cannot be converted: {text}")

    def arguments(
        self, record: ClosedObject, names: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """The arguments that an object was made with, by our names.

        Args:
            names: released name to ours, of all that are known; None for any, as they are called.

        Raises:
            CheckpointError: other arguments, or some without a name.
        """
        given = record.state.get("_init_kwargs")
        if not isinstance(given, dict) or record.state.get("_init_args"):
            raise self.error(f"it does not say by name how its {record.class_name} was made")
        unknown = [name for name in given if names is not None and name not in names]
        if unknown:
            raise self.error(
                f"its {record.class_name} was made with {', '.join(map(brief, unknown))}, which "
                "the released code has not"
            )
        return {name if names is None else names[name]: value for name, value in given.items()}


@dataclass(frozen=True)
class Converter:
    """How the checkpoints of one family of networks become pipelines.

    Attributes:
        family: what messages call it.
        networks: class names of the preconditioned networks that it knows.
        recipe: the recipe of a checkpoint, and the images that it was trained on. Raises
            CheckpointError or RecipeError for what the library has not.
        state: state dict of the preconditioned network to that of our network. Raises
            CheckpointError.
        classes: (module, name) of classes that its files refer to beside those of EDM's.
    """

    family: str
    networks: tuple[str, ...]
    recipe: Callable[[Checkpoint], tuple[Recipe, int]]
    state: Callable[[Checkpoint, Recipe, dict[str, Tensor]], dict[str, Tensor]]
    classes: tuple[tuple[str, str], ...] = ()


def read_checkpoint(path: Path, classes: Collection[tuple[str, str]] = ()) -> Checkpoint:
    """Open a network snapshot (`.pkl`) or a training state (`.pt`), with nothing run.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    data = read_container(path, classes)
    if isinstance(data, dict):
        if isinstance(data.get("ema"), ClosedObject):
            loss, augment = (_record(data.get(name)) for name in ("loss_fn", "augment_pipe"))
            dataset = data.get("dataset_kwargs")
            return Checkpoint(
                path,
                "ema",
                data["ema"],
                loss,
                augment,
                dataset if isinstance(dataset, dict) else {},
            )
        if isinstance(data.get("net"), ClosedObject):
            return Checkpoint(path, "raw", data["net"])
    raise CheckpointError(
        f"{path} holds no network: neither 'ema', as network-snapshot-*.pkl, nor 'net', as "
        "training-state-*.pt"
    )


def _record(value: Any) -> ClosedObject | None:
    return value if isinstance(value, ClosedObject) else None

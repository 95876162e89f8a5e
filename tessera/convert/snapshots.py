"""The containers of EDM's training loop (Karras et al. 2022) and of those that are built on it.

A network snapshot (`.pkl`) holds averaged weights and what the network was trained by, a training
state (`.pt`) the trained weights, and those of relay diffusion both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tessera.convert.checkpoint import AVERAGE, TRAINED, CheckpointFile
from tessera.convert.records import ClosedObject, brief, stored_tensors
from tessera.errors import DataError
from tessera.torch_files import StoredTensor


@dataclass(frozen=True)
class Snapshot:
    """A network snapshot or a training state, closed.

    Attributes:
        source: the file.
        networks: the preconditioned network of each state that is in the file: "ema", "raw".
        loss, augment: what it was trained by; None where the file does not hold it.
        dataset: arguments of the data reader, empty where the file does not hold them.
    """

    source: CheckpointFile
    networks: Mapping[str, ClosedObject]
    loss: ClosedObject | None = None
    augment: ClosedObject | None = None
    dataset: Mapping[str, Any] = field(default_factory=dict)

    @property
    def network(self) -> ClosedObject:
        """The preconditioned network."""
        return next(iter(self.networks.values()))

    @property
    def class_name(self) -> str:
        """Of the network."""
        return self.network.class_name

    @property
    def images_seen(self) -> int:
        """Images trained on, by the file or the thousands in its name; 0 if neither says."""
        data = self.source.data
        step = data.get("step") if isinstance(data, dict) else None
        if isinstance(step, int) and 0 <= step < 2**63:
            return step
        found = re.fullmatch(r"(?:network-snapshot|training-state)-(\d+)", self.source.path.stem)
        return 1000 * int(found[1]) if found else 0

    @property
    def given(self) -> dict[str, Any]:
        """The arguments that the network was made with, by their released names."""
        return self.arguments(self.network)

    def weights(self) -> dict[str, dict[str, StoredTensor]]:
        """The tensors of each state.

        Raises:
            CheckpointError: they are damaged.
        """
        try:
            return {name: stored_tensors(network) for name, network in self.networks.items()}
        except DataError as error:
            raise self.source.error(f"{error}. Download or copy it again") from error

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
            raise self.source.error(f"it does not say by name how its {record.class_name} was made")
        unknown = [name for name in given if names is not None and name not in names]
        if unknown:
            raise self.source.error(
                f"its {record.class_name} was made with {', '.join(map(brief, unknown))}, which "
                "the released code has not"
            )
        return {name if names is None else names[name]: value for name, value in given.items()}


def open_snapshot(source: CheckpointFile) -> Snapshot | None:
    """The snapshot or training state in a file; None if it holds none."""
    data = source.data
    if isinstance(data, ClosedObject):  # a module alone
        data = {"ema": data}
    if not isinstance(data, dict):
        return None
    networks = {
        name: data[key]
        for name, key in ((AVERAGE, "ema"), (TRAINED, "net"))
        if isinstance(data.get(key), ClosedObject)
    }
    if not networks:
        return None
    dataset = data.get("dataset_kwargs")
    return Snapshot(
        source,
        networks,
        _record(data.get("loss_fn")),
        _record(data.get("augment_pipe")),
        dataset if isinstance(dataset, dict) else {},
    )


def need_snapshot(source: CheckpointFile) -> Snapshot:
    """As `open_snapshot`.

    Raises:
        CheckpointError: it holds none.
    """
    found = open_snapshot(source)
    if found is None:
        raise source.error(
            "it holds no network: neither 'ema', as network-snapshot-*.pkl, nor 'net', as "
            "training-state-*.pt"
        )
    return found


def made_of(source: CheckpointFile, *class_names: str) -> bool:
    """Whether a file holds a preconditioned network of one of these classes."""
    found = open_snapshot(source)
    return found is not None and found.class_name in class_names


def _record(value: Any) -> ClosedObject | None:
    return value if isinstance(value, ClosedObject) else None

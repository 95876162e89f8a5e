"""Batches for the training loop, read ahead by a few threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.data.dataset import Dataset
from tessera.data.order import Order
from tessera.data.parallel import ordered_map
from tessera.errors import DataError

_BATCHES_AHEAD = 4


StepKind = tuple[int, int | None, int | None]
"""Images of a step, side of their patches, and band of the noise levels; see `StepPlan`."""


@dataclass(frozen=True)
class StepPlan:
    """What one optimiser step trains on.

    Attributes:
        first_image: number in the run of the step's first image.
        images: size of the global batch; the step has images [first_image, first_image + images).
        patch: side of the patch in pixels; None for the full image.
        band: number of the noise levels' band that it trains on; None for all of them.
    """

    first_image: int
    images: int
    patch: int | None = None
    band: int | None = None

    @property
    def kind(self) -> StepKind:
        """What steps of the same cost have in common."""
        return self.images, self.patch, self.band


@dataclass(frozen=True)
class Batch:
    """One process's rows of a step, on the training device.

    Attributes:
        images: uint8 [b, C, H, W]; of a set of latents, their moments [b, 2 C, H, W], or
            samples in model space [b, C, H, W].
        labels: int64 [b], or None.
        numbers: int64 [b], the images' numbers in the run.
        plan: the step.
    """

    images: Tensor
    labels: Tensor | None
    numbers: Tensor
    plan: StepPlan

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Apply `function` to every tensor that is present."""
        labels = None if self.labels is None else function(self.labels)
        return Batch(function(self.images), labels, function(self.numbers), self.plan)


class Loader(Iterator[Batch]):
    """Iterates over the batches of `plans`; a step's batch depends on its plan and nothing else.

    Args:
        dataset: the images or latents.
        order: which image of the set is which image of the run.
        plans: the steps, perhaps without end; taken a few steps before they are needed.
        rank: this process; it gets rows [rank * b / world, (rank + 1) * b / world).
        world: number of processes.
        device: where the tensors are wanted; copies to a GPU overlap with its work.
        workers: threads that read ahead; 0 reads when a batch is asked for.
        use_labels: False leaves the labels out.

    Raises:
        DataError: the batch cannot be shared equally, the set has label vectors, or an image cannot
            be read (raised when its batch is asked for; the message names the file).
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        plans: Iterable[StepPlan],
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        workers: int = 2,
        use_labels: bool = True,
    ) -> None:
        self._labels = dataset.labels if use_labels else None
        if self._labels is not None and self._labels.ndim != 1:
            raise DataError(
                f"{dataset.name}: its labels are vectors, but training takes class indices; "
                "train without labels or give the set class indices"
            )
        self._dataset = dataset
        self._order = order
        self._rank, self._world = rank, world
        self._device = torch.device(device)
        plans = iter(plans)
        first = list(itertools.islice(plans, 1))
        for plan in first:
            _check_share(plan, world)
        jobs = map(self._job, itertools.chain(first, plans))
        self._batches = ordered_map(self._read, jobs, workers, max(_BATCHES_AHEAD, workers))

    def __next__(self) -> Batch:
        batch = next(self._batches)
        if self._device.type == "cpu":
            return batch
        return batch.map(lambda tensor: tensor.to(self._device, non_blocking=True))

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead; waits for the reads that are under way."""
        self._batches.close()

    def _job(self, plan: StepPlan) -> tuple[StepPlan, NDArray[np.int64], NDArray[np.int64]]:
        # In the caller's thread: an order may have to walk through its sequence step by step.
        _check_share(plan, self._world)
        share = plan.images // self._world
        first = plan.first_image + self._rank * share
        numbers = np.arange(first, first + share, dtype=np.int64)
        return plan, numbers, self._order.indices(numbers)

    def _read(self, job: tuple[StepPlan, NDArray[np.int64], NDArray[np.int64]]) -> Batch:
        plan, numbers, indices = job
        labels = None if self._labels is None else torch.from_numpy(self._labels[indices])
        images = torch.from_numpy(self._dataset.read(indices))
        batch = Batch(images, labels, torch.from_numpy(numbers), plan)
        return batch.map(Tensor.pin_memory) if self._device.type == "cuda" else batch


def _check_share(plan: StepPlan, world: int) -> None:
    if plan.images % world:
        raise DataError(
            f"a batch of {plan.images} images cannot be shared equally by {world} processes; "
            f"make the batch a multiple of {world}"
        )

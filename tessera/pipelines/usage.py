"""How often networks are called while a plan runs, and how long a call of each kind takes."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_TIMED = 64
"""Calls of a kind that are timed: a long job must not keep a time for each of its calls."""

Kind = tuple[int, tuple[int, ...]]
"""Number of the network, and the size of its input but for the batch."""


class Usage:
    """Calls of networks.

    Args:
        networks: that may be called.
        on_gpu: time the calls where they run, without waiting for them.
    """

    def __init__(self, networks: Sequence[nn.Module], on_gpu: bool) -> None:
        self._networks, self._on_gpu = networks, on_gpu
        self._images: Counter[Kind] = Counter()
        self._timed: dict[Kind, list[tuple[int, Any, Any]]] = defaultdict(list)

    @property
    def evaluations(self) -> int:
        """Images that have passed through networks."""
        return self._images.total()

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Note every call during the block."""
        handles = []
        for number, network in enumerate(self._networks):
            handles += self._hook(number, network)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if self._on_gpu:
                torch.cuda.synchronize()

    def _hook(self, number: int, network: nn.Module) -> list[Any]:
        started: list[Any] = []

        def before(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            kind = self._kind(number, inputs[0])
            self._images[kind] += len(inputs[0])
            if len(self._timed[kind]) < _TIMED:
                started.append(self._now())

        def after(_module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
            if started:
                kind = self._kind(number, inputs[0])
                self._timed[kind].append((len(inputs[0]), started.pop(), self._now()))

        return [network.register_forward_pre_hook(before), network.register_forward_hook(after)]

    def _kind(self, number: int, x: Tensor) -> Kind:
        return number, tuple(x.shape[1:])

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds_saved(self, whole: Sequence[nn.Module]) -> float | None:
        """Share of the time that calls of parts of networks saved, by median times of this run.

        Args:
            whole: the networks that would have run instead, all of one cost.

        Returns:
            None where a size was seen by no whole network, so that there is nothing to compare.
        """
        uncut = {n for n, network in enumerate(self._networks) if any(network is w for w in whole)}
        full: dict[tuple[int, ...], list[float]] = defaultdict(list)
        for (number, size), calls in self._timed.items():
            if number in uncut:
                full[size] += map(self._per_image, calls)
        spent = wanted = 0.0
        for (number, size), images in self._images.items():
            if not full[size]:
                return None
            usual = statistics.median(full[size])
            wanted += images * usual
            own = [*map(self._per_image, self._timed[number, size])]
            spent += images * (usual if number in uncut else statistics.median(own))
        return 1 - spent / wanted if wanted else None

    def _per_image(self, call: tuple[int, Any, Any]) -> float:
        images, start, end = call
        seconds = start.elapsed_time(end) / 1000 if self._on_gpu else end - start
        return float(seconds / images)

"""Which image of the set is the run's image number k: pure functions of (seed, k)."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tessera.randomness import numpy_generator


class Order(Protocol):
    """Maps image numbers of a run (int64 [n], from 0) to indices into the set (int64 [n])."""

    def indices(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index in the set of each image number."""
        ...


class EpochOrder:
    """Every image once an epoch, freshly shuffled each time.

    Args:
        n: images in the set.
        seed: of the run.
    """

    def __init__(self, n: int, seed: int) -> None:
        self._n = n
        self._seed = seed
        self._epochs: OrderedDict[int, NDArray[np.int64]] = OrderedDict()
        self._lock = threading.Lock()

    def indices(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index in the set of each image number."""
        epochs, places = np.divmod(np.asarray(numbers, np.int64), self._n)
        result = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            result[here] = self._permutation(int(epoch))[places[here]]
        return result

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        with self._lock:
            if epoch not in self._epochs:
                generator = numpy_generator(self._seed, "order", epoch)
                self._epochs[epoch] = generator.permutation(self._n)
            self._epochs.move_to_end(epoch)
            while len(self._epochs) > 3:
                self._epochs.popitem(last=False)
            return self._epochs[epoch]


class WindowedOrder:
    """The sequence of EDM's released sampler: a walk through a list that is shuffled on the way.

    At step k the list's entry k mod n is given out, then swapped with a random one among the
    `window` entries before it. The sequence can only be made from its beginning, at one or two
    million images a second, so the first call of a resumed run takes that long.

    Args:
        n: images in the set.
        seed: of the run.
        shuffle: False walks through the set in its own order.
        window: width of the window as a fraction of the set.
    """

    _KEPT = 8

    def __init__(self, n: int, seed: int, *, shuffle: bool = True, window: float = 0.5) -> None:
        self._n = n
        self._seed = seed
        self._shuffle = shuffle
        self._window = int(np.rint(n * window))
        self._block = max(n, 4096)
        self._recent: OrderedDict[int, NDArray[np.int64]] = OrderedDict()
        self._lock = threading.Lock()
        self._restart()

    def _restart(self) -> None:
        self._generator = np.random.RandomState(self._seed % (1 << 32))
        order = np.arange(self._n)
        if self._shuffle:
            self._generator.shuffle(order)
        self._list: list[int] = order.tolist()
        self._next = 0

    def indices(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index in the set of each image number."""
        numbers = np.asarray(numbers, np.int64)
        if not self._shuffle:
            return numbers % self._n
        blocks, places = np.divmod(numbers, self._block)
        result = np.empty_like(places)
        with self._lock:
            for block in np.unique(blocks):
                here = blocks == block
                result[here] = self._sequence(int(block))[places[here]]
        return result

    def _sequence(self, block: int) -> NDArray[np.int64]:
        """Entries [block * size, (block + 1) * size) of the sequence."""
        if block not in self._recent:
            if block < self._next:
                self._restart()
            while self._next <= block:
                self._recent[self._next] = self._advance()
                self._recent.move_to_end(self._next)
                self._next += 1
                while len(self._recent) > self._KEPT:
                    self._recent.popitem(last=False)
        return self._recent[block]

    def _advance(self) -> NDArray[np.int64]:
        n, order, given = self._n, self._list, []
        start = self._next * self._block
        if self._window < 2:
            return np.array(order, np.int64)[np.arange(start, start + self._block) % n]
        # One call of the legacy generator for many numbers gives those of as many calls.
        back = self._generator.randint(self._window, size=self._block)
        place = start % n
        for step in back.tolist():
            value = order[place]
            given.append(value)
            # A negative index counts from the end, which is the wrap-around wanted here.
            order[place] = order[place - step]
            order[place - step] = value
            place = place + 1 if place + 1 < n else 0
        return np.array(given, np.int64)

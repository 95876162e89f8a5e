"""Histograms of weights and gradients while training, for TensorBoard and wandb."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tessera.training.learner import Learner
from tessera.training.parallel import whole
from tessera.training.tracking import Histogram, Tracker

_BINS = 64
_MODEL = "model."


class Histograms:
    """weights/<parameter> and gradients/<parameter>, of the last step.

    The gradients are those that the optimiser used, after clipping.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def make(self, learner: Learner, images_seen: int) -> None:
        """Measure and log all parameters; all processes take part, because they may hold shards."""
        found: dict[str, Histogram] = {}
        for name, parameter in learner.step.named_parameters():
            for kind, tensor in (("weights", parameter), ("gradients", parameter.grad)):
                spread = None if tensor is None else histogram(whole(tensor))
                if spread is not None:
                    found[f"{kind}/{name.removeprefix(_MODEL)}"] = spread
        for tracker in self._trackers:
            tracker.histograms(found, images_seen)


def histogram(tensor: Tensor) -> Histogram | None:
    """Counts in bins of equal width from the least to the largest value; None without any.

    Values that are not finite are left out.

    Example:
        >>> histogram(torch.tensor([0.0, 0.0, 1.0])).counts[[0, -1]].tolist()
        [2.0, 1.0]
    """
    values = tensor.detach().float().flatten()
    values = values[values.isfinite()]
    if not len(values):
        return None
    low, high = (float(end) for end in torch.aminmax(values))
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(values, _BINS, low, high)
    exact = values.double() if values.device.type != "mps" else values
    return Histogram(
        counts.cpu().double().numpy(),
        np.linspace(low, high, _BINS + 1),
        float(exact.sum()),
        float(exact.square().sum()),
    )

"""What a network is told beside the noisy image; the same for every network of the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

NO_CLASS = -1


@dataclass(frozen=True)
class Conditioning:
    """Side information of a batch of B images; every field is optional.

    Attributes:
        labels: int64 [B], class indices; `NO_CLASS` (-1) for no class. None: no class for all.
        augment: float32 [B, K], labels of the augmentation pipeline. None: not augmented.
        coords: float32 [B, 2, H, W] in [-1, 1], position of each pixel in the full image
            (channel 0 along columns, channel 1 along rows). None: the image is complete.
    """

    labels: Tensor | None = None
    augment: Tensor | None = None
    coords: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply `function` to every tensor that is present."""
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        return Conditioning(**{k: None if v is None else function(v) for k, v in present.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        """Move every tensor to `device`."""
        return self.map(lambda tensor: tensor.to(device))

    def without_labels(self) -> Conditioning:
        """The same conditioning with no class for any image (the null condition of guidance)."""
        return replace(self, labels=None)

    def drop_labels(self, drop: Tensor) -> Conditioning:
        """Replace labels by `NO_CLASS` where `drop` (bool [B]) is set."""
        if self.labels is None:
            return self
        return replace(self, labels=self.labels.masked_fill(drop, NO_CLASS))

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        return self.map(lambda tensor: tensor[index])


def one_hot(labels: Tensor | None, num_classes: int, batch: int, device: torch.device) -> Tensor:
    """Class indices as float32 rows [B, num_classes]; a row of zeros where there is no class."""
    if labels is None:
        return torch.zeros(batch, num_classes, device=device)
    classes = torch.arange(num_classes, device=device)
    return (labels.to(device)[:, None] == classes).to(torch.float32)

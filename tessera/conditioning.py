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
        coords: float32 [B, 2, H, W], position of each pixel in the full image, whose corners are
            -1 and 1 (channel 0 along columns, channel 1 along rows; see `coordinates`). None: the
            image is complete.
        image: float32 [B, C, h, w] in model space, a low-resolution version of the image that is to
            be made (super-resolution). None: there is none.

    Example:
        >>> cond = Conditioning(labels=torch.tensor([3, 1]))
        >>> cond.drop_labels(torch.tensor([False, True])).labels
        tensor([ 3, -1])
    """

    labels: Tensor | None = None
    augment: Tensor | None = None
    coords: Tensor | None = None
    image: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply `function` to every tensor that is present."""
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        return Conditioning(**{k: None if v is None else function(v) for k, v in present.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        """Move every tensor to `device`."""
        return self.map(lambda tensor: tensor.to(device))

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


def coordinates(columns: Tensor, rows: Tensor, size: tuple[int, int]) -> Tensor:
    """Positions of pixels in a full image, 2 (k / (n - 1) - 1/2) along each axis of n pixels.

    Args:
        columns, rows: numbers of the pixels' columns [..., W] and rows [..., H], from 0; outside of
            the full image they give positions beyond [-1, 1].
        size: height and width of the full image, at least 2 pixels each.

    Returns:
        float32 [..., 2, H, W]: x, which varies along columns, and y.
    """
    height, width = size
    x = 2 * (columns.to(torch.float32) / (width - 1) - 0.5)
    y = 2 * (rows.to(torch.float32) / (height - 1) - 0.5)
    shape = (*x.shape[:-1], y.shape[-1], x.shape[-1])
    return torch.stack([x[..., None, :].expand(shape), y[..., :, None].expand(shape)], dim=-3)


def full_grid(size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Coordinates of a complete image of `size` (height, width), float32 [2, H, W]."""
    height, width = size
    columns, rows = torch.arange(width, device=device), torch.arange(height, device=device)
    return coordinates(columns, rows, size)

"""Are samples copies? How close they are to training images, beside images that are new for sure.

The nearest training image of any picture is some distance away; only that of images which were not
trained on says how far is far. So the same search is made for held-out images of the same data, and
a sample counts as suspicious where its nearest training image is closer than those of all but a few
of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tessera.progress import progress

FEWEST_HELD_OUT = 20
"""With fewer held-out images there is no share."""
_SIDE = 16
_CHUNK = 2048
_NEIGHBOURS = 50
_Z95 = 1.959964


def small_pictures(images: Tensor) -> Tensor:
    """What is compared: images [N, C, H, W] averaged to at most 16 x 16 pixels, float64 [N, D].

    So fine noise and shifts by a pixel of large images count little, and a search is quick.
    """
    sides = min(images.shape[2], _SIDE), min(images.shape[3], _SIDE)
    return F.adaptive_avg_pool2d(images.to(torch.float32), sides).flatten(1).to(torch.float64)


@dataclass(frozen=True)
class Neighbours:
    """The nearest training images of N pictures.

    Attributes:
        rows: numbers of the nearest ones, int64 [N].
        distances: to them, root mean square of the differences of pixels, float64 [N].
        relative: that distance, as a part of the mean distance to the 50 nearest (Carlini et al.
            2023): a plain picture is close to many, a copy to one. 1 where there is one image only.
    """

    rows: NDArray[np.int64]
    distances: NDArray[np.float64]
    relative: NDArray[np.float64]

    def part(self, rows: slice) -> Neighbours:
        """Those of some of the pictures."""
        return Neighbours(self.rows[rows], self.distances[rows], self.relative[rows])


def nearest_images(
    queries: Tensor,
    read: Callable[[NDArray[np.int64]], Tensor],
    among: NDArray[np.int64],
    *,
    mirrored: Tensor | None = None,
) -> Neighbours:
    """Search all images of a set, in parts: memory does not grow with it.

    Args:
        queries: `small_pictures` [N, D].
        read: from numbers of images to their `small_pictures`.
        among: numbers of the images to search, int64 [M], M > 0.
        mirrored: the queries mirrored, where the set was trained on with mirrored copies; the
            closer of the two counts.

    Example:
        >>> pictures = torch.arange(12.0).reshape(4, 3).double()
        >>> found = nearest_images(pictures[2:] + 1, lambda rows: pictures[rows], np.arange(4))
        >>> found.rows.tolist(), found.distances.round(6).tolist()
        ([2, 3], [1.0, 1.0])
    """
    sides = [queries] if mirrored is None else [queries, mirrored]
    squares = [side.square().sum(dim=1, keepdim=True) for side in sides]
    kept = torch.full((len(queries), 0), torch.inf, dtype=torch.float64)
    which = torch.zeros((len(queries), 0), dtype=torch.int64)
    with progress("nearest images", len(among), unit="images") as bar:
        for start in range(0, len(among), _CHUNK):
            rows = among[start : start + _CHUNK]
            images = read(rows)
            own = images.square().sum(dim=1)
            found = [
                square + own - 2 * side @ images.T
                for side, square in zip(sides, squares, strict=True)
            ]
            squared = found[0] if len(found) == 1 else torch.minimum(*found)
            numbers = torch.from_numpy(rows).expand(len(queries), -1)
            kept, which = torch.cat([kept, squared], dim=1), torch.cat([which, numbers], dim=1)
            count = min(_NEIGHBOURS, kept.shape[1])
            kept, order = kept.topk(count, dim=1, largest=False)
            which = which.gather(1, order)
            bar.advance(len(rows))
    # What is left of the squares of equal pictures is rounding.
    distances = (kept / queries.shape[1]).clamp(min=0).sqrt()
    distances[distances < 1e-4] = 0.0
    mean = distances.mean(dim=1)
    relative = torch.where(mean > 0, distances[:, 0] / mean.clamp(min=1e-12), 1.0)
    return Neighbours(which[:, 0].numpy(), distances[:, 0].numpy(), relative.numpy())


@dataclass(frozen=True)
class Share:
    """How many samples are closer to a training image than nearly all held-out images are.

    Attributes:
        threshold: the distance that counts as close.
        samples, n: samples that are as close, of so many.
        held_out, m: held-out images that are, of so many.
    """

    threshold: float
    samples: int
    n: int
    held_out: int
    m: int

    @property
    def of_samples(self) -> float:
        """Share of the samples."""
        return self.samples / self.n

    @property
    def of_held_out(self) -> float:
        """Share of the held-out images, which is what to expect of new images."""
        return self.held_out / self.m

    @property
    def more(self) -> bool:
        """Whether it is more samples than chance explains: the 95% intervals do not meet."""
        return wilson(self.samples, self.n)[0] > wilson(self.held_out, self.m)[1]


def share_closer(
    samples: NDArray[np.float64], held_out: NDArray[np.float64], quantile: float = 0.05
) -> Share:
    """The share of samples whose distance is within the q-quantile of the held-out images'.

    Args:
        samples: distances [N] to the nearest training images, N > 0.
        held_out: of the held-out images [M], M > 0.
        quantile: q; of new images about this share is as close.

    Example:
        >>> share_closer(np.array([0.0, 5.0]), np.arange(1.0, 101.0))
        Share(threshold=5.0, samples=2, n=2, held_out=5, m=100)
    """
    rank = max(1, math.ceil(quantile * len(held_out) - 1e-9))
    threshold = float(np.sort(held_out)[rank - 1])
    return Share(
        threshold,
        int((samples <= threshold).sum()),
        len(samples),
        int((held_out <= threshold).sum()),
        len(held_out),
    )


def wilson(count: int, total: int) -> tuple[float, float]:
    """The 95% interval of a share, from `count` of `total` (Wilson 1927).

    Example:
        >>> [round(end, 3) for end in wilson(5, 100)]
        [0.022, 0.112]
    """
    share, z = count / total, _Z95
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    return max(0.0, middle - half), min(1.0, middle + half)

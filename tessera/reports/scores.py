"""Distances from real images with a floor and ceilings, so that a reader knows what is good."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tessera.metrics.features import FeatureExtractor
from tessera.metrics.frechet import frechet_distance
from tessera.metrics.manifold import precision_recall
from tessera.metrics.statistics import FeatureStatistics
from tessera.randomness import numpy_generator

_AT_ONCE = 256
_BLUR = 4
_NEIGHBOURS = 3
_FEWEST = 100  # images, for precision and recall to say anything
ROWS = ("samples", "floor", "blurred", "shuffled")
"""What is scored: the samples; as many other real images; these without detail, and with their
pixels in disorder."""


class ColourLayout:
    """Which colours lie where: the means of 4 x 4 fields of each channel.

    It needs no weights and no training. It tells a wrong palette or layout from a right one, and
    nothing about what is in a picture.
    """

    name = "colour and layout"

    def __init__(self, channels: int) -> None:
        self.dim = 16 * channels

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to float32 [B, 16 C], 0 to 1."""
        return F.adaptive_avg_pool2d(images.to(torch.float32) / 255, 4).flatten(1)


@dataclass(frozen=True)
class Ladder:
    """One score of the samples, and of what they lie between.

    Attributes:
        features: the extractor's name.
        dim: numbers in a feature vector.
        n: images of each row; n_reference: real images that all are compared with.
        distances: Fréchet distances, by the names of `ROWS`.
        precision, recall: likewise; None where there are too few images.
    """

    features: str
    dim: int
    n: int
    n_reference: int
    distances: dict[str, float]
    precision: dict[str, float] | None
    recall: dict[str, float] | None


def ladder(
    extractor: FeatureExtractor,
    samples: NDArray[np.uint8],
    others: NDArray[np.uint8],
    reference: NDArray[np.uint8],
    seed: int = 0,
) -> Ladder:
    """Score samples, and other real images as they are, blurred and shuffled.

    A Fréchet distance shrinks as the sets grow, so all rows have the same number of images.

    Args:
        samples, others, reference: uint8 [N, C, H, W]; of `others` as many are taken as there are
            samples, or the other way round.
        seed: of the disorder.
    """
    n = min(len(samples), len(others))
    sets = {
        "samples": samples[:n],
        "floor": others[:n],
        "blurred": blurred(others[:n]),
        "shuffled": shuffled(others[:n], seed),
    }
    real = _features(extractor, reference)
    made = {name: _features(extractor, images) for name, images in sets.items()}
    statistics = FeatureStatistics.of(real)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of few images: the report says how many
        distances = {
            name: frechet_distance(FeatureStatistics.of(found), statistics)
            for name, found in made.items()
        }
    precision = recall = None
    if min(n, len(real)) >= _FEWEST:
        both = {name: precision_recall(found, real, k=_NEIGHBOURS) for name, found in made.items()}
        precision = {name: found.precision for name, found in both.items()}
        recall = {name: found.recall for name, found in both.items()}
    return Ladder(extractor.name, extractor.dim, n, len(real), distances, precision, recall)


def _features(extractor: FeatureExtractor, images: NDArray[np.uint8]) -> Tensor:
    parts = torch.split(torch.from_numpy(images), _AT_ONCE)
    return torch.cat([extractor(part).cpu() for part in parts])


def blurred(images: NDArray[np.uint8], block: int = _BLUR) -> NDArray[np.uint8]:
    """Images [N, C, H, W] with a quarter of their resolution, smoothly enlarged again."""
    x = torch.from_numpy(images).to(torch.float32)
    small = F.adaptive_avg_pool2d(x, (max(1, x.shape[2] // block), max(1, x.shape[3] // block)))
    large = F.interpolate(small, x.shape[2:], mode="bilinear", align_corners=False)
    return large.round().clamp(0, 255).to(torch.uint8).numpy()


def shuffled(images: NDArray[np.uint8], seed: int = 0) -> NDArray[np.uint8]:
    """Images [N, C, H, W] whose pixels have changed places: their colours and nothing else."""
    count, channels = images.shape[:2]
    order = numpy_generator(seed, "report", "shuffled").permuted(
        np.tile(np.arange(images[0, 0].size), (count, 1)), axis=1
    )
    flat = images.reshape(count, channels, -1)
    mixed: NDArray[np.uint8] = np.take_along_axis(flat, order[:, None], axis=2)
    return mixed.reshape(images.shape)


def halves(
    rows: Sequence[int] | NDArray[np.int64], seed: int, most: int
) -> list[NDArray[np.int64]]:
    """Up to `most` of some images in two halves drawn at random, which are compared."""
    order = numpy_generator(seed, "report", "halves").permutation(np.asarray(rows, np.int64))
    return np.array_split(order[:most], 2)

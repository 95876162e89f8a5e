"""Feature extractors: what turns images into the vectors that distances compare."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from tessera.metrics.statistics import FeatureStatistics
from tessera.progress import progress


class FeatureExtractor(Protocol):
    """A fixed function from images to feature vectors.

    Attributes:
        name: how the features are called in tables and reference files.
        dim: numbers in a feature vector.
    """

    name: str
    dim: int

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to float32 [B, dim].

        Raises:
            DataError: images of a shape that the extractor does not take.
        """
        ...


def measure(
    extractor: FeatureExtractor, batches: Iterable[Tensor], total: int | None = None
) -> FeatureStatistics:
    """Statistics of the features of all `batches` (uint8 [B, C, H, W]), of `total` images."""
    statistics = FeatureStatistics.empty(extractor.dim)
    with progress("features", total, unit="images") as bar:
        for batch in batches:
            statistics.update(extractor(batch).cpu())
            bar.advance(len(batch))
    return statistics

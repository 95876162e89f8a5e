"""Feature extractors: what turns images into the vectors that distances compare."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from tessera.errors import DataError
from tessera.metrics import weights
from tessera.metrics.dinov2 import DinoV2, VisionTransformer
from tessera.metrics.inception import Inception, InceptionNetwork
from tessera.metrics.statistics import FeatureStatistics
from tessera.progress import progress

Features = Literal["classifier", "inception", "dinov2"]
FEATURES: tuple[Features, ...] = get_args(Features)
_PUBLISHED: dict[Features, weights.Weights] = {
    "inception": weights.INCEPTION,
    "dinov2": weights.DINOV2,
}


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


def find_extractor(name: Features, path: str | os.PathLike[str] | None = None) -> Path:
    """The file of published weights: `path`, or from the cache of torch.hub, or a download.

    Raises:
        DataError: there are no such weights; the message says what to put where.
    """
    if name == "classifier":
        raise DataError(
            "the in-domain classifier has no published weights: it is trained on the real images. "
            "Make a reference file with: tessera eval reference DATA REF.npz --features classifier"
        )
    return weights.find_weights(_PUBLISHED[name], path)


def open_extractor(
    name: Features,
    path: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
) -> Inception | DinoV2:
    """An extractor with published weights, which `find_extractor` finds.

    Raises:
        DataError: there are no such weights, or the file holds others.
    """
    file = find_extractor(name, path)
    state, digest = weights.read_weights(file)
    try:
        if name == "dinov2":
            transformer = VisionTransformer()
            transformer.load(state)
            return DinoV2(transformer.to(device), digest)
        network = InceptionNetwork()
        network.load(state)
        return Inception(network, "inception", digest).to(device)
    except (KeyError, RuntimeError) as error:
        wanted = _PUBLISHED[name]
        raise DataError(
            f"{file}: not {wanted.title}; the file to give is {wanted.file} from\n{wanted.url}"
        ) from error


def with_float64(device: torch.device | str) -> torch.device:
    """The device itself, or the CPU if that has no float64."""
    return torch.device("cpu" if torch.device(device).type == "mps" else device)


def accumulator(dim: int, device: torch.device) -> FeatureStatistics:
    """Empty statistics on the device of the features, or on the CPU if that has no float64."""
    return FeatureStatistics.empty(dim, with_float64(device))


def feature_statistics(
    extractor: FeatureExtractor, batches: Iterable[Tensor], total: int | None = None
) -> FeatureStatistics:
    """Statistics of the features of all `batches` (uint8 [B, C, H, W]), of `total` images."""
    statistics = FeatureStatistics.empty(extractor.dim)
    with progress("features", total, unit="images") as bar:
        for batch in batches:
            statistics.update(extractor(batch).cpu())
            bar.advance(len(batch))
    return statistics

"""Score samples against a reference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera import distributed
from tessera.errors import DataError
from tessera.metrics.classifier import LabelledImages, class_labels
from tessera.metrics.evaluate import share
from tessera.metrics.frechet import frechet_distance
from tessera.metrics.images import batches
from tessera.metrics.reference import Reference
from tessera.metrics.statistics import FeatureStatistics
from tessera.randomness import numpy_generator


@dataclass(frozen=True)
class Score:
    """The result of `score`.

    Attributes:
        fd_classifier: Fréchet distance on features of the in-domain classifier (not FID).
        n, n_reference: samples, and real images behind the reference.
        extractor, dim: the features' name and how many numbers they have.
        accuracy: the classifier's share of right answers on held-out real images.
        recognised: share of the samples that the classifier takes for the class they were asked to
            be; None without labels.
    """

    fd_classifier: float
    n: int
    n_reference: int
    extractor: str
    dim: int
    accuracy: float
    recognised: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def score(samples: Iterable[tuple[Tensor, Tensor | None]], reference: Reference) -> Score:
    """Score batches of samples as they come; nothing is kept but their statistics.

    Under several processes each gives its share, and all have the result.

    Args:
        samples: pairs of images uint8 [B, C, H, W] and their classes, int64 [B] or None.
        reference: real images to compare with.

    Raises:
        DataError: fewer than two samples, or samples of another shape than the reference.
    """
    extractor = reference.extractor
    statistics = FeatureStatistics.empty(extractor.dim)
    asked = right = 0
    for images, labels in samples:
        statistics.update(extractor(images).cpu())
        if labels is not None and extractor.facts.task == "classes":
            asked += len(labels)
            right += int((extractor.predict(images) == labels.cpu()).sum())
    (statistics, asked, right), *others = distributed.gather((statistics, asked, right))
    for more, asked_there, right_there in others:
        statistics.merge(more)
        asked, right = asked + asked_there, right + right_there
    if statistics.n < 2:
        raise DataError(f"a score needs at least 2 samples, got {statistics.n}")
    return Score(
        fd_classifier=frechet_distance(statistics, reference.statistics),
        n=statistics.n,
        n_reference=reference.statistics.n,
        extractor=extractor.name,
        dim=extractor.dim,
        accuracy=extractor.facts.accuracy,
        recognised=right / asked if asked else None,
    )


def score_images(
    data: LabelledImages,
    reference: Reference,
    *,
    num: int | None = None,
    seed: int = 0,
    batch: int = 256,
) -> Score:
    """Score a set of images, all or `num` drawn at random, `batch` at once; see `score`.

    Its classes count where they are the reference's: not where folders have other names.

    Raises:
        DataError: the set has fewer than `num` images; or as `score`.
    """
    indices = np.arange(len(data))
    if num is not None:
        if num > len(data):
            raise DataError(f"{data.name}: {num} images asked for, there are {len(data)}")
        # Sets are often sorted by class, so the first ones would be of one class.
        indices = np.sort(numpy_generator(seed, "score", "subset").permutation(indices)[:num])
    labels = class_labels(data)
    if data.class_names not in (None, reference.extractor.facts.class_names):
        labels = None
    return score(
        (
            (images, None if labels is None else torch.from_numpy(labels[chunk]))
            for chunk, images in batches(data, indices[share(len(indices))], batch)
        ),
        reference,
    )

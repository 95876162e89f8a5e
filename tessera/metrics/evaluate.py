"""All scores of measured samples, by the conventions of each tool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tessera.errors import DataError
from tessera.metrics.classifier import LabelledImages
from tessera.metrics.conventions import RULES, Convention, Metric, Needs, Result
from tessera.metrics.features import with_float64
from tessera.metrics.formats import Measured
from tessera.metrics.frechet import frechet_distance
from tessera.metrics.kid import SEED, kernel_distance
from tessera.metrics.manifold import precision_recall
from tessera.metrics.measure import ImageStream, data_source, measure_images
from tessera.metrics.reference import Reference


@dataclass(frozen=True)
class Score:
    """What the in-domain classifier says of samples.

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


def score_stream(samples: ImageStream, reference: Reference) -> Score:
    """Score samples as they come by the in-domain classifier; only their statistics are kept.

    Under several processes each gives its share, and all have the result.

    Raises:
        DataError: fewer than two samples, or samples of another shape than the reference.
    """
    extractor = reference.extractor
    measured = measure_images(samples, extractor, Needs(moments=True, recognised=True))
    (result,) = compare(measured, reference.measured(), [("fd", "edm")])
    return Score(
        fd_classifier=result.values["fd"],
        n=samples.total,
        n_reference=reference.statistics.n,
        extractor=extractor.name,
        dim=extractor.dim,
        accuracy=extractor.facts.accuracy,
        recognised=measured.recognised,
    )


def score_images(
    data: LabelledImages,
    reference: Reference,
    *,
    num: int | None = None,
    seed: int = 0,
    batch: int = 256,
) -> Score:
    """Score a set of images, all or `num` drawn at random, `batch` at once; see `score_stream`.

    Raises:
        DataError: the set has fewer than `num` images; or as `score_stream`.
    """
    return score_stream(data_source(data, num=num, seed=seed, batch=batch), reference)


def compare(
    samples: Measured,
    reference: Measured | None,
    pairs: Sequence[tuple[Metric, Convention]],
    device: torch.device | str = "cpu",
) -> list[Result]:
    """The metrics of samples against a reference; only IS can do without one.

    Raises:
        DataError: the two do not have the same kind of features, or too few images.
    """
    results: list[Result] = []
    for metric, convention in pairs:
        earlier = [r for r in results if r.metric == metric]
        if metric == "is":
            mean, std = samples.inception_scores[convention]
            values = {"is": mean, "std": std} if convention == "torch-fidelity" else {"is": mean}
        elif reference is None:
            raise DataError(f"{metric} compares with a reference")
        elif earlier and metric in ("fid", "sfid", "fd"):
            values = earlier[0].values  # one number, whatever the tool
        else:
            check_comparable(samples, reference)
            values = _score(metric, convention, samples, reference, device)
        results.append(Result(metric, convention, values, RULES[metric][convention]))
    return results


def check_comparable(samples: Measured, reference: Measured) -> None:
    """Refuse features of different extractors.

    Raises:
        DataError: they differ in length or in name.
    """
    if None not in (samples.dim, reference.dim) and samples.dim != reference.dim:
        raise DataError(
            f"{samples.name} has {samples.dim} features, the reference {reference.name} has "
            f"{reference.dim}: they come from different networks and cannot be compared"
        )
    names = samples.extractor, reference.extractor
    if None not in names and names[0] != names[1]:
        raise DataError(
            f"{samples.name} has features of {names[0]}, the reference {reference.name} of "
            f"{names[1]}: choose one for both (--features, or evaluate.features in a recipe)"
        )
    weights = samples.weights, reference.weights
    if None not in weights and weights[0] != weights[1]:
        raise DataError(
            f"the features of {samples.name} were made with other {names[0]} weights "
            f"({weights[0]}) than those of the reference {reference.name} ({weights[1]})"
        )


def _score(
    metric: Metric,
    convention: Convention,
    samples: Measured,
    reference: Measured,
    device: torch.device | str,
) -> dict[str, float]:
    if metric in ("fid", "fd", "sfid"):
        spatial = metric == "sfid"
        one = samples.spatial_moments if spatial else samples.moments
        two = reference.spatial_moments if spatial else reference.moments
        assert one is not None
        assert two is not None
        return {metric: frechet_distance(one, two, with_float64(device))}
    assert samples.features is not None
    assert reference.features is not None
    exact = metric == "pr" and convention == "rdm"
    dtype, where = torch.float64 if exact else torch.float32, with_float64(device)
    x, y = samples.features.to(where, dtype), reference.features.to(where, dtype)
    if metric == "kid":
        mean, std = kernel_distance(x, y, seed=SEED)
        return {"kid": mean, "std": std}
    found = precision_recall(x, y, round_radii=exact)
    values = {"precision": found.precision, "recall": found.recall}
    return {**values, "f_score": found.f_score} if convention == "torch-fidelity" else values

"""Features of a set in one pass, and all scores from them, by the conventions of each tool."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera import distributed
from tessera.data.dataset import choose_subset
from tessera.data.parallel import ordered_map
from tessera.errors import DataError
from tessera.metrics.classifier import LabelledImages
from tessera.metrics.features import FeatureExtractor, accumulator, with_float64
from tessera.metrics.formats import Measured
from tessera.metrics.frechet import frechet_distance
from tessera.metrics.inception import SPATIAL_DIM, Inception
from tessera.metrics.inception_score import SplitScore, consecutive_splits, equal_splits
from tessera.metrics.kid import SEED, SIZE, kernel_distance
from tessera.metrics.manifold import precision_recall
from tessera.metrics.statistics import FeatureStatistics, Moments
from tessera.progress import progress

Metric = Literal["fid", "sfid", "is", "kid", "pr", "fd"]
Convention = Literal["edm", "adm", "rdm", "torch-fidelity"]
METRICS: tuple[Metric, ...] = get_args(Metric)
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)

# What each tool computes, and by which rule; the first is the default.
RULES: dict[Metric, dict[Convention, str]] = {
    "fid": {
        "edm": "float64 statistics",
        "adm": "float64 statistics; the tool's float32 mean moves the 7th digit",
        "rdm": "float64 statistics",
        "torch-fidelity": "float64 statistics; the tool's float32 mean moves the 7th digit",
    },
    "sfid": {
        "adm": "7 channels of 17x17 features; float64 statistics",
        "rdm": "7 channels of 17x17 features; float64 statistics",
    },
    "is": {
        "adm": "logits without bias; mean over splits of 5,000 in order",
        "rdm": "logits with bias; mean over splits of 5,000 in order",
        "torch-fidelity": "logits without bias; 10 equal splits, shuffled by seed 2020",
    },
    "kid": {"torch-fidelity": "100 subsets of 1,000, cubic kernel, seed 2020"},
    "pr": {
        "adm": "k = 3, these features, exact distances (the tool: float16)",
        "rdm": "k = 3, these features, exact distances, radii rounded to float32",
        "torch-fidelity": "k = 3, these features (the tool's default: VGG16), exact distances",
    },
    "fd": {"edm": "float64 statistics"},
}

_FEWEST: dict[Metric, int] = {"kid": SIZE, "pr": 4}


@dataclass(frozen=True)
class Result:
    """A score.

    Attributes:
        metric: its short name.
        convention: the tool whose rule it follows.
        values: by name; the first is the score, others belong to it (std, recall).
        rule: the convention in words.
    """

    metric: Metric
    convention: Convention
    values: dict[str, float]
    rule: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Source:
    """Images to measure, of which this process has its share.

    Attributes:
        name: of the set.
        total: number of images, over all processes.
        batches: row numbers int64 [B] of the images among all, and images uint8 [B, C, H, W].
    """

    name: str
    total: int
    batches: Iterable[tuple[NDArray[np.int64], Tensor]]


@dataclass(frozen=True)
class Needs:
    """What has to be kept while features are extracted, and how many images it takes at least.

    See `needs`.
    """

    fewest: int = 2
    moments: bool = False
    spatial_moments: bool = False
    features: bool = False
    spatial: bool = False
    scores: tuple[Convention, ...] = ()


def chosen(
    metrics: Sequence[Metric], convention: Convention | Literal["all"] | None = None
) -> list[tuple[Metric, Convention]]:
    """Metrics with their conventions: their default one, the given one, or every one.

    Raises:
        DataError: the tool of that name has no such metric.
    """
    pairs: list[tuple[Metric, Convention]] = []
    for metric in metrics:
        known = RULES[metric]
        if convention == "all":
            pairs += [(metric, name) for name in known]
        elif convention is None:
            pairs.append((metric, next(iter(known))))
        elif convention in known:
            pairs.append((metric, convention))
        else:
            raise DataError(
                f"{metric} has no convention {convention!r}: that tool does not compute it. "
                f"It has {', '.join(known)}"
            )
    return pairs


def needs(pairs: Sequence[tuple[Metric, Convention]], *, reference: bool = False) -> Needs:
    """What of the samples (or of the reference) the metrics are computed from."""
    metrics = {metric for metric, _ in pairs}
    return Needs(
        fewest=max((_FEWEST.get(metric, 2) for metric in metrics), default=2),
        moments=bool(metrics & {"fid", "fd"}),
        spatial_moments="sfid" in metrics,
        features=bool(metrics & {"kid", "pr"}),
        scores=() if reference else tuple(c for metric, c in pairs if metric == "is"),
    )


def data_source(
    data: LabelledImages, *, num: int | None = None, seed: int = 0, batch: int = 64
) -> Source:
    """This process's share of a set: all images, or `num` of them, drawn as EDM's tool does.

    Raises:
        DataError: there are fewer than `num`, or fewer than two.
    """
    indices = _chosen_rows(data.name, len(data), num, seed)
    if len(indices) < 2:
        raise DataError(f"{data.name}: a score needs at least 2 images, there are {len(indices)}")
    rows = share(len(indices))

    def read(chunk: NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor]:
        return chunk, torch.from_numpy(np.array(data.read(indices[chunk])))

    chunks = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    # Decoding goes on while the network works.
    return Source(data.name, len(indices), ordered_map(read, chunks, workers=2, ahead=4))


def draw(measured: Measured, num: int, seed: int = 0) -> Measured:
    """The features of `num` images of a file, those that `data_source` draws of the images.

    Raises:
        DataError: there are fewer, or the file holds statistics only.
    """
    features, spatial = measured.features, measured.spatial
    if features is None:
        raise DataError(
            f"{measured.name} holds statistics of all of its images, of which --num cannot choose. "
            "Leave it out, or give the images themselves"
        )
    rows = torch.from_numpy(_chosen_rows(measured.name, len(features), num, seed))
    return replace(
        measured,
        n=len(rows),
        moments=None,
        spatial_moments=None,
        features=features[rows],
        spatial=None if spatial is None else spatial[rows],
    )


def _chosen_rows(name: str, total: int, num: int | None, seed: int) -> NDArray[np.int64]:
    if num is not None and num > total:
        raise DataError(f"{name}: {num} images asked for, there are {total}")
    return choose_subset(total, num, seed)


def check_enough(name: str, total: int, wanted: Needs) -> None:
    """Refuse a set too small for a metric, before its features are extracted.

    Raises:
        DataError: it is.
    """
    if total < wanted.fewest:
        metric = next((m for m, n in _FEWEST.items() if n == wanted.fewest), "a score")
        raise DataError(
            f"{name}: {metric} needs at least {wanted.fewest:,} images, there are {total:,}"
        )


def share(total: int) -> NDArray[np.int64]:
    """The rows of this process among `total`: a run of neighbours."""
    return np.array_split(np.arange(total), distributed.world())[distributed.rank()]


def measure_images(
    source: Source, extractor: FeatureExtractor, wanted: Needs
) -> tuple[Measured, dict[Convention, tuple[float, float]]]:
    """Extract the features of all images once, on all processes, and keep what is wanted.

    Returns what was measured, and mean and deviation of the Inception Score for each convention
    asked for; the same on every process.

    Raises:
        DataError: a metric needs Inception and `extractor` is another, or more images; or images
            do not fit the extractor.
    """
    check_enough(source.name, source.total, wanted)
    inception = extractor if isinstance(extractor, Inception) else None
    spatial = wanted.spatial or wanted.spatial_moments
    if inception is None and (spatial or wanted.scores):
        raise DataError(f"sFID and IS are made of Inception features, not {extractor.name}")
    device = torch.device("cpu")
    own: FeatureStatistics | None = None
    own_spatial: FeatureStatistics | None = None
    kept: list[tuple[NDArray[np.int64], Tensor, Tensor | None]] = []
    sums = {c: SplitScore.empty(_splits(c, source.total), 1008) for c in wanted.scores}
    with progress(f"features of {source.name}", source.total, unit="images") as bar:
        for rows, images in source.batches:
            maps: Tensor | None = None
            if inception is not None and spatial:
                features, maps = inception.with_spatial(images)
            else:
                features = extractor(images)
            device = features.device
            if wanted.moments:
                own = own or accumulator(extractor.dim, device)
                own.update(features)
            if maps is not None and wanted.spatial_moments:
                own_spatial = own_spatial or accumulator(SPATIAL_DIM, device)
                own_spatial.update(maps)
            if wanted.features or wanted.spatial:
                kept.append((rows, features.cpu(), maps.cpu() if maps is not None else None))
            for convention, sum_ in sums.items():
                if inception is not None:
                    sum_.update(rows, inception.logits(features, bias=convention == "rdm"))
            bar.advance(len(rows) * distributed.world())
    measured = Measured(
        source.name,
        extractor=extractor.name,
        weights=getattr(extractor, "weights", None),
        n=source.total,
        moments=_merged(own),
        spatial_moments=_merged(own_spatial),
    )
    if wanted.features or wanted.spatial:
        everything = [part for parts in distributed.gather(kept) for part in parts]
        order = torch.from_numpy(np.argsort(np.concatenate([rows for rows, _, _ in everything])))
        measured = replace(measured, features=torch.cat([f for _, f, _ in everything])[order])
        if wanted.spatial:
            measured = replace(
                measured, spatial=torch.cat([m for _, _, m in everything if m is not None])[order]
            )
    scores = {}
    for convention, sum_ in sums.items():
        first, *others = distributed.gather(sum_)
        for other in others:
            first.merge(other)
        scores[convention] = first.score()
    return measured, scores


def complete(
    measured: Measured, wanted: Needs, extractor: Callable[[], FeatureExtractor]
) -> tuple[Measured, dict[Convention, tuple[float, float]]]:
    """Work out from the features in a file, or from its images, what it does not hold itself.

    Args:
        measured: what a file held.
        wanted: what the metrics need.
        extractor: opens the extractor, where it is needed.

    Raises:
        DataError: the file holds too little.
    """
    check_holds(measured, wanted)
    features, spatial = measured.features, measured.spatial
    if wanted.moments and measured.moments is None and features is not None:
        measured = replace(measured, moments=FeatureStatistics.of(features).moments())
    if wanted.spatial_moments and measured.spatial_moments is None and spatial is not None:
        found = FeatureStatistics.of(spatial).moments()
        measured = replace(measured, spatial_moments=found)
    if wanted.features and features is None and measured.images is not None:
        made, _ = measure_images(data_source(measured.images), extractor(), Needs(features=True))
        measured = replace(measured, features=made.features)
    scores: dict[Convention, tuple[float, float]] = {}
    if wanted.scores and features is not None:
        network = extractor()
        if not isinstance(network, Inception):
            raise DataError(f"IS is made of Inception features, not {network.name}")
        for convention in wanted.scores:
            sums = SplitScore.empty(_splits(convention, len(features)), 1008)
            for rows in np.array_split(np.arange(len(features)), -(-len(features) // 512)):
                logits = network.logits(features[rows], bias=convention == "rdm")
                sums.update(rows, logits)
            scores[convention] = sums.score()
    return measured, scores


def check_holds(measured: Measured, wanted: Needs) -> None:
    """Refuse a file from which `complete` cannot work out what is wanted.

    Raises:
        DataError: the message says what it lacks.
    """
    rows, images = measured.features is not None, measured.images is not None
    spatial = measured.spatial is not None or measured.spatial_moments is not None
    missing = {
        "the mean and covariance of its features (mu, sigma)": wanted.moments
        and not (rows or measured.moments is not None),
        "spatial features (mu_s, sigma_s or s_feat), which sFID compares": wanted.spatial_moments
        and not spatial,
        "the features of each image, which KID and precision and recall compare": wanted.features
        and not (rows or images),
        "the features of each image, which IS is made of": bool(wanted.scores) and not rows,
    }
    for what, lacks in missing.items():
        if lacks:
            raise DataError(
                f"{measured.name} does not hold {what}. Give the images themselves, or a file made "
                "with: tessera eval features IMAGES FEATURES.npz"
            )


def compare(
    samples: Measured,
    reference: Measured | None,
    pairs: Sequence[tuple[Metric, Convention]],
    scores: dict[Convention, tuple[float, float]],
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
            mean, std = scores[convention]
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


def _splits(convention: Convention, n: int) -> NDArray[np.int64]:
    return equal_splits(n, 10, SEED) if convention == "torch-fidelity" else consecutive_splits(n)


def _merged(own: FeatureStatistics | None) -> Moments | None:
    """The statistics of all processes; a process without images has none."""
    found = None
    for other in distributed.gather(
        own and replace(own, mu=own.mu.cpu(), scatter=own.scatter.cpu())
    ):
        if found is None:
            found = other
        elif other is not None:
            found.merge(other)
    return None if found is None else found.moments()


def arrays(images: Iterator[Tensor], total: int, name: str) -> Source:
    """Images that this process makes on the way, for the rows of its `share`."""

    def numbered() -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        rows, start = share(total), 0
        for batch in images:
            yield rows[start : start + len(batch)], batch
            start += len(batch)

    return Source(name, total, numbered())

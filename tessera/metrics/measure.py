"""The features of a set in one pass, and what all scores are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera import distributed
from tessera.data.dataset import choose_subset
from tessera.data.parallel import ordered_map
from tessera.errors import DataError
from tessera.metrics.classifier import Classifier, LabelledImages, class_labels
from tessera.metrics.conventions import Convention, Needs, check_enough
from tessera.metrics.features import FeatureExtractor, accumulator
from tessera.metrics.formats import Measured
from tessera.metrics.inception import SPATIAL_DIM, Inception
from tessera.metrics.inception_score import SplitScore, consecutive_splits, equal_splits
from tessera.metrics.kid import SEED
from tessera.metrics.statistics import FeatureStatistics, Moments
from tessera.progress import progress

_CLASSES = 1008  # of Inception's logits

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class ImageStream:
    """Images to measure, of which this process has its share.

    Attributes:
        name: of the set.
        total: number of images, over all processes.
        batches: row numbers int64 [B] of the images among all, images uint8 [B, C, H, W], and
            their classes int64 [B] or None.
        class_names: names of the classes, if known.
    """

    name: str
    total: int
    batches: Iterable[tuple[Rows, Tensor, Tensor | None]]
    class_names: tuple[str, ...] | None = None


def data_source(
    data: LabelledImages, *, num: int | None = None, seed: int = 0, batch: int = 64
) -> ImageStream:
    """This process's share of a set: all images, or `num` of them, drawn as EDM's tool does.

    Raises:
        DataError: there are fewer than `num`, or fewer than two.
    """
    indices = _chosen_rows(data.name, len(data), num, seed)
    if len(indices) < 2:
        raise DataError(f"{data.name}: a score needs at least 2 images, there are {len(indices)}")
    rows, labels = share_of_rows(len(indices)), class_labels(data)

    def read(chunk: Rows) -> tuple[Rows, Tensor, Tensor | None]:
        chosen = indices[chunk]
        images = torch.from_numpy(np.array(data.read(chosen)))
        return chunk, images, None if labels is None else torch.from_numpy(labels[chosen])

    chunks = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    # Decoding goes on while the network works.
    batches = ordered_map(read, chunks, workers=2, ahead=4)
    return ImageStream(data.name, len(indices), batches, data.class_names)


def made_images(
    images: Iterable[tuple[Tensor, Tensor | None]], total: int, name: str
) -> ImageStream:
    """Images that this process makes on the way, with their classes, for its `share_of_rows`."""

    def numbered() -> Iterator[tuple[Rows, Tensor, Tensor | None]]:
        rows, start = share_of_rows(total), 0
        for batch, labels in images:
            yield rows[start : start + len(batch)], batch, labels
            start += len(batch)

    return ImageStream(name, total, numbered())


def share_of_rows(total: int) -> Rows:
    """The rows of this process among `total`: a run of neighbours."""
    return np.array_split(np.arange(total), distributed.world())[distributed.rank()]


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


def _chosen_rows(name: str, total: int, num: int | None, seed: int) -> Rows:
    if num is not None and num > total:
        raise DataError(f"{name}: {num} images asked for, there are {total}")
    return choose_subset(total, num, seed)


def measure_images(stream: ImageStream, extractor: FeatureExtractor, wanted: Needs) -> Measured:
    """Extract the features of all images once, on all processes, and keep what is wanted.

    The result is the same on every process. The classes count where they are the classifier's: not
    where folders have other names.

    Raises:
        DataError: a metric needs Inception and `extractor` is another, or more images; or images
            do not fit the extractor.
    """
    check_enough(stream.name, stream.total, wanted)
    inception = extractor if isinstance(extractor, Inception) else None
    if inception is None and (wanted.spatial or wanted.spatial_moments or wanted.scores):
        raise DataError(f"sFID and IS are made of Inception features, not {extractor.name}")
    kept = _Kept(stream, extractor, wanted)
    with progress(f"features of {stream.name}", stream.total, unit="images") as bar:
        for rows, images, labels in stream.batches:
            maps: Tensor | None = None
            if inception is not None and (wanted.spatial or wanted.spatial_moments):
                features, maps = inception.with_spatial(images)
            else:
                features = extractor(images)
            kept.add(rows, features, maps)
            kept.recognise(images, labels)
            if inception is not None:
                _add_logits(kept.sums, inception, rows, features)
            bar.advance(len(rows) * distributed.world())
    return kept.together()


@dataclass
class _Kept:
    """What this process keeps of its share of the images."""

    stream: ImageStream
    extractor: FeatureExtractor
    wanted: Needs
    own: FeatureStatistics | None = None
    own_spatial: FeatureStatistics | None = None
    rows: list[tuple[Rows, Tensor, Tensor | None]] = field(default_factory=list)
    asked: int = 0
    right: int = 0

    def __post_init__(self) -> None:
        self.sums = _sums(self.wanted.scores, self.stream.total)

    def add(self, rows: Rows, features: Tensor, maps: Tensor | None) -> None:
        if self.wanted.moments:
            self.own = self.own or accumulator(self.extractor.dim, features.device)
            self.own.update(features)
        if maps is not None and self.wanted.spatial_moments:
            self.own_spatial = self.own_spatial or accumulator(SPATIAL_DIM, features.device)
            self.own_spatial.update(maps)
        if self.wanted.features or self.wanted.spatial:
            self.rows.append((rows, features.cpu(), maps.cpu() if maps is not None else None))

    def recognise(self, images: Tensor, labels: Tensor | None) -> None:
        """Count the images that the classifier takes for their class."""
        extractor = self.extractor
        if not self.wanted.recognised or labels is None or not isinstance(extractor, Classifier):
            return
        facts = extractor.facts
        if facts.task == "classes" and self.stream.class_names in (None, facts.class_names):
            self.asked += len(labels)
            self.right += int((extractor.predict(images) == labels.cpu()).sum())

    def together(self) -> Measured:
        """What all processes have kept."""
        counts = distributed.gather((self.asked, self.right))
        asked, right = (sum(numbers) for numbers in zip(*counts, strict=True))
        measured = Measured(
            self.stream.name,
            extractor=self.extractor.name,
            weights=getattr(self.extractor, "weights", None),
            n=self.stream.total,
            moments=_merged(self.own),
            spatial_moments=_merged(self.own_spatial),
            inception_scores=_scores(self.sums),
            recognised=right / asked if asked else None,
        )
        if not (self.wanted.features or self.wanted.spatial):
            return measured
        everything = [part for parts in distributed.gather(self.rows) for part in parts]
        order = torch.from_numpy(np.argsort(np.concatenate([rows for rows, _, _ in everything])))
        measured = replace(measured, features=torch.cat([f for _, f, _ in everything])[order])
        if self.wanted.spatial:
            maps = torch.cat([m for _, _, m in everything if m is not None])
            measured = replace(measured, spatial=maps[order])
        return measured


def complete(
    measured: Measured, wanted: Needs, extractor: Callable[[], FeatureExtractor]
) -> Measured:
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
        made = measure_images(data_source(measured.images), extractor(), Needs(features=True))
        measured = replace(measured, features=made.features)
    if wanted.scores and features is not None:
        network = extractor()
        if not isinstance(network, Inception):
            raise DataError(f"IS is made of Inception features, not {network.name}")
        sums = _sums(wanted.scores, len(features))
        for rows in np.array_split(np.arange(len(features)), -(-len(features) // 512)):
            _add_logits(sums, network, rows, features[rows])
        measured = replace(measured, inception_scores={c: s.score() for c, s in sums.items()})
    return measured


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


def _sums(conventions: Iterable[Convention], total: int) -> dict[Convention, SplitScore]:
    """Empty sums of the Inception Score by each convention."""
    splits = {
        convention: equal_splits(total, 10, SEED)
        if convention == "torch-fidelity"
        else consecutive_splits(total)
        for convention in conventions
    }
    return {convention: SplitScore.empty(rule, _CLASSES) for convention, rule in splits.items()}


def _add_logits(
    sums: Mapping[Convention, SplitScore], network: Inception, rows: Rows, features: Tensor
) -> None:
    for convention, sum_ in sums.items():
        sum_.update(rows, network.logits(features, bias=convention == "rdm"))


def _scores(sums: Mapping[Convention, SplitScore]) -> dict[Convention, tuple[float, float]]:
    """Inception Scores of the images of all processes."""
    found = {}
    for convention, sum_ in sums.items():
        first, *others = distributed.gather(sum_)
        for other in others:
            first.merge(other)
        found[convention] = first.score()
    return found


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

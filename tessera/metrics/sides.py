"""Both sides of a score: samples and reference, opened and measured with one extractor."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from tessera.errors import DataError
from tessera.metrics.conventions import Convention, Metric, Needs, check_enough, needs
from tessera.metrics.evaluate import check_comparable
from tessera.metrics.features import FEATURES, FeatureExtractor, Features, open_extractor
from tessera.metrics.formats import NAMES, Measured, is_measured, read_measured
from tessera.metrics.images import npz_names, open_images
from tessera.metrics.measure import ImageStream, complete, data_source, draw, measure_images
from tessera.metrics.reference import Reference, has_classifier, open_reference


def stored_features(
    path: Path, features: Features, num: int | None = None, seed: int = 0
) -> Measured | None:
    """What a file of features holds of samples, all or `num` of them; None of images.

    Raises:
        DataError: the file is damaged, or `num` cannot be chosen of it.
    """
    # Statistics beside the images themselves are not taken for them.
    if not is_measured(path) or "arr_0" in npz_names(path):
        return None
    found = read_measured(path, features)
    return found if num is None else draw(found, num, seed)


def open_known(
    reference: Path | None, features: Features | None, *, inception: bool
) -> tuple[Measured | None, Features]:
    """What a file of statistics or features holds, and the features to compare.

    Args:
        reference: also images, or nothing, of which nothing is known.
        features: those asked for; by default what the file says.
        inception: whether images without a word are to be measured by Inception, rather than by
            the in-domain classifier.

    Raises:
        DataError: the file is damaged, or its features are of none of the extractors.
    """
    if reference is None:
        return None, features or "inception"
    classifier = has_classifier(reference)
    known: Measured | None = None
    if is_measured(reference) and not classifier:
        known = read_measured(reference, None if features == "classifier" else features)
    if features is not None:
        return known, features
    if known is None:
        return None, "classifier" if classifier or not inception else "inception"
    name = known.extractor or "inception"
    if name not in FEATURES:
        raise DataError(f"{reference}: features of {name!r}; there are {', '.join(FEATURES)}")
    return known, name


class Sides:
    """Samples and reference, measured with one extractor that is opened when it is needed.

    Args:
        samples: images, or what a file of their features holds (`stored_features`).
        reference: real images, or a file of them; None for the Inception Score alone.
        known: what the reference file holds, where it is one (`open_known`).
        features: of both sides.
        weights: the extractor's, where it has published ones.
        seed, training_images: of the in-domain classifier's training, if it is trained.
        batch: images of the reference at once.
        device: where features are extracted.
    """

    def __init__(
        self,
        samples: ImageStream | Measured,
        reference: Path | None,
        known: Measured | None,
        features: Features,
        *,
        weights: Path | None = None,
        seed: int = 0,
        training_images: int | None = None,
        batch: int = 64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.samples, self.reference, self.known = samples, reference, known
        self.features, self.weights, self.device = features, weights, device
        self._seed, self._training_images, self._batch = seed, training_images, batch

    @functools.cached_property
    def classifier(self) -> Reference:
        """The reference with its classifier, which is trained if there is none yet."""
        assert self.reference is not None
        return open_reference(
            self.reference,
            seed=self._seed,
            training_images=self._training_images,
            device=self.device,
            batch=self._batch,
        )

    @functools.cached_property
    def extractor(self) -> FeatureExtractor:
        """The extractor of both sides."""
        if self.features == "classifier":
            return self.classifier.extractor
        return open_extractor(self.features, self.weights, self.device)

    def measure(
        self, pairs: Sequence[tuple[Metric, Convention]]
    ) -> tuple[Measured, Measured | None]:
        """What the metrics are computed from, of samples and reference.

        Raises:
            DataError: the two cannot be compared, which is said before anything is extracted, or
                there are too few images.
        """
        wanted = needs(pairs)
        self._check(wanted)
        theirs = None
        if any(metric != "is" for metric, _ in pairs):
            theirs = self._measure_reference(needs(pairs, reference=True))
        if isinstance(self.samples, Measured):
            return complete(self.samples, wanted, lambda: self.extractor), theirs
        return measure_images(self.samples, self.extractor, wanted), theirs

    def _check(self, wanted: Needs) -> None:
        ours, theirs = self.samples, self.known
        if isinstance(ours, ImageStream):
            check_enough(ours.name, ours.total, wanted)
            expected = Measured(ours.name, self.features)
        else:
            expected = ours
        if theirs is None:
            return
        check_comparable(expected, theirs)
        if theirs.extractor is None and theirs.dim not in NAMES:
            raise DataError(
                f"{theirs.name}: features of {theirs.dim} numbers, which are neither Inception's "
                f"(2048) nor DINOv2's (1024); {self.features} features cannot be compared with them"
            )
        if isinstance(ours, ImageStream) and theirs.weights is not None:
            digits = getattr(self.extractor, "weights", None)
            check_comparable(Measured(ours.name, self.features, digits), theirs)

    def _measure_reference(self, wanted: Needs) -> Measured:
        if self.known is not None:
            return complete(self.known, wanted, lambda: self.extractor)
        assert self.reference is not None
        stored = has_classifier(self.reference)
        if self.features == "classifier" and not wanted.features:
            return self.classifier.measured()
        if self.features == "classifier" and stored:
            raise DataError(
                f"{self.reference} holds statistics only; kid and pr compare the features of "
                "each image. Give the real images themselves as REFERENCE"
            )
        if stored:
            raise DataError(
                f"{self.reference} is a reference of the in-domain classifier, not of "
                f"{self.features}; make one with: tessera eval reference DATA REF.npz "
                f"--features {self.features}"
            )
        images = open_images(self.reference)
        return measure_images(data_source(images, batch=self._batch), self.extractor, wanted)

"""The in-domain classifier and reference files."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from tessera.data.dataset import choose_subset
from tessera.errors import DataError
from tessera.metrics import classifier as module
from tessera.metrics.classifier import Classifier, ClassifierNetwork, train_classifier
from tessera.metrics.evaluate import score_images
from tessera.metrics.images import ArrayImages
from tessera.metrics.reference import build_reference, load_reference, save_reference


def stripes(n: int, size: int = 8, seed: int = 0, labelled: bool = True) -> ArrayImages:
    """Noisy images of two classes: bright top half, bright left half."""
    random = np.random.default_rng(seed)
    labels = random.integers(2, size=n)
    images = random.integers(0, 60, (n, 1, size, size))
    images[labels == 0, :, : size // 2] += 150
    images[labels == 1, :, :, : size // 2] += 150
    return ArrayImages("stripes", images.astype(np.uint8), labels if labelled else None)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return train_classifier(stripes(100), training_images=1500)


def test_learns_the_classes_and_says_how_well(classifier: Classifier) -> None:
    assert classifier.facts.task == "classes"
    assert classifier.facts.outputs == 2
    assert classifier.facts.held_out == 20
    assert classifier.facts.accuracy >= 0.9
    fresh = stripes(50, seed=1)
    predicted = classifier.predict(torch.from_numpy(fresh.images))
    assert (predicted.numpy() == fresh.labels).mean() >= 0.9


def test_features_are_positive_means_of_fixed_width(classifier: Classifier) -> None:
    features = classifier(torch.from_numpy(stripes(5).images))
    assert features.shape == (5, classifier.dim)
    assert features.dtype == torch.float32
    one_by_one = torch.cat(
        [classifier(torch.from_numpy(stripes(5).images[i : i + 1])) for i in range(5)]
    )
    torch.testing.assert_close(features, one_by_one, rtol=1e-4, atol=1e-5)


def test_same_seed_same_classifier_another_seed_another() -> None:
    def weights(seed: int) -> torch.Tensor:
        made = train_classifier(stripes(40), seed=seed, training_images=500)
        return made.network.head.weight

    before = torch.get_rng_state()
    first = weights(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_unlabelled_images_are_told_apart_by_quarter_turns() -> None:
    made = train_classifier(stripes(60, labelled=False), training_images=1500)
    assert (made.facts.task, made.facts.outputs) == ("rotations", 4)
    assert made.name == "in-domain rotation classifier"
    # Both classes look alike after a quarter turn, so a half is the best that can be reached.
    assert made.facts.accuracy > 0.3


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 40, 33), (3, 96, 80)])
def test_any_shape(shape: tuple[int, int, int]) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (12, *shape)).astype(np.uint8)
    made = train_classifier(ArrayImages("x", images, np.arange(12) % 3), training_images=200)
    assert made(torch.from_numpy(images)).shape == (12, made.dim)


def test_unusable_references_are_refused() -> None:
    with pytest.raises(DataError, match="5 images are too few"):
        train_classifier(stripes(5))
    oblong = ArrayImages("oblong", np.zeros((20, 1, 8, 4), np.uint8))
    with pytest.raises(DataError, match="square"):
        train_classifier(oblong)


def test_reference_file_scores_as_the_reference_itself(tmp_path: Path) -> None:
    reference = build_reference(stripes(200), training_images=1500)
    save_reference(tmp_path / "stripes.npz", reference)
    loaded = load_reference(tmp_path / "stripes.npz")
    assert loaded.name == "stripes"
    assert loaded.extractor.facts == reference.extractor.facts
    samples = stripes(150, seed=3)
    again, first = score_images(samples, loaded), score_images(samples, reference)
    assert again.fd_classifier == pytest.approx(first.fd_classifier, rel=1e-5)
    assert again.recognised == first.recognised


def test_distance_orders_good_and_bad_samples() -> None:
    reference = build_reference(stripes(300), training_images=1500)
    good, bad = stripes(300, seed=5), stripes(300, seed=6)
    noise = np.random.default_rng(0).integers(0, 120, bad.images.shape)
    spoiled = np.clip(bad.images.astype(int) + noise, 0, 255).astype(np.uint8)
    near = score_images(good, reference)
    far = score_images(ArrayImages("noisy", spoiled, bad.labels), reference)
    assert near.fd_classifier < far.fd_classifier / 3
    assert near.recognised is not None
    assert near.recognised >= 0.9
    assert near.n_reference == 300


def test_labels_of_other_classes_do_not_count() -> None:
    reference = build_reference(stripes(60), training_images=300)
    folders = ArrayImages("out", stripes(60).images, np.zeros(60, np.int64), ("000000",))
    assert score_images(folders, reference).recognised is None


def test_a_subset_is_drawn_over_the_whole_set() -> None:
    sample = stripes(100)
    ordered = np.argsort(sample.labels, kind="stable")
    by_class = ArrayImages("sorted", sample.images[ordered], sample.labels[ordered])
    reference = build_reference(stripes(200), training_images=300)
    first = score_images(ArrayImages("first", by_class.images[:20]), reference)
    drawn = score_images(by_class, reference, num=20, seed=1)
    assert drawn.n == 20
    assert drawn.fd_classifier < first.fd_classifier
    # The rows that every other score draws, too.
    rows = choose_subset(100, 20, 1)
    chosen = ArrayImages("chosen", by_class.images[rows], by_class.labels[rows])
    assert drawn == score_images(chosen, reference)
    with pytest.raises(DataError, match="101 images asked for, there are 100"):
        score_images(by_class, reference, num=101)


def seen(data: ArrayImages, monkeypatch: pytest.MonkeyPatch, **options: int) -> int:
    """How many images a classifier is trained on."""
    count, original = [0], ClassifierNetwork.forward

    def counted(self: ClassifierNetwork, images: torch.Tensor) -> torch.Tensor:
        count[0] += len(images) if self.training else 0
        return original(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierNetwork, "forward", counted)
        train_classifier(data, **options)
    return count[0]


@pytest.mark.slow
def test_training_ends_when_the_accuracy_has_stopped_to_rise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert seen(stripes(100), monkeypatch, training_images=1500) == 11 * 128  # too few to tell
    # Right on all held-out images at one of the first looks, then three looks without a better one.
    steps = seen(stripes(100), monkeypatch, training_images=100_000) // 128
    assert 4 * module._LOOK_STEPS < steps < 14 * module._LOOK_STEPS


@pytest.mark.parametrize(("images", "most"), [(100, 8_000), (2000, 24_000), (50_000, 60_000)])
def test_training_is_scaled_to_the_set(
    images: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def record(*arguments: Any) -> None:
        asked.append(arguments[-1])

    monkeypatch.setattr(module, "_train", record)
    monkeypatch.setattr(module, "_accuracy", lambda *_: 0.5)
    train_classifier(stripes(images, size=4))
    assert asked == [most]


def test_the_whole_cycle_is_passed_in_larger_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    class Recorded(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    monkeypatch.setattr(module, "_LOOK_STEPS", 2)
    monkeypatch.setattr(module, "_accuracy", Mock(side_effect=[0.5, 0.95, 0.95, 0.5, 0.95, 0.95]))
    train_classifier(stripes(20, size=4), training_images=50 * module._BATCH)
    # Three looks without a better one after the second; the rest of 40 steps in strides of 6.
    assert len(rates) == 10 + 6
    assert max(rates) > 0.9 * module._RATE
    assert rates[-1] < 0.1 * module._RATE


@pytest.mark.slow
def test_hard_sets_are_given_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where most images are still wrong, a few looks without a better accuracy say nothing."""
    monkeypatch.setattr(module, "_LOOK_STEPS", 2)
    looks = [0.2, 0.3, 0.3, 0.25, 0.3, 0.28, 0.3, 0.31, *[0.3] * module._PATIENCE, 0.5]
    monkeypatch.setattr(module, "_accuracy", Mock(side_effect=looks))
    steps = seen(stripes(20, size=4), monkeypatch, training_images=200 * module._BATCH) // 128
    # All looks up to the last without a better one, and two thirds as many steps after them.
    before = 2 * (len(looks) - 1)
    assert before <= steps < 2 * before


def test_label_vectors_are_no_classes() -> None:
    attributes = ArrayImages("a", stripes(40).images, np.zeros((40, 5), np.float32))  # type: ignore[arg-type]
    assert train_classifier(attributes, training_images=200).facts.task == "rotations"

"""Scores while training, of the averaged weights, and the best model so far."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tessera import distributed
from tessera.data.codec import Codec
from tessera.data.dataset import open_dataset
from tessera.data.latents import is_latents
from tessera.errors import DataError, RecipeError
from tessera.files import atomic_folder, read_json, write_json
from tessera.metrics.classifier import LabelledImages
from tessera.metrics.conventions import Needs, chosen, needs
from tessera.metrics.evaluate import check_comparable, compare
from tessera.metrics.features import FeatureExtractor, find_extractor, open_extractor
from tessera.metrics.formats import Measured, is_measured, read_measured, save_statistics
from tessera.metrics.images import open_images
from tessera.metrics.measure import check_holds, complete, data_source, measure_images
from tessera.metrics.reference import (
    build_reference,
    has_classifier,
    load_reference,
    save_reference,
)
from tessera.pipelines.plans import Pictures
from tessera.pipelines.stream import sample_stream
from tessera.recipes.build import build_codec
from tessera.recipes.datasets import shrunk
from tessera.recipes.external import own_dataset
from tessera.recipes.parts import NO_PARTS, Parts
from tessera.recipes.schema import EvaluateConfig, Recipe
from tessera.training.learner import Learner
from tessera.training.preview import BEST, ema_pipeline, save_pipeline
from tessera.training.tracking import Metrics, Tracker

SCORE = "score.json"
_HIGHER_IS_BETTER = ("is", "precision")


class Evaluation:
    """Scores samples from the first average, always of the same seeds, against real images.

    The real images are measured once, at the first evaluation, and their statistics kept in the
    run folder. The model that did best by the first metric is kept as a pipeline in `best/`.
    Models that start from pictures get `start_from`.
    """

    def __init__(
        self,
        recipe: Recipe,
        class_names: Sequence[str] | None,
        run_dir: Path,
        trackers: Sequence[Tracker],
        start_from: Pictures | None = None,
        parts: Parts = NO_PARTS,
        codec: Codec | None = None,
    ) -> None:
        self._recipe, self._class_names = recipe, class_names
        self._run_dir, self._trackers = run_dir, trackers
        self._start_from, self._parts, self._codec = start_from, parts, codec
        self._sides: tuple[FeatureExtractor, Measured] | None = None

    def make(self, learner: Learner, images_seen: int) -> Metrics:
        """Sample, score and log; all processes take part, with the same result."""
        config = self._recipe.evaluate
        assert config is not None
        pairs = chosen(config.metrics)
        wanted = needs(pairs)
        if self._sides is None:
            self._sides = self._open(config, learner.device)
        extractor, reference = self._sides
        pipeline = ema_pipeline(
            self._recipe,
            learner,
            images_seen,
            self._class_names,
            self._parts,
            everywhere=True,
            codec=self._codec,
        )
        assert pipeline is not None
        start: dict[str, Any] = {} if self._start_from is None else {"start_from": self._start_from}
        stream = sample_stream(pipeline, config.images, "samples", batch=config.batch, **start)
        measured = measure_images(stream, extractor, wanted)
        values: Metrics = {}
        if distributed.is_main():
            with warnings.catch_warnings():
                # The curve is the point here, and the number of images is the user's choice.
                warnings.simplefilter("ignore", UserWarning)
                for result in compare(measured, reference, pairs, learner.device):
                    values |= {f"evaluate/{name}": v for name, v in result.values.items()}
            for tracker in self._trackers:
                tracker.log({"images": images_seen, **values})
            name = next(iter(values))
            if self._is_best(name, values[name] or 0.0):
                # The pipeline folder and its score appear together.
                with atomic_folder(self._run_dir / BEST) as part:
                    save_pipeline(pipeline, part / "pipeline", self._run_dir)
                    score = {"images": images_seen, "by": name, **values}
                    write_json(part / SCORE, score)
        return distributed.broadcast(values)

    def _is_best(self, name: str, value: float) -> bool:
        """Whether no evaluation of this run has done better by this metric."""
        path = self._run_dir / BEST / SCORE
        if not path.is_file():
            return True
        try:
            before = read_json(path)
            if before["by"] != name:
                return True
            best = float(before[name])
        except (DataError, LookupError, TypeError, ValueError) as error:
            warnings.warn(f"{path} is damaged and counts for nothing ({error})", stacklevel=2)
            return True
        sign = -1 if name.removeprefix("evaluate/") in _HIGHER_IS_BETTER else 1
        return sign * value < sign * best

    def _open(
        self, config: EvaluateConfig, device: torch.device
    ) -> tuple[FeatureExtractor, Measured]:
        """The extractor and the measured reference."""
        wanted = needs(chosen(config.metrics), reference=True)
        path = _reference(self._recipe, config)
        stored = self._run_dir / _stored_name(path, config, wanted, self._recipe.data.shrink)
        if config.features == "classifier":
            return self._open_classifier(path, stored, config, wanted, device)
        extractor = open_extractor(config.features, config.weights, device)
        given = path is not None and is_measured(path)
        if given or (stored.is_file() and not wanted.features):
            known = read_measured(path if path is not None and given else stored, config.features)
            _check_known(known, config, wanted)
            return extractor, complete(known, wanted, lambda: extractor)
        measured = measure_images(
            data_source(self._images(path), batch=config.batch),
            extractor,
            replace(wanted, moments=True),  # whatever metrics the run is resumed with
        )
        if distributed.is_main():
            save_statistics(stored, measured)
        return extractor, measured

    def _open_classifier(
        self,
        path: Path | None,
        stored: Path,
        config: EvaluateConfig,
        wanted: Needs,
        device: torch.device,
    ) -> tuple[FeatureExtractor, Measured]:
        file = path if path is not None and has_classifier(path) else stored
        with distributed.main_first():
            if not file.is_file():
                save_reference(file, build_reference(self._images(path), device=device))
        reference = load_reference(file, device)
        extractor, measured = reference.extractor, reference.measured()
        if wanted.features:
            images = self._images(path if file == stored else _training_images(self._recipe))
            made = measure_images(
                data_source(images, batch=config.batch),
                extractor,
                Needs(features=True),
            )
            measured = replace(measured, features=made.features)
        return extractor, measured

    def _images(self, path: Path | None) -> LabelledImages:
        """Real images; those of the training as the training sees them, without their alpha.

        None: those of the caller's own data set.
        """
        if path is None:
            return shrunk(own_dataset(self._recipe, self._parts), self._recipe)
        if str(path) != self._recipe.data.path:
            return open_images(path)
        return shrunk(open_dataset(path), self._recipe)


def _training_images(recipe: Recipe) -> Path | None:
    """Where the training images are; None for a data set that the caller handed over."""
    return None if recipe.data.path is None else Path(recipe.data.path)


def _reference(recipe: Recipe, config: EvaluateConfig) -> Path | None:
    """What samples are compared with; None for a data set that the caller handed over."""
    return _training_images(recipe) if config.reference is None else Path(config.reference)


def _stored_name(path: Path | None, config: EvaluateConfig, wanted: Needs, shrink: int = 1) -> str:
    """File for the statistics of the images at `path`; another for other features of them.

    A resumed run may have another section than the one that made the file.
    """
    place = str(path and path.resolve())
    facts = (place, config.features, config.weights, wanted.spatial_moments, shrink)
    return f"evaluation-{hashlib.sha256(repr(facts).encode()).hexdigest()[:8]}.ref.npz"


def check_reference(recipe: Recipe, config: EvaluateConfig, parts: Parts = NO_PARTS) -> None:
    """Say before the training, not at the first score, that there is nothing to compare with.

    Raises:
        RecipeError: there is no reference, or it would need images of a set of latents.
        DataError: it holds too little or other features, or the extractor's weights are missing.
        CheckpointError: the autoencoder that decodes the samples cannot be had.
    """
    build_codec(recipe.codec).prepare()
    path = _reference(recipe, config)
    if path is None and parts.dataset is None:
        raise RecipeError("evaluate.reference is not set, and there are no images at data.path")
    if path is not None and not path.exists():
        raise RecipeError(f"evaluate.reference: there is nothing at {path}")
    own_latents = path is None and not recipe.codec.takes_images
    if own_latents or (path is not None and is_latents(path)):
        raise RecipeError(
            f"{path or 'the own data set'} holds latents, but scores compare decoded samples with "
            "real images: set evaluate.reference to a reference file or to the images that the "
            "latents were made of"
        )
    wanted = needs(chosen(config.metrics), reference=True)
    if config.features != "classifier":
        find_extractor(config.features, config.weights)
        if path is not None and is_measured(path):
            _check_known(read_measured(path, config.features), config, wanted)
        return
    if path is None:
        return
    classifier = has_classifier(path)
    if is_measured(path) and not classifier:
        raise RecipeError(
            f"{path} holds no in-domain classifier: set evaluate.features to what its statistics "
            "were made with, inception or dinov2"
        )
    if classifier and wanted.features and is_latents(str(recipe.data.path)):
        raise RecipeError(
            f"{path} holds statistics only, and kid and pr compare the features of each real "
            "image: set evaluate.reference to the images that the latents were made of"
        )


def _check_known(known: Measured, config: EvaluateConfig, wanted: Needs) -> None:
    check_comparable(Measured("samples", config.features), known)
    check_holds(known, wanted)

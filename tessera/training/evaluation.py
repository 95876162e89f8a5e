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
from tessera.data.dataset import open_dataset
from tessera.data.latents import is_latents
from tessera.errors import DataError, RecipeError
from tessera.files import atomic_folder, read_json, write_json
from tessera.metrics import evaluate as scoring
from tessera.metrics.classifier import LabelledImages
from tessera.metrics.features import FeatureExtractor, find_extractor, open_extractor
from tessera.metrics.formats import Measured, is_measured, read_measured, save_statistics
from tessera.metrics.images import open_images
from tessera.metrics.reference import (
    build_reference,
    has_classifier,
    load_reference,
    save_reference,
)
from tessera.pipelines.plans import Pictures
from tessera.recipes.build import build_codec
from tessera.recipes.datasets import shrunk
from tessera.recipes.parts import NO_PARTS, Parts
from tessera.recipes.schema import EvaluateConfig, Recipe
from tessera.training.learner import Learner
from tessera.training.preview import ema_pipeline
from tessera.training.tracking import Metrics, Tracker

BEST = "best"
_SCORE = "score.json"
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
    ) -> None:
        self._recipe, self._class_names = recipe, class_names
        self._run_dir, self._trackers = run_dir, trackers
        self._start_from, self._parts = start_from, parts
        self._sides: tuple[FeatureExtractor, Measured] | None = None

    def make(self, learner: Learner, images_seen: int) -> Metrics:
        """Sample, score and log; all processes take part, with the same result."""
        config = self._recipe.evaluate
        assert config is not None
        pairs = scoring.chosen(config.metrics)
        wanted = scoring.needs(pairs)
        if self._sides is None:
            self._sides = self._open(config, learner.device)
        extractor, reference = self._sides
        pipeline = ema_pipeline(
            self._recipe, learner, images_seen, self._class_names, self._parts, everywhere=True
        )
        assert pipeline is not None
        start: dict[str, Any] = {} if self._start_from is None else {"start_from": self._start_from}
        seeds = [int(row) for row in scoring.share(config.images)]
        made = (
            torch.from_numpy(batch.images).permute(0, 3, 1, 2)
            for batch in pipeline.sample_batches(seeds, batch=config.batch, **start)
        )
        source = scoring.arrays(made, config.images, "samples")
        measured, scores = scoring.measure_images(source, extractor, wanted)
        values: Metrics = {}
        if distributed.is_main():
            with warnings.catch_warnings():
                # The curve is the point here, and the number of images is the user's choice.
                warnings.simplefilter("ignore", UserWarning)
                for result in scoring.compare(measured, reference, pairs, scores, learner.device):
                    values |= {f"evaluate/{name}": v for name, v in result.values.items()}
            for tracker in self._trackers:
                tracker.log({"images": images_seen, **values})
            name = next(iter(values))
            if self._is_best(name, values[name] or 0.0):
                # The pipeline folder and its score appear together.
                with atomic_folder(self._run_dir / BEST) as part:
                    pipeline.save(part / "pipeline")
                    score = {"images": images_seen, "by": name, **values}
                    write_json(part / _SCORE, score)
        return distributed.broadcast(values)

    def _is_best(self, name: str, value: float) -> bool:
        """Whether no evaluation of this run has done better by this metric."""
        path = self._run_dir / BEST / _SCORE
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
        wanted = scoring.needs(scoring.chosen(config.metrics), reference=True)
        path = Path(config.reference or str(self._recipe.data.path))
        stored = self._run_dir / _stored_name(path, config, wanted, self._recipe.data.shrink)
        if config.features == "classifier":
            return self._open_classifier(path, stored, config, wanted, device)
        extractor = open_extractor(config.features, config.weights, device)
        if is_measured(path) or (stored.is_file() and not wanted.features):
            file = path if is_measured(path) else stored
            known = read_measured(file, config.features)
            _check_known(known, config, wanted)
            return extractor, scoring.complete(known, wanted, lambda: extractor)[0]
        measured, _ = scoring.measure_images(
            scoring.data_source(self._images(path), batch=config.batch),
            extractor,
            replace(wanted, moments=True),  # whatever metrics the run is resumed with
        )
        if distributed.is_main():
            save_statistics(stored, measured)
        return extractor, measured

    def _open_classifier(
        self,
        path: Path,
        stored: Path,
        config: EvaluateConfig,
        wanted: scoring.Needs,
        device: torch.device,
    ) -> tuple[FeatureExtractor, Measured]:
        file = path if has_classifier(path) else stored
        with distributed.main_first():
            if not file.is_file():
                save_reference(file, build_reference(self._images(path), device=device))
        reference = load_reference(file, device)
        statistics = reference.statistics
        extractor = reference.extractor
        measured = Measured(
            reference.name, extractor.name, n=statistics.n, moments=statistics.moments()
        )
        if wanted.features:
            images = self._images(path if file == stored else Path(str(self._recipe.data.path)))
            made, _ = scoring.measure_images(
                scoring.data_source(images, batch=config.batch),
                extractor,
                scoring.Needs(features=True),
            )
            measured = replace(measured, features=made.features)
        return extractor, measured

    def _images(self, path: Path) -> LabelledImages:
        """Real images; those of the training as the training sees them, without their alpha."""
        if str(path) != self._recipe.data.path:
            return open_images(path)
        return shrunk(open_dataset(path), self._recipe)


def _stored_name(path: Path, config: EvaluateConfig, wanted: scoring.Needs, shrink: int = 1) -> str:
    """File for the statistics of the images at `path`; another for other features of them.

    A resumed run may have another section than the one that made the file.
    """
    facts = (str(path.resolve()), config.features, config.weights, wanted.spatial_moments, shrink)
    return f"evaluation-{hashlib.sha256(repr(facts).encode()).hexdigest()[:8]}.ref.npz"


def check_reference(recipe: Recipe, config: EvaluateConfig) -> None:
    """Say before the training, not at the first score, that there is nothing to compare with.

    Raises:
        RecipeError: there is no reference, or it would need images of a set of latents.
        DataError: it holds too little or other features, or the extractor's weights are missing.
        CheckpointError: the autoencoder that decodes the samples cannot be had.
    """
    build_codec(recipe.codec).prepare()
    path = Path(config.reference or str(recipe.data.path))
    if not path.exists():
        raise RecipeError(f"evaluate.reference: there is nothing at {path}")
    if is_latents(path):
        raise RecipeError(
            f"{path} holds latents, but scores compare decoded samples with real images: set "
            "evaluate.reference to a reference file or to the images that the latents were made of"
        )
    wanted = scoring.needs(scoring.chosen(config.metrics), reference=True)
    if config.features != "classifier":
        find_extractor(config.features, config.weights)
        if is_measured(path):
            _check_known(read_measured(path, config.features), config, wanted)
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


def _check_known(known: Measured, config: EvaluateConfig, wanted: scoring.Needs) -> None:
    scoring.check_comparable(Measured("samples", config.features), known)
    scoring.check_holds(known, wanted)

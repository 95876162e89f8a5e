"""Sample grids while training, and the pipeline with averaged weights that they come from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tessera import distributed
from tessera.data.codec import Codec
from tessera.errors import RecipeError, TesseraError
from tessera.images import grid, save_png
from tessera.model import Model, with_tensors
from tessera.pipelines.base import Pipeline
from tessera.pipelines.labels import choose_labels
from tessera.pipelines.loading import build_pipeline
from tessera.pipelines.plans import Pictures
from tessera.recipes.build import build_codec, build_model
from tessera.recipes.parts import NO_PARTS, Parts
from tessera.recipes.schema import PreviewConfig, Recipe
from tessera.training.learner import Learner
from tessera.training.tracking import Tracker

BEST = "best"
"""Folder of a run with the model that did best, and its score."""
_NETWORK = "network."


class Preview:
    """Grids of samples from the first average, always of the same seeds: previews/<images>.png.

    Conditional models show class after class, one in each column as far as there are columns;
    models that start from pictures get `start_from`.
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
        self._folder, self._trackers = run_dir / "previews", trackers
        self._start_from, self._parts = start_from, parts
        self._codec = build_codec(recipe.codec) if codec is None else codec
        self._no_codec = False

    def make(self, learner: Learner, images_seen: int) -> None:
        """Sample and write a grid; all processes take part, the main one samples."""
        config = self._recipe.run.preview
        pipeline = ema_pipeline(self._recipe, learner, images_seen, self._class_names, self._parts)
        if pipeline is None or config is None or not self._decodes():
            return
        pipeline.codec = self._codec
        count = config.rows * config.columns
        labels = shown_labels(config, self._recipe.data.num_classes)
        start: dict[str, Any] = {} if self._start_from is None else {"start_from": self._start_from}
        images = pipeline.sample(range(count), labels, **start)
        picture = grid(images, columns=config.columns)
        save_png(self._folder / f"{images_seen:012d}.png", picture)
        for tracker in self._trackers:
            tracker.picture("samples", picture, images_seen)
            if pipeline.reported:
                reported = {f"samples_{name}": v for name, v in pipeline.reported.items()}
                tracker.log({"images": images_seen, **reported})

    def _decodes(self) -> bool:
        """Whether samples can be made visible; if not, that is said once and training goes on."""
        if self._no_codec:
            return False
        try:
            self._codec.prepare()
        except TesseraError as error:
            self._no_codec = True
            warnings.warn(f"no previews will be made: {error}", stacklevel=3)
            return False
        return True


def shown_labels(config: PreviewConfig, num_classes: int) -> list[int | str] | None:
    """The class of each image of a grid: the same in a column, as far as there are columns."""
    if not num_classes:
        return None
    count, columns = config.rows * config.columns, config.columns
    if config.labels is None:
        return [i % columns % num_classes for i in range(count)]
    of_columns = len(config.labels) <= columns
    places = [i % columns if of_columns else i for i in range(count)]
    return [config.labels[place % len(config.labels)] for place in places]


def check_labels(recipe: Recipe, class_names: Sequence[str] | None) -> None:
    """Say before the training, not at the first preview, that there are no such classes.

    Raises:
        RecipeError: names the key.
    """
    config, classes = recipe.run.preview, recipe.data.num_classes
    if config is None or config.labels is None:
        return
    try:
        choose_labels(config.labels, range(len(config.labels)), classes, class_names)
    except TesseraError as error:
        raise RecipeError(f"run.preview.labels: {error}") from None


def averaged_model(recipe: Recipe, learner: Learner, parts: Parts = NO_PARTS) -> Model:
    """The model with the weights of the first average, in `eval` mode, on every process.

    It shares the tensors of the average, which the next step changes.
    """
    return _with_weights(recipe, learner, learner.average(0), parts).eval()


def ema_pipeline(
    recipe: Recipe,
    learner: Learner,
    images_seen: int,
    class_names: Sequence[str] | None,
    parts: Parts = NO_PARTS,
    *,
    everywhere: bool = False,
    codec: Codec | None = None,
) -> Pipeline | None:
    """The model with averaged weights where it is trained, which all processes must ask for.

    It shares the tensors of the averages, which the next step changes: sample or save it first.

    Args:
        codec: of the training, so that its autoencoder is not loaded once more.

    None but on the main process, unless it is wanted `everywhere`.
    """
    states = [learner.average(index) for index in range(len(recipe.ema))]
    if not (everywhere or distributed.is_main()):
        return None
    made = build_pipeline(
        recipe,
        _with_weights(recipe, learner, states[0], parts),
        images_seen=images_seen,
        class_names=class_names,
        other_emas=[
            {n.removeprefix(_NETWORK): t for n, t in state.items() if n.startswith(_NETWORK)}
            for state in states[1:]
        ],
        parts=parts,
    )
    if codec is not None:
        made.codec = codec
    return made


def save_pipeline(pipeline: Pipeline, folder: Path, run_dir: Path) -> None:
    """Write a pipeline folder of a run; its autoencoder, if that is saved along, only once."""
    known = (run_dir / "pipeline", run_dir / BEST / "pipeline")
    pipeline.save(folder, known=known)


def _with_weights(
    recipe: Recipe, learner: Learner, state: Mapping[str, Tensor], parts: Parts
) -> Model:
    """The trained model around other weights; where its own are sharded, built anew."""
    if not learner.sharded:
        made = with_tensors(learner.step.model, lambda name, tensor: state.get(name, tensor))
        assert isinstance(made, Model)
        return made
    model = build_model(recipe, parts)
    model.load_state_dict(dict(state))
    return model.to(learner.device)

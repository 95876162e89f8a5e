"""Sample grids while training, and the pipeline with averaged weights that they come from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tessera import distributed
from tessera.data.codec import Codec
from tessera.errors import TesseraError
from tessera.images import grid, save_png
from tessera.pipelines.pipeline import Pipeline
from tessera.recipes.build import build_codec, build_denoiser
from tessera.recipes.schema import Recipe
from tessera.training.learner import Learner
from tessera.training.tracking import Tracker

_NETWORK = "network."


class Preview:
    """Grids of samples from the first average, always of the same seeds: previews/<images>.png.

    Conditional models show class after class, one in each column as far as there are columns;
    models that enlarge images enlarge the small images `low_res`.
    """

    def __init__(
        self,
        recipe: Recipe,
        class_names: Sequence[str] | None,
        run_dir: Path,
        trackers: Sequence[Tracker],
        low_res: NDArray[np.uint8] | None = None,
    ) -> None:
        self._recipe, self._class_names = recipe, class_names
        self._folder, self._trackers = run_dir / "previews", trackers
        self._low_res = low_res
        self._codec: Codec | None = build_codec(recipe.codec)

    def make(self, learner: Learner, images_seen: int) -> None:
        """Sample and write a grid; all processes take part, the main one samples."""
        config = self._recipe.run.preview
        pipeline = ema_pipeline(self._recipe, learner, images_seen, self._class_names)
        if pipeline is None or config is None or not self._decodes():
            return
        assert self._codec is not None
        pipeline.codec = self._codec
        count, classes = config.rows * config.columns, self._recipe.data.num_classes
        labels = [i % config.columns % classes for i in range(count)] if classes else None
        images = pipeline.to(learner.device).sample(range(count), labels, low_res=self._low_res)
        picture = grid(images, columns=config.columns)
        save_png(self._folder / f"{images_seen:012d}.png", picture)
        for tracker in self._trackers:
            tracker.picture("samples", picture, images_seen)

    def _decodes(self) -> bool:
        """Whether samples can be made visible; if not, that is said once and training goes on."""
        if self._codec is None:
            return False
        try:
            self._codec.prepare()
        except TesseraError as error:
            self._codec = None
            warnings.warn(f"no previews will be made: {error}", stacklevel=3)
            return False
        return True


def ema_pipeline(
    recipe: Recipe,
    learner: Learner,
    images_seen: int,
    class_names: Sequence[str] | None,
    *,
    everywhere: bool = False,
) -> Pipeline | None:
    """The model with averaged weights, which all processes must ask for.

    None but on the main process, unless it is wanted `everywhere`.
    """
    states = [learner.average(index) for index in range(len(recipe.ema))]
    if not (everywhere or distributed.is_main()):
        return None
    denoiser = build_denoiser(recipe)
    denoiser.load_state_dict(states[0])
    others = [
        {
            n.removeprefix(_NETWORK): t.to("cpu", copy=True)  # the average itself goes on
            for n, t in state.items()
            if n.startswith(_NETWORK)
        }
        for state in states[1:]
    ]
    return Pipeline.from_denoiser(
        recipe,
        denoiser,
        images_seen=images_seen,
        class_names=class_names,
        other_emas=others,
    )

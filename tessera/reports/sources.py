"""What a report looks at: the model, the log of its run, its training images and held-out ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.data.codec import Codec
from tessera.data.dataset import Dataset
from tessera.errors import DataError, TesseraError
from tessera.files import user_path
from tessera.metrics.reference import Reference, find_reference, has_classifier, load_reference
from tessera.pipelines.base import Pipeline
from tessera.pipelines.experts import ExpertsPipeline
from tessera.pipelines.loading import load
from tessera.pipelines.relay import RelayPipeline
from tessera.recipes.datasets import open_training_set, open_validation_set
from tessera.recipes.parts import Parts
from tessera.recipes.schema import Recipe
from tessera.training.run_folder import RECIPE
from tessera.training.tracking import Metrics, read_metrics

_AT_ONCE = 64


class _NoNoise:
    """Draws that are zero: of a latent, its mean."""

    def __init__(self, count: int) -> None:
        self._count = count

    @property
    def band(self) -> int | None:
        return None

    def normal(self, purpose: str, *shape: int) -> Tensor:
        return torch.zeros(self._count, *shape)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        raise NotImplementedError

    def integers(self, purpose: str, high: int, *shape: int) -> Tensor:
        raise NotImplementedError

    def step(self, purpose: str) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class ImageSource:
    """The images of a data set, or those that its latents stand for.

    Attributes:
        dataset: as it is trained on, without mirrored copies.
        codec: of its latents.
        device: where they are decoded.
    """

    dataset: Dataset
    codec: Codec
    device: torch.device

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """The class of each image, int64 [N]; of one-hot vectors, too."""
        labels = self.dataset.labels
        if labels is None or labels.ndim == 1:
            return labels
        classes: NDArray[np.int64] = labels.argmax(axis=1).astype(np.int64)
        return classes

    def space(self, rows: NDArray[np.int64]) -> Tensor:
        """What a model of them sees: uint8 pixels, or the means of latents; [n, C, H, W]."""
        read = torch.from_numpy(self.dataset.read(rows))
        return self.codec.train(read, _NoNoise(len(rows)))

    def pictures(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images, uint8 [n, H, W, C]."""
        parts = [self.space(part) for part in np.split(rows, range(_AT_ONCE, len(rows), _AT_ONCE))]
        shown = [
            part if part.dtype == torch.uint8 else self.codec.decode(part.to(self.device)).cpu()
            for part in parts
        ]
        return torch.cat(shown).permute(0, 2, 3, 1).contiguous().numpy()


@dataclass
class Subject:
    """What a report is about.

    Attributes:
        name: as the user calls it, for commands.
        run_dir: of the run; None for a pipeline that has none.
        pipeline: with the default average.
        recipe: the pipeline's, with the images that were found.
        metrics: the lines of the run's log.
        training, held_out: images trained on, and those that were not; None where there are none.
        parts: of the caller.
        missing: what cannot be shown, and why.
    """

    name: str
    run_dir: Path | None
    pipeline: Pipeline
    recipe: Recipe
    metrics: list[Metrics]
    training: ImageSource | None
    held_out: ImageSource | None
    parts: Parts
    missing: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pipeline.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that are made."""
        return self.pipeline.codec.image_shape(self.pipeline.model.shape)

    def models(self) -> list[tuple[str, Pipeline]]:
        """What was trained, by name: stages and experts one by one; "" where there is one only."""
        if isinstance(self.pipeline, RelayPipeline):
            return list(zip(self.pipeline.names, self.pipeline.pipes, strict=True))
        if isinstance(self.pipeline, ExpertsPipeline):
            return [(f"expert {i}", pipe) for i, pipe in enumerate(self.pipeline.pipes)]
        return [("", self.pipeline)]

    def of_stage(self, pipe: Pipeline) -> Subject:
        """The same of one of several models, with the images as it was trained on them."""
        data = self.recipe.data
        recipe = with_images(pipe.recipe, data.path, data.validation)
        own = replace(self, pipeline=pipe, recipe=recipe, training=None, held_out=None, missing=[])
        _open_images(own, named=True)
        return own


def open_subject(
    run: str | Path,
    *,
    data: str | Path | None,
    held_out: str | Path | None,
    dataset: Dataset | None,
    device: str | torch.device | None,
    parts: Parts,
) -> Subject:
    """Open a run or pipeline and its images.

    Args: see `write_report`.

    Raises:
        TesseraError: there is no such run or pipeline, or images that were named do not fit it.
    """
    if dataset is not None:
        given = dataset
        parts = replace(parts, dataset=lambda recipe: given)
    pipeline = load(run, device=device, parts=parts)
    place = user_path(run)
    run_dir = place if (place / RECIPE).is_file() else None
    subject = Subject(
        str(run), run_dir, pipeline, with_images(pipeline.recipe, data, held_out),
        [] if run_dir is None else read_metrics(run_dir), None, None, parts,
    )  # fmt: skip
    _open_images(subject, named=data is not None)
    return subject


def with_images(recipe: Recipe, data: str | Path | None, held_out: str | Path | None) -> Recipe:
    """A recipe whose images are elsewhere; read as they are, not mirrored, not kept in memory."""
    named = {"path": data, "validation": held_out}
    update = {key: str(user_path(path)) for key, path in named.items() if path is not None}
    section = recipe.data.model_copy(update={"xflip": False, "cache": False, **update})
    return recipe.model_copy(update={"data": section})


def _open_images(subject: Subject, *, named: bool) -> None:
    """Open the training images and those held out, or note why there are none."""
    recipe, path = subject.recipe, subject.recipe.data.path
    if subject.parts.dataset is None and not named and (path is None or not Path(path).exists()):
        where = "names none" if path is None else f"names {path}, and there is nothing"
        subject.missing.append(
            f"Real images, distances and the search for copies: the recipe {where}. Say where the "
            "training images are: --data IMAGES."
        )
        return
    codec, device = subject.pipeline.codec, subject.device
    training = open_training_set(recipe, subject.parts)
    subject.training = ImageSource(training, codec, device)
    held_out = open_validation_set(recipe, subject.parts)
    if held_out is not None:
        subject.held_out = ImageSource(held_out, codec, device)


@dataclass(frozen=True)
class Judge:
    """A reference with its classifier, and the file that it is from."""

    path: Path
    reference: Reference


def find_judge(subject: Subject, given: str | Path | None) -> Judge | None:
    """The in-domain classifier that was named or lies in the run folder or beside the images.

    Without one, that is noted. Nothing is trained.

    Raises:
        DataError: the file that was named holds none, or one of other images.
    """
    shape = subject.image_shape
    if given is not None:
        reference = load_reference(given, subject.device)
        if reference.extractor.facts.shape != shape:
            raise DataError(
                f"{given}: its classifier knows images of {reference.extractor.facts.shape} "
                f"(channels, height, width), and the model makes {shape}"
            )
        return Judge(user_path(given), reference)
    for path in _references(subject):
        try:
            reference = load_reference(path, subject.device)
        except TesseraError:
            continue  # a damaged file that nobody named
        if reference.extractor.facts.shape == shape:
            return Judge(path, reference)
    pixels = subject.recipe.codec.of_pixels
    data = (subject.recipe.data.path if pixels else None) or "IMAGES"
    subject.missing.append(
        "Distances that know what is in the pictures: they need a classifier of such images, and "
        "none lies beside them. Make one and write the report again: "
        f"tessera eval reference {data} NAME.ref.npz, then --reference NAME.ref.npz."
    )
    return None


def _references(subject: Subject) -> list[Path]:
    found = sorted(subject.run_dir.glob("evaluation-*.ref.npz")) if subject.run_dir else []
    found = [path for path in found if has_classifier(path)]
    path = subject.recipe.data.path
    beside = find_reference(path) if path is not None and subject.recipe.data.shrink == 1 else None
    return [*found, *([beside] if beside else [])]

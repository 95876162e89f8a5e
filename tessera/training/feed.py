"""From a recipe's data section to micro-batches: images, conditioning and their random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tessera import distributed
from tessera.conditioning import Conditioning
from tessera.data.codec import Codec
from tessera.data.dataset import Dataset, choose_subset
from tessera.data.loader import Batch, Loader, StepPlan
from tessera.data.order import EpochOrder, Order, WindowedOrder
from tessera.errors import RecipeError
from tessera.images import from_uint8, to_uint8
from tessera.pipelines.plans import Pictures
from tessera.randomness import AddressedDraws, Draws, derive_seed
from tessera.recipes.build import build_augment, build_training_codec, build_view
from tessera.recipes.datasets import open_training_set
from tessera.recipes.parts import NO_PARTS, Parts
from tessera.recipes.schema import Recipe
from tessera.training.learner import MicroBatch
from tessera.training.stopwatch import Stopwatch

_AT_ONCE = 256
"""Images that are read at once beside the steps."""

_EXAMPLES, _EXAMPLE_VALUES = 10_000, 2**28
"""Images that are looked at before the first step, and their numbers, at most."""

Augment = Callable[[Tensor, Draws], tuple[Tensor, Tensor]]


class Feed:
    """The training images of a recipe, in the order of the run, as the learner wants them.

    Attributes:
        dataset: images, or latents.
        view: what of them is trained on.
        codec: between what the data set holds and model space.

    Raises:
        RecipeError: the images do not fit the recipe, or the batch not the processes; the message
            names the key.
        CheckpointError: the autoencoder that encodes the images cannot be had.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        parts: Parts = NO_PARTS,
        dataset: Dataset | None = None,
        codec: Codec | None = None,
    ) -> None:
        """Args:
        parts: functions that make external parts.
        dataset: in place of the recipe's, unchecked.
        codec: that of another feed of the same codec section, to share its autoencoder.
        """
        self._recipe, self._device = recipe, device
        self.dataset = open_training_set(recipe, parts) if dataset is None else dataset
        _check_batch(recipe)
        self.codec = build_training_codec(recipe) if codec is None else codec
        if recipe.codec.takes_images:
            self.codec.prepare()
        self._encoding = Stopwatch(device)
        self.view = build_view(recipe, parts)
        self._augment: Augment | None = build_augment(recipe.augment)
        seed = derive_seed(recipe.training.seed, "order")
        orders: dict[str, Callable[[int, int], Order]] = {
            "epochs": EpochOrder,
            "windowed": WindowedOrder,
        }
        self._order = orders[recipe.data.order](len(self.dataset), seed)

    def batches(self, images_seen: int) -> Loader:
        """This process's batches of the steps that follow after `images_seen` images."""
        self._encoding.lap()
        return self.load(self._plans(images_seen))

    def load(self, plans: Iterable[StepPlan]) -> Loader:
        """This process's batches of some steps."""
        return Loader(
            self.dataset,
            self._order,
            plans,
            rank=distributed.rank(),
            world=distributed.world(),
            device=self._device,
            workers=self._recipe.data.workers,
            use_labels=self._recipe.data.num_classes > 0,
        )

    def _plans(self, images_seen: int) -> Iterator[StepPlan]:
        while images_seen < self._recipe.training.images:
            plan = self.view.plan(images_seen)
            yield plan
            images_seen += plan.images

    def micro_batches(self, batch: Batch) -> Iterator[MicroBatch]:
        """The rounds of a step: of `training.micro_batch` images, or as many more as a step of
        small patches has more images than others, so that it takes no more rounds."""
        training = self._recipe.training
        count = len(batch.numbers)
        size = count
        if training.micro_batch is not None:
            size = training.micro_batch * batch.plan.images // training.batch
        first = batch.plan.first_image + distributed.rank() * count
        for start in range(0, count, size):
            rows = slice(start, start + size)
            draws = AddressedDraws(
                training.seed, batch.numbers[rows], batch.plan.first_image, batch.plan.band
            )
            images, augment = batch.images[rows], None
            if self._augment is not None:
                # Whole images are augmented: what the network is told about it then holds for them.
                images, augment = self._augment(from_uint8(images), draws)
            with self._encoding.running():
                x = self.codec.train(images, draws)
            x, coords = self.view.apply(x, draws, batch.plan)
            x = from_uint8(x) if x.dtype == torch.uint8 else x
            labels = None if batch.labels is None else batch.labels[rows]
            seed = derive_seed(training.seed, "dropout", first + start)
            weight = self.view.loss_weight(batch.plan)
            image = self._start(x) if self._recipe.low_resolution else None
            cond = Conditioning(labels, augment, coords, image)
            yield MicroBatch(x, cond, draws, seed, weight)

    def reports(self, seconds: float) -> dict[str, float]:
        """What of `seconds`, the time since the last call or since `batches`, went into encoding.

        "encoder_share" where there is an autoencoder in the step; waits for the device.
        """
        encoding = self._encoding.lap()
        if self._recipe.codec.of_pixels or not self._recipe.codec.takes_images:
            return {}
        return {"encoder_share": min(encoding / max(seconds, 1e-9), 1.0)}

    def start_pictures(self, count: int) -> Pictures | None:
        """What a model starts from, of the first images: uint8 [N, h, w, C], or latents.

        None for models that start from noise, and where none are wanted.
        """
        if self._recipe.start_shape is None or not count:
            return None
        numbers = np.arange(min(count, len(self.dataset)))
        parts = [self._start_of(part) for part in np.split(numbers, numbers[_AT_ONCE::_AT_ONCE])]
        pictures = torch.cat(parts)
        if not self._recipe.codec.of_pixels:
            return pictures
        return pictures.permute(0, 2, 3, 1).contiguous().numpy()

    def examples(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Some of the images, each once and whole, in model space, and their classes: in batches.

        The same for every seed and process.
        """
        most = max(_EXAMPLE_VALUES // math.prod(self._recipe.shape), _AT_ONCE)
        rows = choose_subset(len(self.dataset), min(most, _EXAMPLES), seed=0)
        labels = self.dataset.labels if self._recipe.data.num_classes else None
        for part in np.split(rows, range(_AT_ONCE, len(rows), _AT_ONCE)):
            classes = None if labels is None else torch.from_numpy(labels[part])
            yield self._model_space(part), classes

    def _start_of(self, numbers: NDArray[np.int64]) -> Tensor:
        """What a model starts from, of the images of these numbers, of pixels as uint8."""
        start = self._start(self._model_space(numbers))
        assert start is not None
        return to_uint8(start) if self._recipe.codec.of_pixels else start

    def _model_space(self, numbers: NDArray[np.int64]) -> Tensor:
        """The images of these numbers as the model is trained on them, on the CPU."""
        rows, images = torch.from_numpy(numbers), torch.from_numpy(self.dataset.read(numbers))
        draws = AddressedDraws(self._recipe.training.seed, rows.to(self._device))
        x = self.codec.train(images.to(self._device), draws).cpu()
        return from_uint8(x) if x.dtype == torch.uint8 else x

    def _start(self, x: Tensor) -> Tensor | None:
        """The pictures that a model starts from: x [B, C, H, W] with averaged pixels."""
        shape = self._recipe.start_shape
        return None if shape is None else F.adaptive_avg_pool2d(x, shape[1:])


def _check_batch(recipe: Recipe) -> None:
    if recipe.training.batch % distributed.world():
        raise RecipeError(
            f"training.batch ({recipe.training.batch}) must be a multiple of the number of "
            f"processes ({distributed.world()})"
        )

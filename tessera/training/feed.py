"""From a recipe's data section to micro-batches: images, conditioning and their random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tessera import distributed
from tessera.conditioning import Conditioning
from tessera.data.dataset import open_dataset
from tessera.data.latents import (
    Dataset,
    LatentDataset,
    is_latents,
    open_latents,
    sample_posterior,
)
from tessera.data.loader import Batch, Loader, StepPlan
from tessera.data.order import EpochOrder, Order, WindowedOrder
from tessera.errors import RecipeError
from tessera.images import from_uint8, to_uint8
from tessera.randomness import AddressedDraws, Draws, derive_seed
from tessera.recipes.build import build_augment, build_view
from tessera.recipes.schema import Recipe, VaeCodec
from tessera.training.learner import MicroBatch

Augment = Callable[[Tensor, Draws], tuple[Tensor, Tensor]]


class Feed:
    """The training images of a recipe, in the order of the run, as the learner wants them.

    Args:
        dataset: instead of the recipe's own, and not compared with it.

    Raises:
        RecipeError: the images do not fit the recipe, or the batch not the processes; the message
            names the key.
    """

    def __init__(
        self, recipe: Recipe, device: torch.device, dataset: Dataset | None = None
    ) -> None:
        self._recipe, self._device = recipe, device
        if dataset is None:
            dataset = _open(recipe)
            _check(recipe, dataset)
        self.dataset = dataset
        self.view = build_view(recipe)
        self._augment: Augment | None = build_augment(recipe.augment)
        seed = derive_seed(recipe.training.seed, "order")
        orders: dict[str, Callable[[int, int], Order]] = {
            "epochs": EpochOrder,
            "windowed": WindowedOrder,
        }
        self._order = orders[recipe.data.order](len(self.dataset), seed)

    def batches(self, images_seen: int) -> Loader:
        """This process's batches of the steps that follow after `images_seen` images."""
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
        size = (training.micro_batch or count) * batch.plan.images // training.batch
        first = batch.plan.first_image + distributed.rank() * count
        for start in range(0, count, size):
            rows = slice(start, start + size)
            draws = AddressedDraws(training.seed, batch.numbers[rows])
            images, augment = batch.images[rows], None
            if self._augment is not None:
                # Whole images are augmented: what the network is told about it then holds for them.
                images, augment = self._augment(from_uint8(images), draws)
            if isinstance(self._recipe.codec, VaeCodec):
                codec = self._recipe.codec
                images = sample_posterior(images, draws, codec.scale, codec.shift)
            x, coords = self.view.apply(images, draws, batch.plan)
            if x.dtype == torch.uint8:
                x = from_uint8(x)
            labels = None if batch.labels is None else batch.labels[rows]
            seed = derive_seed(training.seed, "dropout", first + start)
            weight = self.view.loss_weight(batch.plan)
            yield MicroBatch(
                x, Conditioning(labels, augment, coords, self._reduced(x)), draws, seed, weight
            )

    def small_images(self, count: int) -> NDArray[np.uint8] | None:
        """The first images as a network that enlarges images gets them, uint8 [N, h, w, C]."""
        if self._recipe.low_resolution is None:
            return None
        first = torch.from_numpy(self.dataset.read(np.arange(min(count, len(self.dataset)))))
        small = self._reduced(from_uint8(first))
        return None if small is None else to_uint8(small).permute(0, 2, 3, 1).numpy()

    def _reduced(self, x: Tensor) -> Tensor | None:
        """What a network that enlarges images is told: x [B, C, H, W] with averaged pixels."""
        side = self._recipe.low_resolution
        return None if side is None else F.adaptive_avg_pool2d(x, side)


def _open(recipe: Recipe) -> Dataset:
    if recipe.data.path is None:
        raise RecipeError(
            "data.path is not set: give the images to train on, for example data.path=photos.zip"
        )
    path, max_images, xflip = recipe.data.path, recipe.data.max_images, recipe.data.xflip
    if not Path(path).exists():
        raise RecipeError(
            f"data.path: there is nothing at {path} (seen from {Path.cwd()}). Say where the images "
            "are with data.path=...; a run that is resumed takes it too"
        )
    seed = derive_seed(recipe.training.seed, "subset")
    if not isinstance(recipe.codec, VaeCodec):
        if is_latents(path):
            raise RecipeError(
                f"{path} holds latents, but the recipe trains on pixels. Use a recipe with "
                "codec.kind=vae, or give data.path the images"
            )
        return open_dataset(
            path, max_images=max_images, seed=seed, xflip=xflip, cache=recipe.data.cache
        )
    if not is_latents(path):
        raise RecipeError(
            f"{path} holds no latents, but the recipe trains on those (codec.kind=vae). Encode the "
            f"images once: tessera data latents {path} LATENTS.safetensors --vae "
            f"{recipe.codec.model}"
        )
    return open_latents(path, max_images=max_images, seed=seed, xflip=xflip)


def _check(recipe: Recipe, dataset: Dataset) -> None:
    """Compare the data with the recipe; every difference is named."""
    data, problems, remedy = (
        recipe.data,
        list[str](),
        "convert the images with: tessera data convert",
    )
    if isinstance(dataset, LatentDataset):
        problems += _latent_problems(recipe, dataset)
        remedy = "make the latents anew with: tessera data latents"
        shape: tuple[int, int, int] = (data.channels, data.resolution, data.resolution)
    else:
        shape = dataset.shape
    channels, height, width = shape
    if height != width:
        problems.append(f"its images are {width}x{height} pixels; they must be square")
    elif height != data.resolution:
        problems.append(
            f"its images are {width}x{height} pixels, but data.resolution is {data.resolution}"
        )
    if channels != data.channels:
        problems.append(
            f"its images have {channels} channel{'s' if channels > 1 else ''}, "
            f"but data.channels is {data.channels}"
        )
    if data.num_classes and dataset.num_classes != data.num_classes:
        found = f"{dataset.num_classes} classes" if dataset.num_classes else "no labels"
        problems.append(
            f"it has {found}, but data.num_classes is {data.num_classes} (0 trains without labels)"
        )
    if problems:
        raise RecipeError(
            f"{data.path} does not fit the recipe:\n  "
            + "\n  ".join(problems)
            + f"\nChange those keys, or {remedy}"
        )
    if recipe.training.batch % distributed.world():
        raise RecipeError(
            f"training.batch ({recipe.training.batch}) must be a multiple of the number of "
            f"processes ({distributed.world()})"
        )


def _latent_problems(recipe: Recipe, dataset: LatentDataset) -> list[str]:
    """What a set of latents was made with, other than the recipe says."""
    assert isinstance(recipe.codec, VaeCodec)
    info, codec = dataset.info, recipe.codec
    pairs = (
        ("data.resolution", info.resolution, recipe.data.resolution),
        ("codec.channels", dataset.shape[0], codec.channels),
        ("codec.downsample", info.downsample, codec.downsample),
        ("codec.scale", info.scale, codec.scale),
        ("codec.shift", info.shift, codec.shift),
    )
    return [
        f"it was made with {key}={found:g} (VAE {info.vae}), but the recipe has {wanted:g}"
        for key, found, wanted in pairs
        if not math.isclose(found, wanted, rel_tol=1e-6)
    ]

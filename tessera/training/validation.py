"""The loss of the averaged weights on images that are not trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tessera import distributed
from tessera.data.dataset import Dataset
from tessera.data.loader import StepPlan
from tessera.errors import RecipeError
from tessera.randomness import derive_seed
from tessera.recipes.datasets import open_validation_set
from tessera.recipes.parts import NO_PARTS, Parts
from tessera.recipes.schema import FullViewConfig, Recipe
from tessera.training.feed import Feed
from tessera.training.learner import Learner
from tessera.training.preview import averaged_model
from tessera.training.tracking import Metrics, Tracker, finite, sums_and_counts


@dataclass(frozen=True)
class ValidationImages:
    """What the loss is measured on, always the same.

    Attributes:
        feed: of whole images that are not augmented.
        count: images of it that are used.
    """

    feed: Feed
    count: int

    def plans(self) -> Iterator[StepPlan]:
        """Batches; the last may go beyond the images, so that all processes have a share."""
        batch, world = self.feed.view.batch, distributed.world()
        for first in range(0, self.count, batch):
            left = min(batch, self.count - first)
            yield StepPlan(first, -(-left // world) * world)


def validation_images(
    recipe: Recipe, device: torch.device, training: Dataset, parts: Parts = NO_PARTS
) -> ValidationImages | None:
    """The images that a recipe measures the loss on; None if it wants none.

    Their noise levels, noise and latents are addressed by a seed of their own, which does not
    change in a run, so that the curve shows the weights and no chance.

    Args:
        device: where they are wanted.
        training: the data set that is trained on.
        parts: functions that make external parts.

    Raises:
        RecipeError: they do not fit the recipe or the training set; the message names the key.
    """
    dataset = open_validation_set(recipe, parts)
    if dataset is None:
        return None
    _check_classes(recipe, dataset, training)
    return whole_images(recipe, device, dataset, parts, recipe.validation.images)


def whole_images(
    recipe: Recipe, device: torch.device, dataset: Dataset, parts: Parts, most: int
) -> ValidationImages:
    """Up to `most` images of a set, as a recipe's loss is measured on them.

    Args:
        dataset: not compared with the recipe.
    """
    world = distributed.world()
    at_once = recipe.training.micro_batch or recipe.training.batch // world
    changes = {
        "seed": derive_seed(recipe.training.seed, "validation"),
        "batch": at_once * world,
        "micro_batch": None,
    }
    plain = recipe.model_copy(
        update={
            "training": recipe.training.model_copy(update=changes),
            "data": recipe.data.model_copy(update={"order": "epochs"}),
            "view": FullViewConfig(),
            "augment": None,
        }
    )
    return ValidationImages(Feed(plain, device, parts, dataset), min(most, len(dataset)))


def _check_classes(recipe: Recipe, dataset: Dataset, training: Dataset) -> None:
    """Numbers of classes mean the same in both sets, as far as their names tell."""
    names, known = dataset.class_names, training.class_names
    if not recipe.data.num_classes or names is None or known is None:
        return
    if tuple(names) != tuple(known)[: len(names)]:
        first = next(i for i, name in enumerate(names) if name != known[i])
        raise RecipeError(
            f"data.validation: class {first} of {recipe.data.validation} is {names[first]!r}, but "
            f"{known[first]!r} of the training images. Give both sets the same classes"
        )


class Validation:
    """Measures the objective's terms with the first average, by quarters of the noise levels, too.

    What they are called in the log begins with `validation/`.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: ValidationImages,
        trackers: Sequence[Tracker],
        parts: Parts = NO_PARTS,
    ) -> None:
        self._recipe, self._images = recipe, images
        self._trackers, self._parts = trackers, parts

    def make(self, learner: Learner, images_seen: int) -> Metrics:
        """Measure and log; all processes take part, with the same result."""
        model = averaged_model(self._recipe, learner, self._parts)
        # Apple's GPUs have no float64.
        dtype = torch.float32 if learner.device.type == "mps" else torch.float64
        sums: dict[str, tuple[float, float]] = {}
        with self._images.feed.load(self._images.plans()) as loader:
            for batch in loader:
                counted = batch.numbers < self._images.count
                for micro in self._images.feed.micro_batches(batch):
                    terms, quartiles = learner.evaluate(model, micro, counted)
                    values = torch.stack(list(terms.values())).to(dtype)
                    names, pairs = sums_and_counts(terms, values, int(counted.sum()), quartiles)
                    _add(sums, dict(zip(names, pairs.tolist(), strict=True)))
        totals: dict[str, tuple[float, float]] = {}
        for part in distributed.gather(sums):
            _add(totals, part)
        result: Metrics = {
            f"validation/{name}": finite(total / count) if count else None
            for name, (total, count) in totals.items()
        }
        for tracker in self._trackers:
            tracker.log({"images": images_seen, **result})
        return result


def _add(totals: dict[str, tuple[float, float]], values: dict[str, tuple[float, float]]) -> None:
    for name, (value, count) in values.items():
        before = totals.get(name, (0.0, 0.0))
        totals[name] = before[0] + value, before[1] + count

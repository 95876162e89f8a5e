"""Losses of a run: as it was logged, and by quarters of the noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tessera.pipelines.base import Pipeline
from tessera.precision import autocast, resolve
from tessera.recipes.build import recipe_objective
from tessera.recipes.parts import Parts
from tessera.recipes.schema import Recipe
from tessera.reports.charts import Series
from tessera.reports.sources import ImageSource
from tessera.training.tracking import Metrics
from tessera.training.validation import whole_images

QUARTERS = ("least noise", "less", "more", "most noise")
_KINDS = "abcd"


@dataclass(frozen=True)
class Quartiles:
    """Mean loss per pixel of images by the quarter of the noise levels that they got.

    Attributes:
        name: of the model among several; "" for one.
        of: which images.
        images: number of them.
        mean: of all.
        values: from the cleanest quarter to the noisiest; empty where the objective tells none,
            None for a quarter without images.
    """

    name: str
    of: str
    images: int | None
    mean: float
    values: tuple[float | None, ...]


def logged(metrics: Sequence[Metrics], name: str) -> list[tuple[float, float]]:
    """(images seen, value) of the lines of a log that have it."""
    found = ((line["images"], line.get(name)) for line in metrics)
    return [(float(x), float(y)) for x, y in found if x is not None and y is not None]


def curves(metrics: Sequence[Metrics]) -> list[Series]:
    """The loss per pixel of the training and, where it was measured, of held-out images."""
    both = (("training", "loss_per_pixel", "a"), ("held-out", "validation/loss_per_pixel", "b"))
    series = [Series(title, logged(metrics, name), kind) for title, name, kind in both]
    return [one for one in series if one.points]


def quarter_curves(metrics: Sequence[Metrics]) -> list[Series]:
    """The training's loss per pixel by quarters of the noise levels; [] where none was logged."""
    series = []
    for quarter, (title, kind) in enumerate(zip(QUARTERS, _KINDS, strict=True)):
        points = [
            (float(line["images"] or 0), value)
            for line in metrics
            if (value := _per_pixel(line, f"loss_q{quarter}")) is not None
        ]
        series.append(Series(title, points, kind))
    return [one for one in series if len(one.points) > 1]


def last_quartiles(metrics: Sequence[Metrics], prefix: str = "") -> Quartiles | None:
    """Of the last line of the log that has them; `prefix` is "validation/" of held-out images."""
    for line in reversed(metrics):
        values = tuple(_per_pixel(line, f"{prefix}loss_q{q}", prefix) for q in range(4))
        mean = line.get(f"{prefix}loss_per_pixel")
        if mean is not None and any(value is not None for value in values):
            of = "held-out images" if prefix else "training, last in the log"
            return Quartiles("", of, None, float(mean), values)
    return None


def _per_pixel(line: Metrics, name: str, prefix: str = "") -> float | None:
    """A loss of a line, per pixel."""
    value, loss = line.get(name), line.get(f"{prefix}loss")
    mean = line.get(f"{prefix}loss_per_pixel")
    if value is None or mean is None or not loss:
        return None
    return value * mean / loss


def measure_quartiles(
    name: str, pipe: Pipeline, recipe: Recipe, images: ImageSource, of: str, most: int, parts: Parts
) -> Quartiles:
    """Measure the objective of a model on up to `most` images, with the same draws each time.

    Args:
        name, of: see `Quartiles`.
        recipe: that it was trained by.
        images: as the recipe trains on them.
        parts: of the caller.
    """
    device = pipe.device
    feed = whole_images(recipe, device, images.dataset, parts, most)
    objective = recipe_objective(recipe, parts)
    model, precision = pipe.model.eval(), resolve(recipe.training.precision, device)
    sums, counts = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    total, told = 0.0, False
    with feed.feed.load(feed.plans()) as loader, torch.no_grad():
        for batch in loader:
            counted = (batch.numbers < feed.count).cpu()
            for micro in feed.feed.micro_batches(batch):
                with autocast(device, precision):
                    terms = objective(model, micro.x, micro.cond, micro.draws)
                per_pixel = terms.get("loss_per_pixel", terms["loss"] / micro.x[0].numel())
                values = per_pixel.detach().cpu().double()[counted]
                total += float(values.sum())
                if "quartile" in terms:
                    told = True
                    quartile = terms["quartile"].cpu()[counted]
                    sums.index_add_(0, quartile, values)
                    counts += torch.bincount(quartile, minlength=4)
    quarters = tuple(
        float(s / n) if n else None for s, n in zip(sums.tolist(), counts.tolist(), strict=True)
    )
    return Quartiles(name, of, feed.count, total / feed.count, quarters if told else ())

"""A pipeline's samples as a stream of images, for scores that leave no files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.metrics.measure import ImageStream, made_images, share_of_rows
from tessera.pipelines.base import Pipeline


def is_pipeline(path: Path) -> bool:
    """Whether a folder is a pipeline's, or a run's, whose previews are no samples."""
    marks = ("config.json", "pipeline/config.json", "recipe.yaml")
    return any((path / mark).is_file() for mark in marks)


def sample_stream(
    pipeline: Pipeline, total: int, name: str, *, seed: int = 0, batch: int = 64, **options: Any
) -> ImageStream:
    """The samples of `total` seeds from `seed` on with their classes, made as they are asked for.

    Args:
        batch: images made at once.
        options: of sampling.
    """
    seeds = [seed + int(row) for row in share_of_rows(total)]

    def made() -> Iterator[tuple[Tensor, Tensor | None]]:
        for part in pipeline.sample_batches(seeds, batch=batch, **options):
            labels = None if part.labels is None else torch.from_numpy(part.labels)
            yield torch.from_numpy(part.images).permute(0, 3, 1, 2), labels

    return made_images(made(), total, name)

"""A pipeline's samples as a stream of images, for scores that leave no files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.files import is_hub_id
from tessera.metrics.measure import ImageStream, made_images, share_of_rows
from tessera.pipelines.base import Pipeline


def is_pipeline(path: Path) -> bool:
    """Whether a folder is a pipeline's, or a run's, whose previews are no samples; or a hub id.

    An id with an ending is one only with its revision, `user/name.v2@main`; else it is a file.
    """
    if is_hub_id(path) and not path.exists():
        return "@" in str(path) or not path.suffix
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

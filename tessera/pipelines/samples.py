"""Finished images with their seeds and classes, which a notebook shows as a grid."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tessera.images import grid, png_bytes, save_png, to_pil
from tessera.pipelines.plan import SampledBatch


@dataclass(frozen=True)
class Samples:
    """What `Pipeline.sample(..., output="samples")` gives.

    Attributes:
        images: uint8 [N, H, W, C].
        seeds: one per image.
        labels: int64 [N] class indices; None for models without classes.
        class_names: one for each class, or None.

    Example:
        >>> from tessera.pipelines.samples import Samples
        >>> samples = Samples(np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 2, 3])
        >>> len(samples), samples.grid().shape, samples[1].size
        (4, (130, 130, 3), (8, 8))
    """

    images: NDArray[np.uint8]
    seeds: Sequence[int]
    labels: NDArray[np.int64] | None = None
    class_names: Sequence[str] | None = None

    @classmethod
    def of(cls, batches: Iterable[SampledBatch], names: Sequence[str] | None = None) -> Samples:
        """Those of at least one batch, in their order."""
        made = list(batches)
        labels = [batch.labels for batch in made if batch.labels is not None]
        return cls(
            np.concatenate([batch.images for batch in made]),
            [seed for batch in made for seed in batch.seeds],
            np.concatenate(labels) if labels else None,
            names,
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Image.Image:
        return to_pil(self.images[index])

    def __iter__(self) -> Iterator[Image.Image]:
        return (to_pil(image) for image in self.images)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.images, dtype, copy=True if copy is None else copy)

    def __repr__(self) -> str:
        height, width, channels = self.images.shape[1:]
        many = "channel" if channels == 1 else "channels"
        return f"{len(self)} samples of {width}x{height}, {channels} {many}, seeds {_span(self)}"

    def name(self, index: int) -> str:
        """Seed and class of an image, for people."""
        text = f"seed {self.seeds[index]}"
        if self.labels is None:
            return text
        label = int(self.labels[index])
        if label < 0:
            return f"{text}, no class"
        return f"{text}, {self.class_names[label] if self.class_names else f'class {label}'}"

    def grid(self, columns: int | None = None) -> NDArray[np.uint8]:
        """All images in one picture, uint8 [H', W', C]; as square as possible by default."""
        return grid(self.images, columns)

    def save(self, path: str, columns: int | None = None) -> None:
        """Write the grid as a PNG file."""
        save_png(path, self.grid(columns))

    def _repr_html_(self) -> str:
        cells = "".join(
            f'<img src="{_source(grid(image[None]))}" title="{html.escape(self.name(index))}"'
            ' style="margin:1px;display:inline-block;vertical-align:top">'
            for index, image in enumerate(self.images)
        )
        return f'<div style="max-width:820px;line-height:0">{cells}</div><small>{self!r}</small>'


def facts_html(title: str, facts: Mapping[str, str] | Iterable[tuple[str, str]]) -> str:
    """Names and values as a small table for a notebook."""
    pairs = facts.items() if isinstance(facts, Mapping) else facts
    rows = "".join(
        f'<tr><th style="text-align:left">{html.escape(name)}</th>'
        f'<td style="text-align:left">{html.escape(value)}</td></tr>'
        for name, value in pairs
    )
    return f"<table><caption>{html.escape(title)}</caption>{rows}</table>"


def _span(samples: Samples) -> str:
    seeds = [str(seed) for seed in samples.seeds]
    return ", ".join(seeds if len(seeds) <= 4 else [*seeds[:2], "...", seeds[-1]])


def _source(picture: NDArray[np.uint8]) -> str:
    return "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode()

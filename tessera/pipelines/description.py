"""A pipeline in a few lines, for people who print it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tessera.pipelines.options import shortened
from tessera.progress import quantity

if TYPE_CHECKING:
    from tessera.pipelines.pipeline import Pipeline


def description(pipe: Pipeline) -> str:
    """Kind, recipe, shape (C, H, W), classes, parameters, images seen, average and device."""
    names = f": {shortened(pipe.class_names)}" if pipe.class_names else ""
    rows = {
        "recipe": pipe.recipe.name,
        "shape": str(tuple(pipe.denoiser.shape)),
        "classes": f"{pipe.denoiser.num_classes or 'none'}{names}",
        "parameters": quantity(sum(p.numel() for p in pipe.denoiser.parameters())),
        "images seen": f"{pipe.images_seen:,}",
        "ema": pipe.ema,
        "device": str(pipe.device),
    }
    return "\n".join(
        [f"pipeline of kind {pipe.kind}", *(f"  {k:<12} {v}" for k, v in rows.items())]
    )

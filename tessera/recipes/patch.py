"""Patch Diffusion (Wang et al. 2023, "Patch Diffusion: Faster and More Data-Efficient Training").

The published experiments: EDM's networks, objective and sampler, trained on patches of a quarter,
a half and the whole of an image's side with probabilities 0.2, 0.3 and 0.5, without augmentation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tessera.recipes.edm import song_unet
from tessera.recipes.schema import (
    DataConfig,
    EdmSampler,
    OptimizerConfig,
    PatchView,
    Recipe,
    TrainingConfig,
)


def images64(name: str, title: str, dropout: float) -> Recipe:
    """DDPM++ at 64x64: batch 256 (1.9 times as much on average), 50 deterministic steps."""
    return Recipe(
        name=name,
        description=f"Patch Diffusion, {title}",
        data=DataConfig(resolution=64),
        view=PatchView(real_p=0.5),
        network=song_unet("vp", (1, 2, 2, 2), dropout),
        optimizer=OptimizerConfig(lr=2e-4),
        training=TrainingConfig(batch=256),
        sampling=EdmSampler(steps=50),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    name: partial(images64, name, title, dropout)
    for name, title, dropout in (
        ("patch-celeba64", "CelebA", 0.05),
        ("patch-ffhq64", "FFHQ", 0.05),
        # A smaller set: EDM's dropout for it.
        ("patch-afhqv2-64", "AFHQv2", 0.25),
    )
}

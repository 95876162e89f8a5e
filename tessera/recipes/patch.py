"""Patch Diffusion (Wang et al. 2023, "Patch Diffusion: Faster and More Data-Efficient Training").

The published experiments: EDM's networks, objective and sampler, trained on patches of a quarter,
a half and the whole of an image's side with probabilities 0.2, 0.3 and 0.5, without augmentation;
at 256x256 on the latents of Stable Diffusion's VAE, half and whole, each with probability 0.5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tessera.recipes.edm import song_unet
from tessera.recipes.schema import (
    AdmUNetConfig,
    DataConfig,
    EdmObjectiveConfig,
    EdmSamplerConfig,
    EmaConfig,
    OptimizerConfig,
    PatchViewConfig,
    PreviewConfig,
    Recipe,
    RunConfig,
    TrainingConfig,
    VaeCodecConfig,
)


def images64(name: str, title: str, dropout: float) -> Recipe:
    """DDPM++ at 64x64: batch 256 (1.9 times as much on average), 50 deterministic steps."""
    return Recipe(
        name=name,
        description=f"Patch Diffusion, {title}",
        data=DataConfig(resolution=64),
        view=PatchViewConfig(real_p=0.5),
        network=song_unet("vp", (1, 2, 2, 2), dropout),
        optimizer=OptimizerConfig(lr=2e-4),
        training=TrainingConfig(batch=256),
        sampling=EdmSamplerConfig(steps=50),
    )


def latents256(name: str, title: str, labels: bool) -> Recipe:
    """ADM on 32x32 latents in float16, 256 stochastic steps; with classes for guidance 1.3."""
    every = 10_000_000
    return Recipe(
        name=name,
        description=f"Patch Diffusion, {title}",
        data=DataConfig(resolution=256, num_classes=1000 if labels else 0),
        codec=VaeCodecConfig(),
        view=PatchViewConfig(real_p=0.5),
        network=AdmUNetConfig(),
        # The published command cannot drop labels, though its guidance needs a model that learned
        # to do without them.
        objective=EdmObjectiveConfig(label_dropout=0.1 if labels else 0),
        optimizer=OptimizerConfig(lr=1e-4),
        ema=(EmaConfig(halflife_images=50_000_000),),
        training=TrainingConfig(
            images=2_500_000_000 if labels else 200_000_000,
            batch=4096 if labels else 1024,
            micro_batch=32,
            loss_scale=100,
        ),
        sampling=EdmSamplerConfig(steps=256, s_churn=40, s_min=0.05, s_max=50, s_noise=1.003),
        run=RunConfig(
            log_every_images=200_000 if labels else 50_000,
            checkpoint_every_images=every,
            preview=PreviewConfig(every_images=every),
        ),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "patch-celeba64": partial(images64, "patch-celeba64", "CelebA", 0.05),
    "patch-ffhq64": partial(images64, "patch-ffhq64", "FFHQ", 0.05),
    # A smaller set: EDM's dropout for it.
    "patch-afhqv2-64": partial(images64, "patch-afhqv2-64", "AFHQv2", 0.25),
    "patch-lsun256-latent": partial(latents256, "patch-lsun256-latent", "LSUN-256", False),
    "patch-imagenet256-latent": partial(
        latents256, "patch-imagenet256-latent", "ImageNet-256", True
    ),
}

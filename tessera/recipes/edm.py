"""EDM (Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models").

The published experiments with their training and sampling settings. `vp` and `ve` name the
architecture (DDPM++, NCSN++); preconditioning and objective are EDM's in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from tessera.recipes.schema import (
    AdmUNetConfig,
    AugmentConfig,
    DataConfig,
    EdmSamplerConfig,
    EmaConfig,
    OptimizerConfig,
    PreviewConfig,
    Recipe,
    RunConfig,
    SongUNetConfig,
    TrainingConfig,
)

Architecture = Literal["vp", "ve"]
_TITLES = {"vp": "DDPM++", "ve": "NCSN++"}


def song_unet(
    architecture: Architecture, channel_mult: tuple[int, ...], dropout: float
) -> SongUNetConfig:
    """DDPM++ (`vp`) or NCSN++ (`ve`) with 128 base channels."""
    if architecture == "vp":
        return SongUNetConfig(channel_mult=channel_mult, dropout=dropout)
    return SongUNetConfig(
        channel_mult=channel_mult,
        dropout=dropout,
        embedding="fourier",
        channel_mult_noise=2,
        encoder="residual",
        resample_filter=(1, 3, 3, 1),
    )


def cifar10(labels: bool, architecture: Architecture) -> Recipe:
    """CIFAR-10 at 32x32: batch 512, 200 M images, 18 deterministic steps."""
    kind = "cond" if labels else "uncond"
    return Recipe(
        name=f"edm-cifar10-{kind}-{architecture}",
        description=f"EDM, CIFAR-10, {_TITLES[architecture]}",
        data=DataConfig(resolution=32, num_classes=10 if labels else 0),
        network=song_unet(architecture, (2, 2, 2), dropout=0.13),
        augment=AugmentConfig(p=0.12),
        sampling=EdmSamplerConfig(steps=18),
    )


def _faces64(name: str, title: str, dropout: float, architecture: Architecture) -> Recipe:
    return Recipe(
        name=f"edm-{name}-{architecture}",
        description=f"EDM, {title}, {_TITLES[architecture]}",
        data=DataConfig(resolution=64),
        network=song_unet(architecture, (1, 2, 2, 2), dropout),
        augment=AugmentConfig(p=0.15),
        optimizer=OptimizerConfig(lr=2e-4),
        training=TrainingConfig(batch=256),
        sampling=EdmSamplerConfig(steps=40),
    )


def ffhq64(architecture: Architecture) -> Recipe:
    """FFHQ at 64x64: batch 256, 200 M images, 40 deterministic steps."""
    return _faces64("ffhq64", "FFHQ", 0.05, architecture)


def afhqv2_64(architecture: Architecture) -> Recipe:
    """AFHQv2 at 64x64: as FFHQ with more dropout, for a smaller set."""
    return _faces64("afhqv2-64", "AFHQv2", 0.25, architecture)


def imagenet64() -> Recipe:
    """ImageNet at 64x64: ADM, batch 4096, 2.5 G images, 256 stochastic steps."""
    return Recipe(
        name="edm-imagenet64-adm",
        description="EDM, ImageNet, ADM",
        data=DataConfig(resolution=64, num_classes=1000),
        network=AdmUNetConfig(),
        optimizer=OptimizerConfig(lr=1e-4),
        ema=(EmaConfig(halflife_images=50_000_000),),
        training=TrainingConfig(images=2_500_000_000, batch=4096, loss_scale=100),
        sampling=EdmSamplerConfig(steps=256, s_churn=40, s_min=0.05, s_max=50, s_noise=1.003),
        run=RunConfig(
            log_every_images=200_000,
            checkpoint_every_images=10_000_000,
            preview=PreviewConfig(every_images=10_000_000),
        ),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "edm-cifar10-cond-vp": partial(cifar10, True, "vp"),
    "edm-cifar10-cond-ve": partial(cifar10, True, "ve"),
    "edm-cifar10-uncond-vp": partial(cifar10, False, "vp"),
    "edm-cifar10-uncond-ve": partial(cifar10, False, "ve"),
    "edm-ffhq64-vp": partial(ffhq64, "vp"),
    "edm-ffhq64-ve": partial(ffhq64, "ve"),
    "edm-afhqv2-64-vp": partial(afhqv2_64, "vp"),
    "edm-afhqv2-64-ve": partial(afhqv2_64, "ve"),
    "edm-imagenet64-adm": imagenet64,
}

"""Relay diffusion (Teng et al. 2023, "Relay Diffusion: Unifying diffusion process across
resolutions for image synthesis").

The experiments of the original's readme of 2023-09-12, whose values the released CelebA-HQ
checkpoints fit, and a small relay for laptops. Each has two stages, which are trained on their own
and put together by `tessera relay`.
"""

from __future__ import annotations

from collections.abc import Callable

from tessera.recipes.laptop import cifar10_small
from tessera.recipes.schema import (
    AdmUNetConfig,
    AugmentConfig,
    BlurObjectiveConfig,
    DataConfig,
    EdmObjectiveConfig,
    EdmSamplerConfig,
    EmaConfig,
    OptimizerConfig,
    Recipe,
    RelaySamplerConfig,
    SongUNetConfig,
    TrainingConfig,
)

_ADM256 = {"model_channels": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "num_blocks": 2}
"""ADM for 256x256; attention at sides of 32, 16 and 8."""


def celebahq_first() -> Recipe:
    """CelebA-HQ at 64x64, from images of 256x256: ADM, batch 1024, 120 stochastic steps."""
    return Recipe(
        name="relay-celebahq-first",
        description="RDM, CelebA-HQ, 64x64",
        data=DataConfig(resolution=64, shrink=4),
        network=AdmUNetConfig(dropout=0.15),
        augment=AugmentConfig(p=0.2),
        optimizer=OptimizerConfig(lr=1e-4),
        training=TrainingConfig(batch=1024, micro_batch=32),
        sampling=EdmSamplerConfig(steps=120, sde_scale=0.05),
    )


def celebahq_second() -> Recipe:
    """CelebA-HQ from 64x64 to 256x256: ADM, batch 1024; its sampler assumes less blur."""
    return Recipe(
        name="relay-celebahq-second",
        description="RDM, CelebA-HQ, 64x64 to 256",
        data=DataConfig(resolution=256),
        network=AdmUNetConfig(dropout=0.2, **_ADM256),
        augment=AugmentConfig(p=0.2),
        objective=BlurObjectiveConfig(prob_length=0.89, blur_sigma_max=2),
        optimizer=OptimizerConfig(lr=1e-4),
        training=TrainingConfig(batch=1024, micro_batch=8),
        sampling=RelaySamplerConfig(steps=150, sigma_start=0.95, prob_length=1.05),
    )


def imagenet_first() -> Recipe:
    """ImageNet at 64x64, from images of 256x256: ADM, batch 4096, 256 stochastic steps."""
    return Recipe(
        name="relay-imagenet-first",
        description="RDM, ImageNet, 64x64",
        data=DataConfig(resolution=64, shrink=4, num_classes=1000),
        network=AdmUNetConfig(dropout=0.1),
        augment=AugmentConfig(p=0.12),
        optimizer=OptimizerConfig(lr=1e-4),
        ema=(EmaConfig(halflife_images=50_000_000),),
        training=TrainingConfig(batch=4096, micro_batch=32, loss_scale=25),
        sampling=EdmSamplerConfig(steps=256, s_churn=40, s_min=0.05, s_max=50, s_noise=1.003),
    )


def imagenet_second() -> Recipe:
    """ImageNet from 64x64 to 256x256: ADM, batch 4096, 200 steps.

    The original samples it with guidance 3.5 (`second.guidance=3.5`), for which classes are left
    out here in a tenth of the training, as its released code cannot.
    """
    return Recipe(
        name="relay-imagenet-second",
        description="RDM, ImageNet, 64x64 to 256",
        data=DataConfig(resolution=256, num_classes=1000),
        network=AdmUNetConfig(dropout=0.1, **_ADM256),
        augment=AugmentConfig(p=0.12),
        objective=BlurObjectiveConfig(label_dropout=0.1),
        optimizer=OptimizerConfig(lr=1e-4),
        training=TrainingConfig(batch=4096, micro_batch=8),
        sampling=RelaySamplerConfig(steps=200, rho=100),
    )


def cifar10_first() -> Recipe:
    """CIFAR-10 at 8x8, from images of 32x32: about ten minutes on two cores.

    Blocks of 4 pixels, as in the paper: an evaluation at 8x8 costs a sixteenth of one at 32x32, so
    that layout and class, which take the most training, are learned where they are cheap.
    """
    whole = cifar10_small()
    return whole.model_copy(
        update={
            "name": "cifar10-small-relay-first",
            "description": "CIFAR-10, small, 8x8",
            "data": DataConfig(resolution=8, shrink=4, num_classes=10, xflip=True),
            "network": SongUNetConfig(
                model_channels=64, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8, 4),
                dropout=0,
            ),
            "objective": EdmObjectiveConfig(p_mean=-0.8, label_dropout=0.1),
            "training": TrainingConfig(images=200_000, batch=64),
        }
    )  # fmt: skip


def cifar10_second() -> Recipe:
    """CIFAR-10 from 8x8 to 32x32: about twenty minutes on two cores."""
    whole = cifar10_small()
    return whole.model_copy(
        update={
            "name": "cifar10-small-relay-second",
            "description": "CIFAR-10, small, 8x8 to 32",
            "objective": BlurObjectiveConfig(label_dropout=0.1),
            "training": TrainingConfig(images=80_000, batch=32),
            "sampling": RelaySamplerConfig(steps=40, correction="estimates"),
        }
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "cifar10-small-relay-first": cifar10_first,
    "cifar10-small-relay-second": cifar10_second,
    "relay-celebahq-first": celebahq_first,
    "relay-celebahq-second": celebahq_second,
    "relay-imagenet-first": imagenet_first,
    "relay-imagenet-second": imagenet_second,
}

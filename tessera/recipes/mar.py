"""MAR (Li et al. 2024, "Autoregressive Image Generation without Vector Quantization").

The trainings and evaluations of the original's readme, on latents of its autoencoder (KL-16, which
`codec.model` must name: a folder or id of an AutoencoderKL), and a small model for laptops.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from tessera.recipes.schema import (
    DataConfig,
    DiscretePreconditioningConfig,
    EmaConfig,
    MarConfig,
    MarObjectiveConfig,
    MarSamplerConfig,
    OptimizerConfig,
    PreviewConfig,
    Recipe,
    RunConfig,
    TrainingConfig,
    VaeCodecConfig,
)

_EMA_DECAY_HALFLIFE = 6931  # steps in which 0.9999 per step becomes a half
_IMAGENET_IMAGES = 1_281_167
_BATCH = 2048

Size = Literal["base", "large", "huge"]

_GUIDANCE = {"base": 2.9, "large": 3.0, "huge": 3.2}


def released_sizes(size: Size) -> Recipe:
    """ImageNet at 256x256 as the released models: 800 epochs, 256 iterations, guidance by size.

    Without guidance the original samples at a temperature of 0.95.
    """
    return _imagenet(f"mar-{size}-imagenet256", f"MAR-{size}, ImageNet", MarConfig(size=size), size)


def default_training() -> Recipe:
    """The readme's training command: MAR-large with a head of 3 x 1024, 400 epochs."""
    network = MarConfig(size="large", head_width=1024, head_depth=3)
    name, description = "mar-large-3x1024-imagenet256", "MAR-large, 400 epochs"
    return _imagenet(name, description, network, "large", epochs=400)


def _imagenet(
    name: str, description: str, network: MarConfig, size: Size, epochs: int = 800
) -> Recipe:
    return Recipe(
        name=name,
        description=description,
        data=DataConfig(resolution=256, num_classes=1000, xflip=True),
        codec=VaeCodecConfig(model="vae-kl16", channels=16, downsample=16, scale=0.2325),
        network=network,
        preconditioning=_PROCESS,
        objective=MarObjectiveConfig(),
        optimizer=OptimizerConfig(
            kind="adamw",
            lr=8e-4,
            betas=(0.9, 0.95),
            weight_decay=0.02,
            clip_norm=3,
            rampup_images=100 * _IMAGENET_IMAGES,
        ),
        ema=(EmaConfig(halflife_images=_EMA_DECAY_HALFLIFE * _BATCH, rampup_ratio=None),),
        training=TrainingConfig(images=epochs * _IMAGENET_IMAGES, batch=_BATCH),
        sampling=MarSamplerConfig(num_iter=256, guidance=_GUIDANCE[size]),
    )


_PROCESS = DiscretePreconditioningConfig(schedule="cosine", prediction="eps")


def cifar10_small_mar() -> Recipe:
    """CIFAR-10, 32x32, ten classes, about 4 M parameters: twenty-five minutes on two cores.

    Tokens are patches of 4x4 pixels. An autoencoder of so small images would take a training of
    its own, and its errors would bound what the model can reach; of 2x2 pixels there are four times
    as many tokens, and twenty-five minutes are too few images.
    """
    return Recipe(
        name="cifar10-small-mar",
        description="CIFAR-10, small, masked tokens",
        data=DataConfig(resolution=32, num_classes=10, xflip=True),
        network=MarConfig(
            patch=4,
            width=192,
            depth=4,
            heads=3,
            decoder_depth=3,
            buffer=8,
            attn_dropout=0,
            dropout=0,
            head_width=256,
            head_depth=3,
        ),
        preconditioning=_PROCESS,
        objective=MarObjectiveConfig(repeats=2),
        optimizer=OptimizerConfig(
            kind="adamw", lr=1e-3, betas=(0.9, 0.95), weight_decay=0.02, clip_norm=3,
            rampup_images=5_000, decay="cosine",
        ),
        ema=(EmaConfig(halflife_images=8_000),),
        training=TrainingConfig(images=90_000, batch=32),
        sampling=MarSamplerConfig(num_iter=16, head_steps="50", guidance=2.0),
        run=RunConfig(
            log_every_images=2_000,
            checkpoint_every_images=15_000,
            preview=PreviewConfig(every_images=15_000, rows=4, columns=10),
        ),
    )  # fmt: skip


RECIPES: dict[str, Callable[[], Recipe]] = {
    "cifar10-small-mar": cifar10_small_mar,
    "mar-base-imagenet256": partial(released_sizes, "base"),
    "mar-large-imagenet256": partial(released_sizes, "large"),
    "mar-huge-imagenet256": partial(released_sizes, "huge"),
    "mar-large-3x1024-imagenet256": default_training,
}

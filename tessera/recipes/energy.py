"""Energy diffusion: a diffusion transformer as the gradient of a scalar energy, and plain ones.

The experiments of the original's readme, on latents of its autoencoder (KL-16, which `codec.model`
must name: a folder or id of an AutoencoderKL), and a small pair for laptops.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from tessera.recipes.schema import (
    DataConfig,
    DdpmSamplerConfig,
    DiscreteObjectiveConfig,
    DiscretePreconditioningConfig,
    DiTConfig,
    EdmObjectiveConfig,
    EdmSamplerConfig,
    EmaConfig,
    EnergyDiTConfig,
    McmcRefineConfig,
    OptimizerConfig,
    PreviewConfig,
    Recipe,
    RunConfig,
    TrainingConfig,
    VaeCodecConfig,
)

_EMA_DECAY_HALFLIFE = 6931  # steps in which 0.9999 per step becomes a half
_IMAGENET_IMAGES = 1_281_167
_BATCH, _EPOCHS = 256, 20

Method = Literal["dit", "energy"]


def transformer_imagenet(method: Method, size: Literal["B", "L", "XL"], resolution: int) -> Recipe:
    """ImageNet at 64x64 or 256x256 by class, on latents of 1/16 of the side, a token each.

    20 epochs of the readme's command (its text says 80). Energies are refined by 5 to 10 steps of
    descent after each of the sampler's 250, which costs some ten times as much.
    """
    network: DiTConfig | EnergyDiTConfig = DiTConfig(size=f"{size}/1")
    refine = None
    if method == "energy":
        network = EnergyDiTConfig(size=f"{size}/1", step_size=0.001)
        refine = McmcRefineConfig()
    return Recipe(
        name=f"{method}-{size.lower()}-imagenet{resolution}-latent",
        description=f"{'energy ' if method == 'energy' else ''}DiT-{size}/1, ImageNet",
        data=DataConfig(resolution=resolution, num_classes=1000, xflip=True),
        codec=VaeCodecConfig(model="vae-kl16", channels=16, downsample=16, scale=0.2325),
        network=network,
        preconditioning=DiscretePreconditioningConfig(timesteps=500, prediction="eps"),
        # The weight that makes the error of x that of the noise.
        objective=DiscreteObjectiveConfig(weight="snr"),
        optimizer=OptimizerConfig(
            kind="adamw",
            lr=9e-6,
            betas=(0.9, 0.95),
            weight_decay=0.02,
            clip_norm=3,
            rampup_images=_IMAGENET_IMAGES,
            decay="cosine",
        ),
        ema=(EmaConfig(halflife_images=_EMA_DECAY_HALFLIFE * _BATCH, rampup_ratio=None),),
        training=TrainingConfig(images=_EPOCHS * _IMAGENET_IMAGES, batch=_BATCH),
        sampling=DdpmSamplerConfig(steps="250", variance="small", refine=refine),
    )


_SMALL = {"size": "S/4", "depth": 6, "width": 160, "heads": 5}
"""Tokens of 4x4 pixels: with 2x2, four times as many, twenty minutes are too few images."""


def cifar10_small_dit() -> Recipe:
    """CIFAR-10, 32x32, ten classes, about 3 M parameters: twenty minutes on two cores.

    With EDM's preconditioning and objective, whose targets have one size at all noise levels: small
    networks learn more from them in so few images than from predicting the noise.
    """
    return _small("cifar10-small-dit", "CIFAR-10, small, transformer", DiTConfig(**_SMALL), 200_000)


def cifar10_small_energy() -> Recipe:
    """`cifar10-small-dit` as an energy: the same transformer, two fifths of the images in its time.

    Its multiplier is the number of tokens, of which the energy is a mean.
    """
    network = EnergyDiTConfig(multiplier=64, **_SMALL)
    return _small("cifar10-small-energy", "CIFAR-10, small, energy", network, 80_000)


def _small(
    name: str, description: str, network: DiTConfig | EnergyDiTConfig, images: int
) -> Recipe:
    return Recipe(
        name=name,
        description=description,
        data=DataConfig(resolution=32, num_classes=10, xflip=True),
        network=network,
        objective=EdmObjectiveConfig(p_mean=-0.8, label_dropout=0.1),  # as `cifar10-small`
        optimizer=OptimizerConfig(lr=1e-3, rampup_images=5_000, decay="cosine", clip_norm=1),
        ema=(EmaConfig(halflife_images=8_000),),
        training=TrainingConfig(images=images, batch=32),
        sampling=EdmSamplerConfig(steps=18),
        run=RunConfig(
            log_every_images=2_000,
            checkpoint_every_images=16_000,
            preview=PreviewConfig(every_images=16_000, rows=4, columns=10),
        ),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "cifar10-small-dit": cifar10_small_dit,
    "cifar10-small-energy": cifar10_small_energy,
    **{
        f"{method}-{size.lower()}-imagenet{resolution}-latent": partial(
            transformer_imagenet, method, size, resolution
        )
        for method in ("dit", "energy")
        for size in ("B", "L", "XL")
        for resolution in (64, 256)
    },
}

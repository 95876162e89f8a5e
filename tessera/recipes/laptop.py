"""Small models that train on the two cores of a laptop."""

from __future__ import annotations

from collections.abc import Callable

from tessera.recipes.schema import (
    BandConfig,
    BandsViewConfig,
    DataConfig,
    DiscreteObjectiveConfig,
    DiscretePreconditioningConfig,
    EdmObjectiveConfig,
    EdmSamplerConfig,
    EmaConfig,
    LinearPreconditioningConfig,
    OptimizerConfig,
    PatchedUNetConfig,
    PatchViewConfig,
    PreviewConfig,
    Recipe,
    RunConfig,
    SongUNetConfig,
    TrainingConfig,
)


def quickstart_digits() -> Recipe:
    """Handwritten digits, 16x16 grey, ten classes: about three minutes on two cores."""
    return Recipe(
        name="quickstart-digits",
        description="handwritten digits in minutes",
        data=DataConfig(resolution=16, channels=1, num_classes=10, workers=1),
        # Enlarged 8x8 images have no fine detail: the width is where it is cheap and useful.
        network=SongUNetConfig(
            model_channels=16,
            channel_mult=(1, 4),
            num_blocks=1,
            attn_resolutions=(),
            dropout=0,
        ),
        # Which digit it becomes is decided at higher noise than the detail of photographs.
        objective=EdmObjectiveConfig(p_mean=-0.5, label_dropout=0.1),
        optimizer=OptimizerConfig(lr=2e-3, betas=(0.9, 0.99), rampup_images=2_000, decay="cosine"),
        ema=(EmaConfig(halflife_images=1_000),),
        training=TrainingConfig(images=30_000, batch=16),
        sampling=EdmSamplerConfig(steps=10, sigma_max=40),
        run=RunConfig(
            log_every_images=500,
            checkpoint_every_images=20_000,
            preview=PreviewConfig(every_images=20_000, rows=4, columns=10),
        ),
    )


def cifar10_small() -> Recipe:
    """CIFAR-10, 32x32, ten classes, about 3 M parameters: half an hour on two cores."""
    return Recipe(
        name="cifar10-small",
        description="CIFAR-10, small, half an hour",
        data=DataConfig(resolution=32, num_classes=10, xflip=True),
        network=SongUNetConfig(
            model_channels=32,
            channel_mult=(1, 2, 4),
            num_blocks=1,
            attn_resolutions=(8,),
            dropout=0,
        ),
        # So few images teach layout and shapes, which are decided at higher noise than detail.
        objective=EdmObjectiveConfig(p_mean=-0.8, label_dropout=0.1),
        optimizer=OptimizerConfig(lr=1e-3, rampup_images=5_000, decay="cosine"),
        ema=(EmaConfig(halflife_images=10_000),),
        training=TrainingConfig(images=120_000, batch=32),
        sampling=EdmSamplerConfig(steps=18),
        run=RunConfig(
            log_every_images=2_000,
            checkpoint_every_images=20_000,
            preview=PreviewConfig(every_images=20_000, rows=4, columns=10),
        ),
    )


def cifar10_small_linear() -> Recipe:
    """`cifar10-small`, narrower, from the best linear denoiser on: pictures in minutes.

    At high noise the network sees means of 2x2 pixels, of more images than it otherwise would.
    """
    whole = cifar10_small()
    narrow = {"model_channels": 16}
    bands = (BandConfig(below=1.5, share=0.75), BandConfig(factor=2, share=0.25))
    return whole.model_copy(
        update={
            "name": "cifar10-small-linear",
            "description": "CIFAR-10, small, linear start",
            "network": whole.network.model_copy(update=narrow),
            "view": BandsViewConfig(bands=bands),
            "preconditioning": LinearPreconditioningConfig(),
            "optimizer": whole.optimizer.model_copy(update={"lr": 2e-3}),
        }
    )


def cifar10_small_patch() -> Recipe:
    """`cifar10-small` on patches of 8, 16 and 32 pixels: more images in the same time."""
    whole = cifar10_small()
    return whole.model_copy(
        update={
            "name": "cifar10-small-patch",
            "description": "CIFAR-10, small, on patches",
            "view": PatchViewConfig(real_p=0.5),
        }
    )


def cifar10_small_pdm() -> Recipe:
    """`cifar10-small` with the patched U-Net: 2x2 pixels at a time, discrete noise levels."""
    whole = cifar10_small()
    return whole.model_copy(
        update={
            "name": "cifar10-small-pdm",
            "description": "CIFAR-10, small, patched U-Net",
            "network": PatchedUNetConfig(
                patch_size=2,
                model_channels=64,
                channel_mult=(1, 1.5, 2),
                num_blocks=1,
                attn_resolutions=(8,),
                head_channels=32,
                learn_variance=True,
            ),
            "preconditioning": DiscretePreconditioningConfig(schedule="cosine"),
            "objective": DiscreteObjectiveConfig(),
        }
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "quickstart-digits": quickstart_digits,
    "cifar10-small": cifar10_small,
    "cifar10-small-linear": cifar10_small_linear,
    "cifar10-small-patch": cifar10_small_patch,
    "cifar10-small-pdm": cifar10_small_pdm,
}

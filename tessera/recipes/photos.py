"""Recipes for one's own photographs: on one consumer GPU, and on a processor in minutes.

None is published: these are sizes of EDM's DDPM++ and of patched U-Nets between the toys for a
laptop and the recipes for eight GPUs. Rate and averages do not depend on the length, so that a run
may end at any time: the rate stays constant, and the half-life of the average is a twentieth of the
images seen (EDM, Karras et al. 2022, with its ramp-up kept on).
"""

from __future__ import annotations

from collections.abc import Callable

from tessera.recipes.schema import (
    DataConfig,
    DiTConfig,
    EdmObjectiveConfig,
    EdmSamplerConfig,
    LinearPreconditioningConfig,
    OptimizerConfig,
    PatchedUNetConfig,
    PreviewConfig,
    Recipe,
    RunConfig,
    SongUNetConfig,
    TrainingConfig,
    VaeCodecConfig,
)


def photos_64() -> Recipe:
    """64x64: a DDPM++ of 22 M parameters, 32 images at a time in about 6 GB."""
    return _on_gpu(
        "photos-64",
        "own photographs, one GPU",
        DataConfig(resolution=64, xflip=True),
        SongUNetConfig(
            model_channels=96, channel_mult=(1, 2, 2, 2), num_blocks=2, attn_resolutions=(16,)
        ),
        TrainingConfig(images=5_000_000, batch=128, micro_batch=32),
    )


def photos_128() -> Recipe:
    """128x128: a patched U-Net of 36 M parameters on patches of 2x2 pixels."""
    return _on_gpu(
        "photos-128",
        "own photographs, one GPU",
        DataConfig(resolution=128, xflip=True),
        PatchedUNetConfig(
            patch_size=2,
            model_channels=128,
            channel_mult=(1, 2, 2, 2),
            num_blocks=2,
            attn_resolutions=(16,),
            dropout=0.1,
        ),
        TrainingConfig(images=5_000_000, batch=128, micro_batch=32),
    )


def photos_256_latent() -> Recipe:
    """256x256 by the latents of a VAE: a transformer of DiT's small size, tokens of 2x2 latents."""
    return _on_gpu(
        "photos-256-latent",
        "own photographs by latents",
        DataConfig(resolution=256, xflip=True),
        DiTConfig(size="S/2"),
        TrainingConfig(images=10_000_000, batch=128, micro_batch=64),
        codec=VaeCodecConfig(),
        optimizer=OptimizerConfig(lr=2e-4, rampup_images=100_000, clip_norm=1),
    )


def photos_small(resolution: int) -> Recipe:
    """About 3 M parameters for a processor: above 16 pixels, on a grid of about 16x16 patches.

    A U-Net on patches costs by the grid and not by the pixels (Luhman & Luhman 2022), and in
    minutes the number of images counts for more than detail.

    Args:
        resolution: side of the images; a multiple of 4 below 32, of `small_step` from there on.

    Raises:
        ValueError: of another one.
    """
    network: SongUNetConfig | PatchedUNetConfig
    if resolution >= 32:
        patch = _small_patch(resolution)
        network = PatchedUNetConfig(
            patch_size=patch,
            # Patches of more pixels need more channels to pass through.
            model_channels=32 if patch == 2 else 64,
            channel_mult=(1, 2, 4) if patch == 2 else (1, 2),
            num_blocks=1,
            attn_resolutions=(8,),
            head_channels=32,
            # By default a level of 32 channels would lose its means over the picture: its colours.
            groups=None,
            dropout=0,
        )
    else:
        network = SongUNetConfig(
            model_channels=32,
            channel_mult=(1, 2, 4) if resolution > 8 else (1, 2),
            num_blocks=1,
            attn_resolutions=(8,),
            dropout=0,
        )
    return Recipe(
        name=f"photos-{resolution}-small",
        description="own photographs in minutes",
        data=DataConfig(resolution=resolution, xflip=True),
        network=network,
        # What is linear need not be learned, for which a few minutes would just suffice.
        preconditioning=LinearPreconditioningConfig(),
        # So few images teach layout and colours, which are decided at higher noise than detail.
        objective=EdmObjectiveConfig(p_mean=-0.8),
        # Thousands of steps, and not millions: the second moment forgets in a hundred.
        optimizer=OptimizerConfig(lr=1e-3, betas=(0.9, 0.99), rampup_images=1_000),
        training=TrainingConfig(images=100_000, batch=16),
        sampling=EdmSamplerConfig(steps=18),
        run=RunConfig(
            log_every_images=500,
            checkpoint_every_images=20_000,
            preview=PreviewConfig(every_images=20_000, rows=2, columns=8),
        ),
    )


def small_step(resolution: int) -> int:
    """What the side of images for `photos_small` must be a multiple of, about `resolution`."""
    if resolution < 32:
        return 4 if resolution > 8 else 2
    patch = _small_patch(resolution)
    return 4 * patch if patch == 2 else 2 * patch


def _small_patch(resolution: int) -> int:
    """The power of two that leaves 16 to 31 patches a side."""
    return 1 << ((resolution // 16).bit_length() - 1)


def _on_gpu(
    name: str,
    description: str,
    data: DataConfig,
    network: SongUNetConfig | PatchedUNetConfig | DiTConfig,
    training: TrainingConfig,
    *,
    codec: VaeCodecConfig | None = None,
    optimizer: OptimizerConfig | None = None,
) -> Recipe:
    """What the recipes for one GPU share."""
    return Recipe(
        name=name,
        description=description,
        data=data,
        network=network,
        objective=EdmObjectiveConfig(),
        optimizer=optimizer or OptimizerConfig(lr=5e-4, rampup_images=50_000),
        training=training,
        sampling=EdmSamplerConfig(steps=18),
        run=RunConfig(
            log_every_images=5_000,
            checkpoint_every_images=250_000,
            preview=PreviewConfig(every_images=250_000, rows=2, columns=8),
        ),
        **({} if codec is None else {"codec": codec}),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "photos-64": photos_64,
    "photos-128": photos_128,
    "photos-256-latent": photos_256_latent,
}

"""PDM (Luhman & Luhman 2022, "Improving Diffusion Model Efficiency Through Patching").

The published models with the settings that their weights were trained with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tessera.recipes.schema import (
    DataConfig,
    DdpmSamplerConfig,
    DiscreteObjectiveConfig,
    DiscretePreconditioningConfig,
    EmaConfig,
    OptimizerConfig,
    PatchedUNetConfig,
    Recipe,
    TrainingConfig,
)

_EMA_DECAY_HALFLIFE = 6931  # steps in which 0.9999 per step becomes a half


def pdm(
    name: str,
    description: str,
    data: DataConfig,
    network: PatchedUNetConfig,
    *,
    batch: int,
    steps: int,
    beta2: float = 0.999,
    lr: float = 1e-4,
    warmup: int = 5000,
    schedule: str = "linear",
    snr_splits: tuple[float, ...] = (),
    expert: int | None = None,
) -> Recipe:
    """A published model: x0 prediction, √SNR weights, learned variance, 250 ancestral steps."""
    return Recipe(
        name=name,
        description=description,
        data=data,
        network=network,
        preconditioning=DiscretePreconditioningConfig(schedule=schedule),
        objective=DiscreteObjectiveConfig(label_dropout=0.1 if data.num_classes else 0),
        snr_splits=snr_splits,
        expert=expert,
        optimizer=OptimizerConfig(lr=lr, betas=(0.9, beta2), rampup_images=warmup * batch),
        ema=(EmaConfig(halflife_images=_EMA_DECAY_HALFLIFE * batch, rampup_ratio=None),),
        training=TrainingConfig(images=steps * batch, batch=batch),
        sampling=DdpmSamplerConfig(steps="250"),
    )


def _network(
    patch: int, channels: int, mult: tuple[float, ...], blocks: int = 2
) -> PatchedUNetConfig:
    return PatchedUNetConfig(
        patch_size=patch,
        model_channels=channels,
        channel_mult=mult,
        num_blocks=blocks,
        head_channels=64,
        learn_variance=True,
    )


LSUN_NETWORKS = {
    2: _network(2, 128, (1, 2, 2, 4, 4)),
    4: _network(4, 256, (1, 1, 2, 2)),
    8: _network(8, 256, (1, 1.5, 2), blocks=3),
}
"""The network of each patch size."""
_LSUN_BATCHES = {2: (128, 335_000), 4: (256, 275_000), 8: (512, 215_000)}


def lsun256(patch: int) -> Recipe:
    """LSUN Church at 256x256 on patches of 2, 4 or 8 pixels."""
    batch, steps = _LSUN_BATCHES[patch]
    return pdm(
        f"pdm-lsun256-p{patch}",
        f"PDM, LSUN, patches of {patch}",
        DataConfig(resolution=256, xflip=True),
        LSUN_NETWORKS[patch],
        batch=batch,
        steps=steps,
        beta2=0.99,
    )


def imagenet256(expert: int) -> Recipe:
    """ImageNet at 256x256: one of two experts that meet at an SNR of 0.25.

    The published noisy expert (1) was initialised with the finished clean one (0).
    """
    return pdm(
        f"pdm-imagenet256-expert{expert}",
        f"PDM, ImageNet, {('clean', 'noisy')[expert]} expert",
        DataConfig(resolution=256, num_classes=1000, xflip=True),
        _network(4, 256, (1, 2, 2, 2), blocks=3),
        batch=256,
        steps=500_000,
        snr_splits=(0.25,),
        expert=expert,
        beta2=(0.98, 0.999)[expert],
        lr=(1e-4, 5e-5)[expert],
        warmup=(5000, 10_000)[expert],
    )


def ffhq1024() -> Recipe:
    """FFHQ at 1024x1024 on patches of 4 pixels."""
    return pdm(
        "pdm-ffhq1024",
        "PDM, FFHQ at full size",
        DataConfig(resolution=1024, xflip=True),
        _network(4, 128, (1, 2, 2, 4, 4, 4)),
        batch=32,
        steps=780_000,
        beta2=0.98,
        schedule="linear0.025",
    )


def example256() -> Recipe:
    """The training example of the original's readme: 30 M parameters at 256x256."""
    network = PatchedUNetConfig(
        channel_mult=(1, 1, 2, 2), attention_order="legacy", learn_variance=True
    )
    return pdm(
        "pdm-example256",
        "PDM, the readme's example",
        DataConfig(resolution=256, xflip=True),
        network,
        batch=128,
        steps=500_000,
        warmup=0,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "pdm-ffhq1024": ffhq1024,
    "pdm-imagenet256-expert0": partial(imagenet256, 0),
    "pdm-imagenet256-expert1": partial(imagenet256, 1),
    "pdm-lsun256-p2": partial(lsun256, 2),
    "pdm-lsun256-p4": partial(lsun256, 4),
    "pdm-lsun256-p8": partial(lsun256, 8),
    "pdm-example256": example256,
}

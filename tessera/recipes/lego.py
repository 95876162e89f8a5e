"""LEGO bricks (Zheng et al. 2024, "Learning Stackable and Skippable LEGO Bricks for Efficient,
Reconfigurable, and Variable-Resolution Diffusion Modeling").

`STACKS` are the networks of the paper by the names of its code: width, order of the bricks (PG:
local to global, PR: global to local, U: global to local and back), and the canvas they are made
for, where 32 is for latents of 256-pixel images.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tessera.recipes.schema import (
    BrickConfig,
    DataConfig,
    EdmObjectiveConfig,
    EdmSamplerConfig,
    EmaConfig,
    LegoConfig,
    OptimizerConfig,
    PreviewConfig,
    Recipe,
    RunConfig,
    TrainingConfig,
    VaeCodecConfig,
)

# Width and heads of the tokens; of a token's side, bricks of 16 pixels have 8, all others 2.
_WIDTHS = {"S": (384, 6), "L": (1024, 16), "XL": (1152, 16)}
_DEPTHS = {
    "S_PG_64": {4: 2, 16: 4, 64: 6},
    "S_U_32": {4: 2, 16: 4, 32: 6},
    "S_U_64": {4: 2, 16: 4, 64: 6},
    "L_PG_32": {4: 4, 16: 8, 32: 12},
    "L_PG_64": {4: 6, 16: 8, 64: 12},
    "L_PG_64_old": {4: 6, 16: 6, 64: 12},
    "L_U_32": {4: 6, 16: 8, 32: 12},
    "L_U_64": {4: 6, 16: 8, 64: 12},
    "XL_PG_32": {4: 4, 16: 12, 32: 14},
    "XL_PG_64": {4: 4, 16: 12, 64: 14},
    "XL_U_32": {4: 4, 16: 10, 32: 14},
    "XL_U_64": {4: 4, 16: 12, 64: 14},
}


def stack(model: str, order: str, depths: dict[int, int]) -> LegoConfig:
    """The stack of width `model` ("S", "L", "XL") with bricks in the order "PG", "PR" or "U".

    Args:
        depths: number of blocks by the brick's size.
    """
    width, heads = _WIDTHS[model]
    local = sorted(depths)
    sizes = {"PG": local, "PR": local[::-1], "U": local[::-1] + local[1:]}[order]
    bricks = tuple(
        BrickConfig(size=size, patch=8 if size == 16 else 2, depth=depths[size]) for size in sizes
    )
    return LegoConfig(bricks=bricks, width=width, heads=heads)


def _stacks() -> dict[str, LegoConfig]:
    found = {}
    for name, depths in _DEPTHS.items():
        model, order, *_ = name.split("_")
        found[f"lego_{name}"] = stack(model, order, depths)
        if order == "PG":
            found[f"lego_{name.replace('PG', 'PR')}"] = stack(model, "PR", depths)
    return found


STACKS: dict[str, LegoConfig] = _stacks()


# The settings of the published scores on ImageNet, with guidance 1.5.
_IMAGENET = EdmSamplerConfig(steps=256, s_churn=10, s_min=0.05, s_max=10, s_noise=1.003)


def _recipe(
    name: str, description: str, network: str, data: DataConfig, sampling: EdmSamplerConfig
) -> Recipe:
    return Recipe(
        name=name,
        description=description,
        data=data,
        network=STACKS[network],
        objective=EdmObjectiveConfig(label_dropout=0.1 if data.num_classes else 0.0),
        optimizer=OptimizerConfig(lr=1e-4),
        sampling=sampling,
    )


def celeba64(order: str) -> Recipe:
    """CelebA at 64x64: LEGO-S, batch 512, 200 M images."""
    return _recipe(
        f"lego-s-{order.lower()}-celeba64",
        f"LEGO-S, {order}, CelebA",
        f"lego_S_{order}_64",
        DataConfig(resolution=64),
        EdmSamplerConfig(steps=40),
    )


def lego_ffhq64(order: str) -> Recipe:
    """FFHQ at 64x64: LEGO-S, batch 512, 200 M images, mirrored copies."""
    return _recipe(
        f"lego-s-{order.lower()}-ffhq64",
        f"LEGO-S, {order}, FFHQ",
        f"lego_S_{order}_64",
        DataConfig(resolution=64, xflip=True),
        EdmSamplerConfig(steps=40),
    )


def lego_imagenet64(model: str, order: str) -> Recipe:
    """ImageNet at 64x64 with classes: batch 512, 256 stochastic steps; guide by 1.5."""
    return _recipe(
        f"lego-{model.lower()}-{order.lower()}-imagenet64",
        f"LEGO-{model}, {order}, ImageNet",
        f"lego_{model}_{order}_64",
        DataConfig(resolution=64, num_classes=1000),
        _IMAGENET,
    )


def imagenet_latent(resolution: int, model: str, order: str) -> Recipe:
    """ImageNet at 256x256 or 512x512 with classes, on latents of 1/8 of the side; guide by 1.5.

    Batch 512. The spread of the data is set to 0.5 (`preconditioning.sigma_data`,
    `objective.sigma_data`) as in the released models, though that of these latents is nearer 1.
    """
    recipe = _recipe(
        f"lego-{model.lower()}-{order.lower()}-imagenet{resolution}-latent",
        f"LEGO-{model}, {order}, ImageNet",
        f"lego_{model}_{order}_{resolution // 8}",
        DataConfig(resolution=resolution, num_classes=1000),
        _IMAGENET,
    )
    return recipe.model_copy(update={"codec": VaeCodecConfig()})


def cifar10_small_lego() -> Recipe:
    """CIFAR-10, 32x32, ten classes, PG, about 5 M parameters: half an hour on two cores.

    A step of an image takes 1.3 times as long as that of `cifar10-small`.
    """
    bricks = ((4, 2, 2), (16, 4, 2), (32, 2, 3))
    return Recipe(
        name="cifar10-small-lego",
        description="CIFAR-10, LEGO, half an hour",
        data=DataConfig(resolution=32, num_classes=10, xflip=True),
        network=LegoConfig(
            bricks=tuple(BrickConfig(size=r, patch=p, depth=d) for r, p, d in bricks),
            width=192,
            heads=3,
        ),
        objective=EdmObjectiveConfig(p_mean=-0.8, label_dropout=0.1),  # as `cifar10-small`
        optimizer=OptimizerConfig(lr=5e-4, rampup_images=5_000, decay="cosine"),
        ema=(EmaConfig(halflife_images=8_000),),
        training=TrainingConfig(images=96_000, batch=32),
        sampling=EdmSamplerConfig(steps=18),
        run=RunConfig(
            log_every_images=2_000,
            checkpoint_every_images=16_000,
            preview=PreviewConfig(every_images=16_000, rows=4, columns=10),
        ),
    )


def quickstart_digits_lego() -> Recipe:
    """Handwritten digits, 16x16 grey, ten classes: minutes on two cores."""
    bricks = ((4, 2, 1), (16, 2, 2))
    return Recipe(
        name="quickstart-digits-lego",
        description="digits, LEGO bricks, minutes",
        data=DataConfig(resolution=16, channels=1, num_classes=10, workers=1),
        network=LegoConfig(
            bricks=tuple(BrickConfig(size=r, patch=p, depth=d) for r, p, d in bricks),
            width=96,
            heads=3,
        ),
        objective=EdmObjectiveConfig(label_dropout=0.1),
        optimizer=OptimizerConfig(lr=2e-3, rampup_images=10_000, decay="cosine"),
        ema=(EmaConfig(halflife_images=15_000),),
        training=TrainingConfig(images=200_000, batch=128),
        sampling=EdmSamplerConfig(steps=12),
        run=RunConfig(
            log_every_images=5_000,
            checkpoint_every_images=100_000,
            preview=PreviewConfig(every_images=50_000, rows=4, columns=10),
        ),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "quickstart-digits-lego": quickstart_digits_lego,
    "cifar10-small-lego": cifar10_small_lego,
    **{f"lego-s-{order.lower()}-celeba64": partial(celeba64, order) for order in ("PG", "PR", "U")},
    **{
        f"lego-s-{order.lower()}-ffhq64": partial(lego_ffhq64, order) for order in ("PG", "PR", "U")
    },
    **{
        f"lego-{model.lower()}-{order.lower()}-imagenet64": partial(lego_imagenet64, model, order)
        for model in ("L", "XL")
        for order in ("PG", "PR", "U")
    },
    **{
        f"lego-{model.lower()}-{order.lower()}-imagenet{resolution}-latent": partial(
            imagenet_latent, resolution, model, order
        )
        for resolution, model, orders in (
            (256, "S", ("U",)),
            (256, "L", ("PG", "PR", "U")),
            (256, "XL", ("PG", "PR", "U")),
            (512, "XL", ("PG", "PR", "U")),
        )
        for order in orders
    },
}

"""The networks, and which sides of images they take."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from tessera.networks.sides import halved, tiled
from tessera.recipes.schema.base import (
    Depth,
    Factor,
    Listed,
    Options,
    Probability,
    Section,
    Side,
    Width,
)
from tessera.recipes.schema.network import NetworkSection
from tessera.recipes.schema.options import BricksConfig
from tessera.recipes.schema.transformers import DiTConfig, EnergyDiTConfig, MarConfig

Levels = Annotated[tuple[Factor, ...], Listed, Field(min_length=1, max_length=16)]
Blocks = Annotated[int, Field(gt=0, le=64)]
Resolutions = Annotated[tuple[Side, ...], Listed, Field(max_length=64)]


class UNetSection(NetworkSection):
    """What every U-Net has."""

    takes_image = True

    channel_mult: tuple[float, ...] = ()

    def fits(self, side: int) -> bool:
        return halved(side, len(self.channel_mult))

    @property
    def sides(self) -> str:
        levels = len(self.channel_mult)
        return (
            f"a multiple of {2 ** (levels - 1)}, because network.channel_mult has {levels} levels"
        )


class SongUNetConfig(UNetSection):
    """DDPM++ and NCSN++ (Song et al. 2021), as in EDM."""

    kind: Literal["song_unet"] = "song_unet"
    model_channels: Width = Field(128, description="channels at full size, where channel_mult is 1")
    channel_mult: Levels = Field(
        (1, 2, 2, 2), description="channels of each level as multiples; a level halves the image"
    )
    channel_mult_emb: Factor = Field(
        4, description="width of the embedding of noise and class, as a multiple"
    )
    num_blocks: Blocks = Field(4, description="residual blocks of a level")
    attn_resolutions: Resolutions = Field(
        (16,), description="sides of the image with self-attention"
    )
    dropout: Probability = Field(0.10, description="share of features dropped while training")
    embedding: Literal["positional", "fourier"] = Field(
        "positional", description="of the noise level"
    )
    channel_mult_noise: Factor = Field(
        1, description="width of the noise level's embedding: 1, or 2 for NCSN++"
    )
    encoder: Literal["standard", "skip", "residual"] = Field(
        "standard", description="NCSN++: residual; DDPM++: standard"
    )
    decoder: Literal["standard", "skip"] = Field(
        "standard", description="NCSN++ may add up pictures of all levels: skip"
    )
    resample_filter: Annotated[tuple[int, ...], Listed, Field(max_length=64)] = Field(
        (1, 1), description="weights that levels are halved and doubled with"
    )
    implicit_mlp: bool = Field(
        False, description="a pixel-wise perceptron before the first 3x3 convolution"
    )


class AdmUNetConfig(UNetSection):
    """The ADM U-Net (Dhariwal & Nichol 2021), as in EDM."""

    kind: Literal["adm_unet"] = "adm_unet"
    model_channels: Width = Field(192, description="channels at full size, where channel_mult is 1")
    channel_mult: Annotated[
        tuple[Factor | Annotated[float, Field(gt=0, le=1024)], ...],
        Listed,
        Field(min_length=1, max_length=16),
    ] = Field(
        (1, 2, 3, 4), description="channels of each level as multiples; a level halves the image"
    )
    channel_mult_emb: Factor = Field(
        4, description="width of the embedding of noise and class, as a multiple"
    )
    num_blocks: Blocks = Field(3, description="residual blocks of a level")
    attn_resolutions: Resolutions = Field(
        (32, 16, 8), description="sides of the image with self-attention"
    )
    dropout: Probability = Field(0.10, description="share of features dropped while training")
    head_channels: Width = Field(64, description="width of an attention head")
    heads: Width | None = Field(None, description="attention heads, in place of a width")
    groups: Width | None = Field(
        None, description="of normalisations; null: a quarter of the channels, at most 32"
    )
    learn_variance: bool = Field(False, description="put out the variance of reverse steps, too")

    @property
    def learns_variance(self) -> bool:
        return self.learn_variance

    def check(self, side: int) -> None:
        for level, mult in enumerate(self.channel_mult):
            resolution, width = side >> level, int(self.model_channels * mult)
            heads = self.heads or width // self.head_channels
            asked = resolution in self.attn_resolutions
            # Between the two halves of the network there is attention wherever it is wide enough.
            always = level == len(self.channel_mult) - 1 and heads > 0
            if not (asked or always) or (heads and width % heads == 0):
                continue
            why = (
                f"which {heads} heads do not divide"
                if heads
                else f"and a head needs {self.head_channels}"
            )
            raise ValueError(
                f"network.attn_resolutions: there is attention at {resolution}, where the ADM "
                f"network is {width} channels wide, {why}. Change network.model_channels"
                + ("" if always else f" or leave {resolution} out")
            )


class BrickConfig(Section):
    """One brick: side of its patches and of its tokens in pixels, number of blocks."""

    size: Side = Field(description="side of a brick's patches, pixels")
    patch: Side = Field(2, description="side of a token, pixels")
    depth: Depth = Field(description="number of blocks")

    @model_validator(mode="after")
    def _tokens_fit(self) -> Self:
        if self.size % self.patch:
            raise ValueError(f"size ({self.size}) must be a multiple of patch ({self.patch})")
        return self


class LegoConfig(NetworkSection):
    """LEGO bricks (Zheng et al. 2024): a stack of transformers on patches of several sizes."""

    own_coordinates = True

    kind: Literal["lego"] = "lego"
    bricks: tuple[BrickConfig, ...] = Field(
        min_length=1, max_length=32, description="first to last"
    )
    width: Width = Field(384, description="of the tokens; a multiple of heads and of 4")
    heads: Width = Field(6, description="of attention")
    mlp_ratio: PositiveFloat = Field(
        4, le=1024, description="width of a block's perceptron, as a multiple"
    )
    joint: bool = Field(True, description="train every brick's output, so that bricks can skip")
    positions: Literal["fixed", "learned"] = Field(
        "fixed", description="table of token positions; learned in the released models"
    )

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"width ({self.width}) must be a multiple of heads ({self.heads}) and of 4"
            )
        return self

    @property
    def stages(self) -> int:
        return len(self.bricks) if self.joint else 1

    @property
    def sampling_options(self) -> Section:
        return BricksConfig()

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if math.lcm(*(brick.size for brick in self.bricks)) > 2**20:
            raise ValueError("bricks: no canvas that is not huge is tiled by all of these sizes")
        tokens = sum((brick.size // brick.patch) ** 2 for brick in self.bricks)
        if tokens * self.width > 2**26:
            raise ValueError(
                f"bricks: their patches have {tokens:,} tokens of width {self.width}, which is "
                "more than can be attended to. Make size smaller, or patch larger"
            )
        return self

    def fits(self, side: int) -> bool:
        return tiled(side, ((brick.size, brick.patch) for brick in self.bricks))

    @property
    def sides(self) -> str:
        step = math.lcm(*(brick.size for brick in self.bricks))
        # From the largest brick on, only multiples of all fit.
        largest = max(brick.size for brick in self.bricks)
        small = [str(side) for side in range(1, largest) if self.fits(side)]
        small = small if len(small) <= 16 else [*small[:16], "…"]
        sizes = " or ".join([f"a multiple of {step}", *([", ".join(small)] if small else [])])
        return f"{sizes}, to be tiled by network.bricks"


class PatchedUNetConfig(NetworkSection):
    """The patched U-Net (Luhman & Luhman 2022): a U-Net on P x P patches as pixels."""

    takes_image = True

    kind: Literal["patched_unet"] = "patched_unet"
    patch_size: Factor = Field(4, description="side P of a patch, pixels; 1 for none")
    model_channels: Width = Field(
        128, description="channels of the first level, where channel_mult is 1"
    )
    channel_mult: Annotated[tuple[Annotated[float, Field(gt=0, le=1024)], ...], Listed] = Field(
        (),
        max_length=16,
        description="widths as multiples, fractions allowed; empty: by the patched grid",
    )
    num_blocks: Blocks = Field(2, description="residual blocks of a level")
    attn_resolutions: Resolutions = Field(
        (16, 8), description="sides of the patched grid with self-attention"
    )
    heads: Width = Field(4, description="of attention")
    decoder_heads: Width | None = Field(None, description="null: as many as heads")
    head_channels: Width | None = Field(None, description="width of a head, not a number")
    attention_order: Literal["split", "legacy"] = Field(
        "split", description="rows of the qkv weight; legacy: head by head"
    )
    resblock_updown: bool = Field(False, description="resample inside of residual blocks")
    dropout: Probability = Field(0.0, description="share of features dropped while training")
    null_class: bool = Field(True, description="learn an embedding of no class, for guidance")
    learn_variance: bool = Field(False, description="a head for the variance of reverse steps")
    eps: PositiveFloat = Field(1e-5, description="of the affine group norms")
    groups: Literal[32] | None = Field(
        32, description="of the group norms; null: a quarter of the channels, at most 32"
    )
    recompute: bool = Field(False, description="recompute blocks going back, for less memory")

    @property
    def learns_variance(self) -> bool:
        return self.learn_variance

    def fits(self, side: int) -> bool:
        return halved(side, len(self.channel_mult), self.patch_size)

    @property
    def sides(self) -> str:
        levels = len(self.channel_mult)
        return (
            f"a multiple of {self.patch_size << max(levels - 1, 0)}, because network.patch_size is "
            f"{self.patch_size} and network.channel_mult has {levels} levels"
        )


class ExternalNetworkConfig(NetworkSection):
    """A network of the caller's own: `Parts.network` makes it."""

    takes_image = True
    external = True

    kind: Literal["external"] = "external"
    name: str = Field("", description="for people who read the recipe")
    options: Options = Field({}, description="keyword arguments of the function")
    multiple: Side = Field(1, description="height and width must be a multiple of it")

    def fits(self, side: int) -> bool:
        return side > 0 and side % self.multiple == 0

    @property
    def sides(self) -> str:
        return f"a multiple of {self.multiple} (network.multiple)"


NetworkConfig = Annotated[
    SongUNetConfig
    | AdmUNetConfig
    | LegoConfig
    | PatchedUNetConfig
    | DiTConfig
    | EnergyDiTConfig
    | MarConfig
    | ExternalNetworkConfig,
    Field(discriminator="kind"),
]

"""The networks, and which sides of images they take."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from tessera.recipes.schema.base import Listed, Probability, Section


class UNetSection(Section):
    """What every U-Net has."""

    channel_mult: Annotated[tuple[PositiveInt, ...], Listed] = ()

    def fits(self, side: int) -> bool:
        """Whether the network takes images of this height or width."""
        return side % (1 << (len(self.channel_mult) - 1)) == 0

    @property
    def sides(self) -> str:
        """Which heights and widths it takes, and why."""
        levels = len(self.channel_mult)
        return (
            f"a multiple of {2 ** (levels - 1)}, because network.channel_mult has {levels} levels"
        )


class SongUNetConfig(UNetSection):
    """DDPM++ and NCSN++ (Song et al. 2021), as in EDM."""

    kind: Literal["song_unet"] = "song_unet"
    model_channels: PositiveInt = 128
    channel_mult: Annotated[tuple[PositiveInt, ...], Listed] = (1, 2, 2, 2)
    channel_mult_emb: PositiveInt = 4
    num_blocks: PositiveInt = 4
    attn_resolutions: Annotated[tuple[PositiveInt, ...], Listed] = (16,)
    dropout: Probability = 0.10
    embedding: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: PositiveInt = 1
    encoder: Literal["standard", "skip", "residual"] = "standard"
    decoder: Literal["standard", "skip"] = "standard"
    resample_filter: Annotated[tuple[int, ...], Listed] = (1, 1)
    implicit_mlp: bool = Field(
        False, description="a pixel-wise perceptron before the first 3x3 convolution"
    )


class AdmUNetConfig(UNetSection):
    """The ADM U-Net (Dhariwal & Nichol 2021), as in EDM."""

    kind: Literal["adm_unet"] = "adm_unet"
    model_channels: PositiveInt = 192
    channel_mult: Annotated[tuple[PositiveInt, ...], Listed] = (1, 2, 3, 4)
    channel_mult_emb: PositiveInt = 4
    num_blocks: PositiveInt = 3
    attn_resolutions: Annotated[tuple[PositiveInt, ...], Listed] = (32, 16, 8)
    dropout: Probability = 0.10


class BrickConfig(Section):
    """One brick: side of its patches and of its tokens in pixels, number of blocks."""

    size: PositiveInt
    patch: PositiveInt = 2
    depth: PositiveInt

    @model_validator(mode="after")
    def _tokens_fit(self) -> Self:
        if self.size % self.patch:
            raise ValueError(f"size ({self.size}) must be a multiple of patch ({self.patch})")
        return self


class LegoConfig(Section):
    """LEGO bricks (Zheng et al. 2024): a stack of transformers on patches of several sizes."""

    kind: Literal["lego"] = "lego"
    bricks: tuple[BrickConfig, ...] = Field(min_length=1, description="first to last")
    width: PositiveInt = Field(384, description="of the tokens; a multiple of heads and of 4")
    heads: PositiveInt = 6
    mlp_ratio: PositiveFloat = 4
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

    def fits(self, side: int) -> bool:
        """Whether the bricks tile a canvas of this height or width; see `networks.lego.Lego`."""
        return all(side % (b.patch if side < b.size else b.size) == 0 for b in self.bricks)

    @property
    def sides(self) -> str:
        """Which heights and widths fit, and why."""
        step = math.lcm(*(brick.size for brick in self.bricks))
        small = [str(side) for side in range(1, step) if self.fits(side)]
        sizes = " or ".join([f"a multiple of {step}", *([", ".join(small)] if small else [])])
        return f"{sizes}, to be tiled by network.bricks"


class PatchedUNetConfig(Section):
    """The patched U-Net (Luhman & Luhman 2022): a U-Net on P x P patches as pixels."""

    kind: Literal["patched_unet"] = "patched_unet"
    patch_size: PositiveInt = Field(4, description="side P of a patch, pixels; 1 for none")
    model_channels: PositiveInt = 128
    channel_mult: Annotated[tuple[PositiveFloat, ...], Listed] = Field(
        (), description="widths as multiples, fractions allowed; empty: by the patched grid"
    )
    num_blocks: PositiveInt = 2
    attn_resolutions: Annotated[tuple[PositiveInt, ...], Listed] = Field(
        (16, 8), description="sides of the patched grid with self-attention"
    )
    heads: PositiveInt = 4
    decoder_heads: PositiveInt | None = Field(None, description="null: as many as heads")
    head_channels: PositiveInt | None = Field(None, description="width of a head, not a number")
    attention_order: Literal["split", "legacy"] = Field(
        "split", description="rows of the qkv weight; legacy: head by head"
    )
    resblock_updown: bool = Field(False, description="resample inside of residual blocks")
    dropout: Probability = 0.0
    null_class: bool = Field(True, description="learn an embedding of no class, for guidance")
    learn_variance: bool = Field(False, description="a head for the variance of reverse steps")
    eps: PositiveFloat = Field(1e-5, description="of the affine group norms")
    recompute: bool = Field(False, description="recompute blocks going back, for less memory")

    def fits(self, side: int) -> bool:
        """Whether the network takes images of this height or width."""
        levels = len(self.channel_mult)
        return side % (self.patch_size << max(levels - 1, 0)) == 0

    @property
    def sides(self) -> str:
        """Which heights and widths it takes, and why."""
        levels = len(self.channel_mult)
        return (
            f"a multiple of {self.patch_size << max(levels - 1, 0)}, because network.patch_size is "
            f"{self.patch_size} and network.channel_mult has {levels} levels"
        )


NetworkConfig = Annotated[
    SongUNetConfig | AdmUNetConfig | LegoConfig | PatchedUNetConfig, Field(discriminator="kind")
]

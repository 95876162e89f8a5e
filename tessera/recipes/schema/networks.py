"""The networks, and which sides of images they take."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from tessera.networks.mar_sizes import MAR_SIZES, MarSize
from tessera.networks.presets import SIZES, Preset
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
from tessera.recipes.schema.options import BricksConfig

Levels = Annotated[tuple[Factor, ...], Listed, Field(min_length=1, max_length=16)]
Blocks = Annotated[int, Field(gt=0, le=64)]
Resolutions = Annotated[tuple[Side, ...], Listed, Field(max_length=64)]


class NetworkSection(Section):
    """What every network says of itself; rules of recipes ask for that, and not for kinds."""

    own_coordinates: ClassVar[bool] = False
    """Knows where its pixels lie by itself; others get coordinates as input if a recipe asks."""

    takes_image: ClassVar[bool] = False
    """Takes a picture to start from as further channels of its input."""

    has_energy: ClassVar[bool] = False
    """Its output is the gradient of an energy, on which samples can descend."""

    external: ClassVar[bool] = False
    """The caller's own: nothing is known of it."""

    @property
    def learns_step_size(self) -> bool:
        """Whether the step size of descent on its energy is a parameter."""
        return False

    @property
    def recomputes(self) -> bool:
        """Whether it computes blocks again going back, for less memory."""
        return False

    family: ClassVar[str] = "denoiser"
    """Of which kind of model it is the network; objective and sampler must be of the same."""

    @property
    def learns_variance(self) -> bool:
        """Whether it has an output for the variance of reverse steps."""
        return False

    @property
    def has_stages(self) -> bool:
        """Whether it gives out several estimates, so that it can be cut short."""
        return False

    @property
    def sampling_options(self) -> Section | None:
        """What it can do while sampling, with the defaults; None for nothing."""
        return None

    def fits(self, side: int) -> bool:
        """Whether the network takes images of this height or width."""
        raise NotImplementedError

    @property
    def sides(self) -> str:
        """Which heights and widths it takes, and why."""
        raise NotImplementedError

    def check(self, side: int) -> None:
        """Raise for a side that fits, but at which the network cannot be built.

        Raises:
            ValueError: in words for the user.
        """


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
    model_channels: Width = 128
    channel_mult: Levels = (1, 2, 2, 2)
    channel_mult_emb: Factor = 4
    num_blocks: Blocks = 4
    attn_resolutions: Resolutions = (16,)
    dropout: Probability = 0.10
    embedding: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: Factor = 1
    encoder: Literal["standard", "skip", "residual"] = "standard"
    decoder: Literal["standard", "skip"] = "standard"
    resample_filter: Annotated[tuple[int, ...], Listed, Field(max_length=64)] = (1, 1)
    implicit_mlp: bool = Field(
        False, description="a pixel-wise perceptron before the first 3x3 convolution"
    )


class AdmUNetConfig(UNetSection):
    """The ADM U-Net (Dhariwal & Nichol 2021), as in EDM."""

    kind: Literal["adm_unet"] = "adm_unet"
    model_channels: Width = 192
    channel_mult: Annotated[
        tuple[Factor | Annotated[float, Field(gt=0, le=1024)], ...],
        Listed,
        Field(min_length=1, max_length=16),
    ] = (1, 2, 3, 4)
    channel_mult_emb: Factor = 4
    num_blocks: Blocks = 3
    attn_resolutions: Resolutions = (32, 16, 8)
    dropout: Probability = 0.10
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

    size: Side
    patch: Side = 2
    depth: Depth

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
    heads: Width = 6
    mlp_ratio: PositiveFloat = Field(4, le=1024)
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
    def has_stages(self) -> bool:
        return self.joint

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
    model_channels: Width = 128
    channel_mult: Annotated[tuple[Annotated[float, Field(gt=0, le=1024)], ...], Listed] = Field(
        (),
        max_length=16,
        description="widths as multiples, fractions allowed; empty: by the patched grid",
    )
    num_blocks: Blocks = 2
    attn_resolutions: Resolutions = Field(
        (16, 8), description="sides of the patched grid with self-attention"
    )
    heads: Width = 4
    decoder_heads: Width | None = Field(None, description="null: as many as heads")
    head_channels: Width | None = Field(None, description="width of a head, not a number")
    attention_order: Literal["split", "legacy"] = Field(
        "split", description="rows of the qkv weight; legacy: head by head"
    )
    resblock_updown: bool = Field(False, description="resample inside of residual blocks")
    dropout: Probability = 0.0
    null_class: bool = Field(True, description="learn an embedding of no class, for guidance")
    learn_variance: bool = Field(False, description="a head for the variance of reverse steps")
    eps: PositiveFloat = Field(1e-5, description="of the affine group norms")
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


Size = Literal[
    "S/1", "S/2", "S/4", "S/8", "B/1", "B/2", "B/4", "B/8",
    "L/1", "L/2", "L/4", "L/8", "XL/1", "XL/2", "XL/4", "XL/8",
]  # fmt: skip
"""The published sizes of diffusion transformers, and the side of a token."""


class TransformerSection(NetworkSection):
    """What all diffusion transformers have."""

    own_coordinates = True
    takes_image = True

    size: Size = Field("S/2", description="published size, and side of a token in pixels")
    patch: Factor | None = Field(None, description="side of a token, pixels; null: of the size")
    depth: Depth | None = Field(None, description="number of blocks; null: of the size")
    width: Width | None = Field(None, description="of the tokens; null: of the size")
    heads: Width | None = Field(None, description="of attention; null: of the size")
    mlp_ratio: PositiveFloat = Field(4, le=1024)
    recompute: bool = Field(False, description="recompute blocks going back, for less memory")

    @property
    def token(self) -> int:
        """Side of a token, pixels."""
        return self.patch or int(self.size.split("/")[1])

    @property
    def dimensions(self) -> Preset:
        """Depth, width and heads."""
        named = SIZES[self.size.split("/")[0]]
        return Preset(
            self.depth or named.depth, self.width or named.width, self.heads or named.heads
        )

    @property
    def recomputes(self) -> bool:
        return self.recompute

    def fits(self, side: int) -> bool:
        return side > 0 and side % self.token == 0

    @property
    def sides(self) -> str:
        return f"a multiple of {self.token}, the side of a token (network.size, network.patch)"

    def check(self, side: int) -> None:
        tokens, width = (side // self.token) ** 2, self.dimensions.width
        if tokens * width > 2**26:
            raise ValueError(
                f"network: {tokens:,} tokens of width {width} are more than can be attended to. "
                "Make network.patch larger"
            )

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        _, width, heads = self.dimensions
        if width % heads or width % 4:
            raise ValueError(f"width ({width}) must be a multiple of heads ({heads}) and of 4")
        return self


class DiTConfig(TransformerSection):
    """The diffusion transformer (Peebles & Xie 2023)."""

    kind: Literal["dit"] = "dit"
    learn_variance: bool = Field(False, description="a head for the variance of reverse steps")

    @property
    def learns_variance(self) -> bool:
        return self.learn_variance


class EnergyDiTConfig(TransformerSection):
    """The diffusion transformer as a scalar energy, whose gradient is its output."""

    has_energy = True

    kind: Literal["energy_dit"] = "energy_dit"
    head: Literal["mean_then_linear", "linear_then_mean"] = Field(
        "mean_then_linear", description="two layers on the mean of all tokens, or their mean"
    )
    multiplier: PositiveFloat = Field(
        1, description="of the gradient; the number of tokens is well scaled"
    )
    step_size: PositiveFloat = Field(0.01, description="of descent, while sampling and training")
    learn_step_size: bool = Field(False, description="train it, by energy.refinement")
    step_size_lr: PositiveFloat = Field(1, description="multiplier of the step size's rate")
    attention: Literal["recompute", "explicit", "math"] = Field(
        "recompute",
        description="second derivatives: weights anew, all results kept, or PyTorch's own",
    )

    @property
    def learns_step_size(self) -> bool:
        return self.learn_step_size

    @model_validator(mode="after")
    def _rate_is_used(self) -> Self:
        if self.step_size_lr != 1 and not self.learn_step_size:
            raise ValueError(
                "step_size_lr is the learning rate of a step size that is learned: set "
                "learn_step_size=true, or leave it out"
            )
        return self


class MarConfig(NetworkSection):
    """MAR (Li et al. 2024): encoder and decoder of masked tokens, and a head that makes tokens."""

    family = "masked"

    kind: Literal["mar"] = "mar"
    size: Literal["base", "large", "huge"] = Field("base", description="published size")
    patch: Factor = Field(1, description="side of a token in model space, pixels")
    width: Width | None = Field(None, description="of the encoder's tokens; null: of the size")
    depth: Factor | None = Field(None, description="blocks of the encoder; null: of the size")
    heads: Width | None = Field(None, description="of its attention; null: of the size")
    decoder_width: Width | None = Field(None, description="null: as the encoder")
    decoder_depth: Factor | None = Field(None, description="null: as the encoder")
    decoder_heads: Width | None = Field(None, description="null: as the encoder")
    mlp_ratio: PositiveFloat = Field(4, le=1024)
    buffer: Factor = Field(64, description="copies of the class before the encoder's tokens")
    attn_dropout: float = Field(0.1, ge=0, lt=1, description="of attention weights")
    dropout: float = Field(0.1, ge=0, lt=1, description="after attention and within MLPs")
    head_width: Width | None = Field(None, description="of the head; null: of the size")
    head_depth: Factor | None = Field(None, description="blocks of the head; null: of the size")

    @property
    def dimensions(self) -> MarSize:
        """Of the encoder and the head."""
        named = MAR_SIZES[self.size]
        return MarSize(*(getattr(self, name) or getattr(named, name) for name in named._fields))

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        own = self.dimensions
        pairs = {
            "": (own.width, own.heads),
            "decoder_": (self.decoder_width or own.width, self.decoder_heads or own.heads),
        }
        for name, (width, heads) in pairs.items():
            if width % heads:
                raise ValueError(
                    f"{name}width ({width}) must be a multiple of {name}heads ({heads})"
                )
        return self

    def fits(self, side: int) -> bool:
        return side > 0 and side % self.patch == 0

    @property
    def sides(self) -> str:
        return f"a multiple of {self.patch}, the side of a token (network.patch)"

    def check(self, side: int) -> None:
        tokens = (side // self.patch) ** 2
        if tokens < 2 or tokens * self.dimensions.width > 2**26:
            raise ValueError(
                f"network.patch ({self.patch}) makes {tokens:,} token(s) of an image of side "
                f"{side}; make it {'smaller' if tokens < 2 else 'larger'}"
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

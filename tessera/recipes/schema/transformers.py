"""The transformers on tokens of whole images: DiT, its energy, and MAR."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from tessera.networks.mar_sizes import MAR_SIZES, MarSize
from tessera.networks.presets import SIZES, Preset
from tessera.recipes.schema.base import Depth, Factor, Width
from tessera.recipes.schema.network import NetworkSection

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
    mlp_ratio: PositiveFloat = Field(
        4, le=1024, description="width of a block's perceptron, as a multiple"
    )
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
    mlp_ratio: PositiveFloat = Field(
        4, le=1024, description="width of a block's perceptron, as a multiple"
    )
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

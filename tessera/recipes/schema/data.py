"""Images: where they come from, the space they are modelled in, and what of them is trained on."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    FiniteFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from tessera.channels import MAX_CHANNELS
from tessera.precision import Precision
from tessera.recipes.schema.base import (
    Factor,
    Listed,
    NonNegative,
    Probability,
    Section,
    Side,
    UserPath,
)


class DataConfig(Section):
    """The training images and how they are read."""

    path: UserPath | None = Field(
        None,
        description="archive (.zip), packed set or image folder; with a VAE: latents, or images "
        "(codec.encode)",
    )
    resolution: Side = Field(description="height and width of the images, pixels")
    shrink: Factor = Field(
        1,
        description="train on means of blocks of so many pixels or latents a side",
    )
    channels: int = Field(
        3, ge=1, le=MAX_CHANNELS, description="of the images: 1 for grey, 3 for RGB; up to 64"
    )
    num_classes: int = Field(0, ge=0, le=10**7, description="0 trains without labels")
    xflip: bool = Field(False, description="double the set by mirrored copies")
    max_images: PositiveInt | None = Field(None, description="train on a random subset")
    validation: UserPath | None = Field(
        None, description="set like that at path, on which the loss is measured"
    )
    held_out: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="share of the images at path that is measured on and not trained on"
    )
    order: Literal["epochs", "windowed"] = Field(
        "epochs", description="a fresh shuffle each epoch, or EDM's windowed shuffle"
    )
    cache: bool = Field(False, description="keep decoded images in memory")
    workers: int = Field(
        2, ge=0, le=1024, description="threads that read ahead; 0 reads in the training step"
    )

    @model_validator(mode="after")
    def _one_validation(self) -> Self:
        if self.validation is not None and self.held_out is not None:
            raise ValueError("give validation, another set, or held_out, a share of this one")
        return self

    @property
    def validates(self) -> bool:
        """Whether there are images that are not trained on."""
        return self.validation is not None or self.held_out is not None


class CodecSection(Section):
    """What every codec says of the space that it makes."""

    of_pixels: ClassVar[bool] = True
    """Its values are pixels, bounded by [-1, 1]; others are not bounded."""

    @property
    def takes_images(self) -> bool:
        """The data set holds images, and not what this codec has made of them before."""
        return True

    @property
    def space(self) -> CodecSection:
        """What decides what samples mean, without how a training comes by them."""
        return self

    def shape(self, data: DataConfig) -> tuple[int, int, int]:
        """(C, H, W) of images in model space."""
        return data.channels, data.resolution, data.resolution

    def check(self, data: DataConfig) -> None:
        """Raise for images that it cannot encode.

        Raises:
            ValueError: in words for the user.
        """


class PixelCodecConfig(CodecSection):
    """uint8 pixels to [-1, 1]."""

    kind: Literal["pixels"] = "pixels"


class VaeCodecConfig(CodecSection):
    """The latents of a variational autoencoder, (z - shift) * scale; data.path is a set of them.

    Or of images, which are encoded in the step. The defaults are those of Stable Diffusion's.
    """

    of_pixels = False

    kind: Literal["vae"] = "vae"
    model: UserPath = Field(
        "stabilityai/sd-vae-ft-ema",
        description="folder or Hugging Face id of an AutoencoderKL of diffusers",
    )
    channels: Factor = Field(4, description="of the latents")
    downsample: Factor = Field(8, description="side of the images / side of the latents")
    scale: PositiveFloat | Literal["data"] = Field(
        0.18215, description="factor of the latents; data: such that their standard deviation is 1"
    )
    shift: FiniteFloat | Literal["data"] = Field(
        0.0, description="taken off before scaling; data: their mean"
    )
    weights: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 of the VAE's weights; by default of the VAE that made the set",
    )
    encode: Literal["cached", "online"] = Field(
        "cached",
        description="cached: data.path holds latents; online: images, encoded in every step",
    )
    precision: Precision = Field("fp32", description="of the encoder, with encode=online")
    micro_batch: PositiveInt | None = Field(
        None, description="images encoded at once, with encode=online; null: by their size"
    )

    @property
    def takes_images(self) -> bool:
        return self.encode == "online"

    @property
    def space(self) -> CodecSection:
        return self.model_copy(
            update={"encode": "cached", "precision": "fp32", "micro_batch": None, "weights": None}
        )

    def shape(self, data: DataConfig) -> tuple[int, int, int]:
        side = data.resolution // self.downsample
        return self.channels, side, side

    def check(self, data: DataConfig) -> None:
        if self.encode == "cached" and (self.precision != "fp32" or self.micro_batch is not None):
            raise ValueError(
                "codec.precision and codec.micro_batch are those of the encoder in the step: set "
                "codec.encode=online, or leave them out"
            )
        if data.channels != 3:
            raise ValueError("codec.kind=vae makes latents of RGB images; set data.channels=3")
        if data.resolution % self.downsample:
            raise ValueError(
                f"data.resolution ({data.resolution}) must be a multiple of codec.downsample "
                f"({self.downsample}), because each latent pixel stands for so many of the image"
            )


CodecConfig = Annotated[PixelCodecConfig | VaeCodecConfig, Field(discriminator="kind")]


class ViewSection(Section):
    """What every view says of itself."""

    @property
    def crops(self) -> bool:
        """Trains on parts of images."""
        return False

    @property
    def needs_coordinates(self) -> bool:
        """The network is told where pixels lie: of parts of images, or of means of blocks."""
        return self.crops


class FullViewConfig(ViewSection):
    """Every step trains on whole images."""

    kind: Literal["full"] = "full"


class PatchViewConfig(ViewSection):
    """Every step trains on random patches of one size, and where they lie (Patch Diffusion)."""

    kind: Literal["patches"] = "patches"
    real_p: Probability = Field(0.5, description="probability of the largest size")
    sizes: Annotated[tuple[Side, ...], Listed, Field(max_length=64)] | None = Field(
        None, description="sides from small to large; null: R/4, R/2, R (latents: R/2, R)"
    )
    probabilities: Annotated[tuple[Probability, ...], Listed] | None = Field(
        None, description="of the sizes; null: from real_p"
    )
    multipliers: Annotated[tuple[Factor, ...], Listed] | None = Field(
        None, description="batches of a step, for each size s; null: R / s"
    )
    schedule: Literal["stochastic", "progressive"] = Field(
        "stochastic", description="a size drawn for each step, or from small to large"
    )
    per_pixel: bool = Field(
        False, description="give a patch the weight of a full image, not that of its pixels"
    )

    @property
    def crops(self) -> bool:
        return True


class BandConfig(Section):
    """Noise levels up to the next band's, and what of an image is seen there."""

    below: PositiveFloat | None = Field(
        None, description="noise level that the band ends at; null: it is the last one"
    )
    factor: Factor = Field(
        1, description="see means of blocks of so many pixels a side; 1: the pixels"
    )
    crop: Side | None = Field(
        None, description="train on crops of so many pixels a side; null: whole images"
    )
    halo: int = Field(
        0, ge=0, le=2**13, description="pixels at a crop's border that are seen without any loss"
    )
    bricks: Factor | None = Field(
        None, description="run and train so many bricks of a stack only, the first; null: all"
    )
    share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="of the steps; null: that of its noise levels in the objective"
    )
    multiplier: Factor | None = Field(
        None, description="batches of a step; null: the images' side / that of what is seen"
    )

    @model_validator(mode="after")
    def _sees_one_thing(self) -> Self:
        if self.crop is not None and self.factor > 1:
            raise ValueError(
                "a band sees a crop (crop) or the means of blocks (factor), not both at once"
            )
        if self.halo and self.crop is None:
            raise ValueError("halo is the border of a crop; set crop, or leave it out")
        if self.crop is not None and self.crop <= 2 * self.halo:
            raise ValueError(
                f"a crop of {self.crop} pixels has nothing inside of a halo of {self.halo}; make "
                "it larger than two halos"
            )
        return self


class BandsViewConfig(ViewSection):
    """Every step trains on a band of noise levels, on as many pixels as it is worth seeing there.

    What is minimised is the same as with whole images, whatever the shares of the bands.
    """

    kind: Literal["bands"] = "bands"
    bands: Annotated[tuple[BandConfig, ...], Field(min_length=1, max_length=16)] = Field(
        description="from low noise to high"
    )

    @property
    def crops(self) -> bool:
        return any(band.crop is not None for band in self.bands)

    @property
    def needs_coordinates(self) -> bool:
        return self.crops or self.coarse

    @property
    def coarse(self) -> bool:
        """Whether means of blocks are seen anywhere."""
        return any(band.factor > 1 for band in self.bands)

    @property
    def one_denoiser(self) -> bool:
        """Whether estimates are made in the same way in all bands."""
        return not self.coarse and all(band.bricks is None for band in self.bands)

    @property
    def sigma_ranges(self) -> list[tuple[float, float]]:
        """low <= σ < high of each band."""
        ends = [band.below for band in self.bands[:-1] if band.below is not None]
        return list(itertools.pairwise([0.0, *ends, math.inf]))

    @model_validator(mode="after")
    def _bands_follow(self) -> Self:
        ends = [band.below for band in self.bands]
        rising = [end for end in ends[:-1] if end is not None]
        if ends[-1] is not None or len(rising) < len(ends) - 1 or rising != sorted(set(rising)):
            raise ValueError(
                "every band but the last one ends at a noise level (below), and these rise: "
                "[{below: 0.8}, {factor: 2}]"
            )
        shares = [band.share for band in self.bands if band.share is not None]
        if shares and len(shares) < len(self.bands):
            raise ValueError("give all bands a share of the steps, or none")
        if shares and abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"the bands' shares add up to {sum(shares):g}; they must make 1")
        return self


class AutoViewConfig(ViewSection):
    """The bands of coarse images that the training images ask for (`tessera plan`).

    A run looks at them before its first step; its recipe then says `bands`.
    """

    kind: Literal["auto"] = "auto"
    bound: float = Field(
        1.03, gt=1, le=10, description="error that is accepted, of the best linear denoiser's"
    )

    @property
    def needs_coordinates(self) -> bool:
        return True


def _by_kind(value: Any) -> Any:
    """`view=auto` for `view.kind=auto`."""
    return {"kind": value} if isinstance(value, str) else value


ViewConfig = Annotated[
    FullViewConfig | PatchViewConfig | BandsViewConfig | AutoViewConfig,
    Field(discriminator="kind"),
    BeforeValidator(_by_kind),
]


class CoordsConfig(Section):
    """The position of each pixel in the full image, as further channels of the network's input."""

    frequencies: int = Field(
        0, ge=0, le=32, description="0: x and y; F: sines and cosines at 2^0, ..., 2^(F-1)"
    )


class AugmentConfig(Section):
    """Non-leaky augmentation (EDM, section F.2): multipliers of `p` per transform; 0 = absent."""

    p: Probability = Field(0.12, description="probability of each transform")
    xflip: NonNegative = Field(
        1e8, description="mirrored left to right; 1e8 of p: half of all images"
    )
    yflip: NonNegative = Field(1, description="mirrored top to bottom")
    rotate_int: NonNegative = Field(0, description="turned by multiples of 90 degrees")
    translate_int: NonNegative = Field(0, description="moved by whole pixels")
    translate_int_max: NonNegative = Field(0.125, description="farthest, as a share of the side")
    scale: NonNegative = Field(1, description="scaled alike in both directions")
    scale_std: NonNegative = Field(0.2, description="spread of the factor, in powers of 2")
    rotate_frac: NonNegative = Field(1, description="turned by any angle")
    rotate_frac_max: NonNegative = Field(1, description="largest angle, as a share of 180 degrees")
    aniso: NonNegative = Field(1, description="stretched in one direction and shrunk in the other")
    aniso_std: NonNegative = Field(0.2, description="spread of the factor, in powers of 2")
    aniso_rotate_prob: Probability = Field(
        0.5, description="probability that the direction is not an axis"
    )
    translate_frac: NonNegative = Field(1, description="moved by any distance")
    translate_frac_std: NonNegative = Field(
        0.125, description="spread of the distance, as a share of the side"
    )
    brightness: NonNegative = Field(0, description="made brighter or darker")
    brightness_std: NonNegative = Field(0.2, description="spread of what is added")
    contrast: NonNegative = Field(0, description="contrast changed")
    contrast_std: NonNegative = Field(0.5, description="spread of the factor, in powers of 2")
    lumaflip: NonNegative = Field(0, description="light and dark swapped, colours kept")
    hue: NonNegative = Field(0, description="colours turned")
    hue_max: NonNegative = Field(1, description="largest angle, as a share of 180 degrees")
    saturation: NonNegative = Field(0, description="colours made stronger or paler")
    saturation_std: NonNegative = Field(1, description="spread of the factor, in powers of 2")

    @property
    def label_dim(self) -> int:
        """Number of augmentation labels that the network sees."""
        widths = {
            "xflip": 1, "yflip": 1, "rotate_int": 2, "translate_int": 2, "scale": 1,
            "rotate_frac": 2, "aniso": 2, "translate_frac": 2, "brightness": 1, "contrast": 1,
            "lumaflip": 1, "hue": 2, "saturation": 1,
        }  # fmt: skip
        return sum(width for name, width in widths.items() if getattr(self, name) > 0)

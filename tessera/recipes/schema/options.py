"""What may be said of a sample beside its sampler; sections of `tessera sample RUN key=value`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from tessera.recipes.schema.base import Listed, NonNegative, Probability, Section, Usual

Share = Annotated[float, Field(ge=0, lt=1)]


def _sides(value: Any) -> Any:
    """`64x96` for 64,96."""
    return value.lower().replace("x", ",") if isinstance(value, str) else value


Sides = Annotated[tuple[PositiveInt, PositiveInt], Listed, BeforeValidator(_sides)]


class GuidanceConfig(Section):
    """Guidance by the model without class, or by a weaker model."""

    guidance: Annotated[float, Usual(0, 8)] = Field(1.0, description="weight; 1 is none")
    guidance_interval: Annotated[tuple[NonNegative, NonNegative], Listed] | None = Field(
        None, description="LOW,HIGH: noise levels where it acts; none: all"
    )

    @model_validator(mode="after")
    def _interval_rises(self) -> Self:
        interval = self.guidance_interval
        if interval is not None and not interval[0] < interval[1]:
            raise ValueError(
                f"`guidance_interval={interval[0]:g},{interval[1]:g}`: give the lower noise level "
                "first, then the higher one"
            )
        return self


class LargerConfig(Section):
    """A whole picture of another size than trained."""

    size: Annotated[Sides | None, Usual()] = Field(
        None, description="HEIGHTxWIDTH in pixels of model space"
    )
    layout: Literal["tiles", "pad", "windows"] = Field(
        "tiles",
        description="tiles: by the network as it is; pad: on a canvas that fits, then cut; "
        "windows: by overlapping windows as trained",
    )
    overlap: Share = Field(0.5, description="share of a window that its neighbour sees, too")

    @model_validator(mode="after")
    def _have_a_size(self) -> Self:
        if self.size is None and (self.layout, self.overlap) != ("tiles", 0.5):
            raise ValueError(
                "`layout` and `overlap` say how a larger picture is made: give `size`, too"
            )
        if self.overlap != 0.5 and self.layout != "windows":
            raise ValueError("`overlap` is that of windows: give `layout=windows`, too")
        return self


class CanvasConfig(LargerConfig):
    """Which part of the picture is made, by models that know where their pixels lie."""

    window: Annotated[tuple[int, int, PositiveInt, PositiveInt], Listed] | None = Field(
        None, description="X,Y,WIDTH,HEIGHT in the whole picture; beyond it, the model extrapolates"
    )
    resolution: Annotated[int, Field(ge=2)] | None = Field(
        None, description="side of the whole picture; none: as trained"
    )
    window_noise: Literal["crop", "own"] = Field(
        "crop", description="noise of a window: cut from the whole picture's, or its own"
    )
    mask_coords: bool = Field(False, description="tell the model nothing about where pixels lie")

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        window = self.window is not None or self.resolution is not None
        if self.size is not None and (window or self.mask_coords):
            raise ValueError(
                "`size` makes a larger whole picture, and `window`, `resolution` and `mask_coords` "
                "a part of one: give either"
            )
        if self.window_noise != "crop" and not window:
            raise ValueError("`window_noise` is that of a window: give `window`, too")
        return self


class BricksConfig(Section):
    """Which bricks of a stack run."""

    skip: Annotated[Probability, Usual(0, 1)] = Field(
        0.0, description="share of the sampler's steps without the last brick of the stack"
    )
    bricks: str | None = Field(
        None, description="instead: LOW-HIGH:N,... runs N bricks at these noise levels"
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.skip and self.bricks is not None:
            raise ValueError("`skip` and `bricks` both say which bricks run; give one of them")
        return self

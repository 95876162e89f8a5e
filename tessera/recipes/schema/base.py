"""What all parts of a recipe share: strictness, and types of values."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    model_validator,
)

_EPOCHS = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*epochs?")


def _listed(value: Any) -> Any:
    """`1,2,2` and a single number for a list, as people type them on a command line."""
    if isinstance(value, str):
        return [part.strip(" '\"") for part in value.split(",")]
    return [value] if isinstance(value, int | float) else value


def _plain(value: Any, name: str = "options") -> Any:
    """A value that files can hold: as it comes back from there."""
    if isinstance(value, dict):
        return {str(key): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}.{index}") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{name} is {value}: files hold finite numbers only; null may stand for it"
        )
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{name}: numbers of over 18 digits are too large")
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ValueError(
        f"{name} is a {type(value).__name__}: options are what recipe files can hold, which is "
        "numbers, text, true, false, null, lists and sections"
    )


@dataclass(frozen=True)
class Usual:
    """Of an option that people try first: the values that they try; others may be given as well.

    Attributes:
        low, high: of numbers; None where there is no such range.
    """

    low: float | None = None
    high: float | None = None


@dataclass
class Epoch:
    """What turns epochs into images while a recipe is read; the context of its validation.

    Attributes:
        images: of an epoch.
        asked: whether a key was given in epochs.
    """

    images: int
    asked: bool = False


def _in_images(value: Any, info: ValidationInfo) -> Any:
    """`20 epochs` as a number of images."""
    match = _EPOCHS.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return value
    if not isinstance(info.context, Epoch):
        raise ValueError(f"{value!r} needs the data set; read it with load_recipe or parse_recipe")
    info.context.asked = True
    return round(float(match[1]) * info.context.images)


Listed = BeforeValidator(_listed)
InImages = BeforeValidator(_in_images)
"""Of a key that counts images of the run: `20 epochs` is understood, too."""
Images = Annotated[PositiveInt, InImages]
ImagesFromZero = Annotated[int, Field(ge=0), InImages]
HalfLife = Annotated[PositiveFloat, Field(le=1e15), InImages]
Options = Annotated[dict[str, Any], AfterValidator(_plain)]
"""Keyword arguments of a function that makes an external part."""
Probability = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path (or an id of the Hugging Face hub); `~` is the home folder."""

# Far beyond all use, and small enough that what they describe can be counted before it is made.
Side = Annotated[int, Field(gt=0, le=2**14)]
"""Of images and patches, pixels."""
Width = Annotated[int, Field(gt=0, le=2**16)]
"""Of layers, channels."""
Factor = Annotated[int, Field(gt=0, le=1024)]
Depth = Annotated[int, Field(gt=0, le=256)]
"""Number of transformer blocks."""
Clamp = Literal["none", "clean", "noisy"]
"""Of images that descend on an energy, see `diffusion.energy.Clamp`."""
Steps = Annotated[int, Field(gt=0, le=100_000)]
"""Of a process or a sampler."""
SomeSteps = Annotated[Steps, Usual(1, 100)]
"""Of a sampler, of which few are enough."""


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values cannot be changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    @model_validator(mode="after")
    def _countable(self) -> Self:
        for name in type(self).model_fields:
            for value in _numbers(getattr(self, name)):
                if isinstance(value, int) and abs(value) >= 2**63:
                    raise ValueError(f"{name}: numbers of over 18 digits are too large")
                if math.isnan(value):
                    raise ValueError(f"{name}: expected a number, got nan")
        return self


def _numbers(value: Any) -> Sequence[int | float]:
    values = value if isinstance(value, tuple) else (value,)
    return [item for item in values if isinstance(item, int | float)]

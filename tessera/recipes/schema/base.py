"""What all parts of a recipe share: strictness, and types of values."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _listed(value: Any) -> Any:
    """`1,2,2` and a single number for a list, as people type them on a command line."""
    if isinstance(value, str):
        return [part.strip(" '\"") for part in value.split(",")]
    return [value] if isinstance(value, int | float) else value


Listed = BeforeValidator(_listed)
Probability = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path (or an id of the Hugging Face hub); `~` is the home folder."""


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values cannot be changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

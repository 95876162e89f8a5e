"""A user's own parts: what stands behind `kind: external` in a recipe, handed over by the caller.

A recipe names an external part and its options; the function that makes it comes from Python, or
from the module that `tessera train --with` names. No file can cause an import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tessera.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

    from tessera.data.dataset import Dataset
    from tessera.diffusion.objectives import Objective
    from tessera.recipes.schema import Recipe
    from tessera.sampling.core import Refine, Sampler

Function = TypeVar("Function")


@dataclass(frozen=True)
class Parts:
    """Functions that make the external parts of a recipe; each gets the section's `options`.

    Attributes:
        network: (recipe, **options) to a module (x [B, C, H, W], noise [B], `Conditioning`) to raw
            output [B, C, H, W].
        objective: (recipe, **options) to a callable (model, x, conditioning, draws) to terms [B],
            of which "loss" is minimised.
        sampler: (**options) to a `Sampler`.
        refine: (**options) to a hook after each step of a sampler.
        dataset: (recipe) to a `Dataset`, in place of the images at `data.path`.
    """

    network: Callable[..., nn.Module] | None = None
    objective: Callable[..., Objective] | None = None
    sampler: Callable[..., Sampler] | None = None
    refine: Callable[..., Refine] | None = None
    dataset: Callable[[Recipe], Dataset] | None = None

    def need(self, kind: str, key: str) -> Callable[..., Any]:
        """The function that makes a part.

        Args:
            kind: name of the attribute.
            key: of the recipe, which asks for it.

        Raises:
            RecipeError: the caller handed over none.
        """
        function: Callable[..., Any] | None = getattr(self, kind)
        if function is None:
            raise RecipeError(
                f"{key} is external, and no `{kind}` was handed over: give "
                f"parts=Parts({kind}=...) in Python, or `--with MODULE` on the command line, a "
                f"module with a function `{kind}`"
            )
        return function


NO_PARTS = Parts()

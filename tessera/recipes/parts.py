"""A user's own parts: what stands behind `kind: external` in a recipe, handed over by the caller.

A recipe names an external part and its options; the function that makes it comes from Python, or
from the module that `tessera train --with` names. No file can cause an import.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessera import memory
from tessera.errors import RecipeError, TesseraError

if TYPE_CHECKING:
    from torch import nn

    from tessera.data.dataset import Dataset
    from tessera.diffusion.objectives import Objective
    from tessera.recipes.schema import Recipe
    from tessera.sampling.core import Refine, Sampler

_LIBRARY = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Parts:
    """Functions that make the external parts of a recipe; each gets the section's `options`.

    Attributes:
        network: (recipe, `**options`) to a module (x [B, C, H, W], noise [B], `Conditioning`) to
            raw output [B, C, H, W].
        objective: (recipe, `**options`) to a callable (model, x, conditioning, draws) to terms [B],
            of which "loss" is minimised.
        sampler: (`**options`) to a `Sampler`; a hook of `sampling.refine` comes as `refine`.
        refine: (`**options`) to a hook after each step of a sampler.
        dataset: (recipe) to a `Dataset`, in place of the images at `data.path`. It is used
            whenever it is handed over.

    Raises:
        RecipeError: one of them is no function.

    Example:
        >>> from tessera import Parts
        >>> from tessera.sampling.edm import edm_sampler
        >>> parts = Parts(sampler=lambda steps=4: edm_sampler(steps=steps, solver="euler"))
        >>> parts.names
        ['sampler']
    """

    network: Callable[..., nn.Module] | None = None
    objective: Callable[..., Objective] | None = None
    sampler: Callable[..., Sampler] | None = None
    refine: Callable[..., Refine] | None = None
    dataset: Callable[[Recipe], Dataset] | None = None

    def __post_init__(self) -> None:
        for name in self.names:
            given = getattr(self, name)
            # Modules can be called, too, but not to make one.
            made = hasattr(given, "state_dict") and not isinstance(given, type)
            if made or not callable(given):
                raise RecipeError(
                    f"the own part {name!r} is {a_kind(given)}; give a function that makes it"
                )

    @property
    def names(self) -> list[str]:
        """Which parts were handed over."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def make(self, kind: str, key: str, *arguments: Any, **options: Any) -> Any:
        """A part, made by the function that was handed over.

        Args:
            kind: name of the attribute.
            key: of the recipe, which asks for it.
            arguments, options: of the function.

        Raises:
            RecipeError: the caller handed over none, or it raised something; the message says what
                and where.
        """
        function = getattr(self, kind)
        if function is None:
            raise _missing({kind: key})
        with blame(kind):
            return function(*arguments, **options)

    def check(self, recipe: Recipe) -> None:
        """Check that all parts that `recipe` asks for were handed over; warn of those in vain.

        Raises:
            RecipeError: some are missing; all of them are named.
        """
        asked = external(recipe)
        missing = {kind: key for kind, key in asked.items() if kind not in self.names}
        if missing:
            raise _missing(missing)
        for kind in self.names:
            if kind not in asked and kind != "dataset":
                warnings.warn(
                    f"the own part {kind!r} is not used, because the recipe does not ask for it; "
                    f"{_KEYS[kind]}=external does",
                    stacklevel=3,
                )


NO_PARTS = Parts()

_KEYS = {
    "network": "network.kind",
    "objective": "objective.kind",
    "sampler": "sampling.kind",
    "refine": "sampling.refine.kind",
}


def external(recipe: Recipe) -> dict[str, str]:
    """The parts that a recipe leaves to the caller, and the keys that say so."""
    sections = {
        "network": recipe.network,
        "objective": recipe.objective,
        "sampler": recipe.sampling,
        "refine": getattr(recipe.sampling, "refine", None),
    }
    return {
        name: _KEYS[name]
        for name, section in sections.items()
        if getattr(section, "kind", None) == "external"
    }


@contextlib.contextmanager
def blame(kind: str) -> Iterator[None]:
    """Say of what a user's own code raises in the block which part it was, and where.

    Raises:
        RecipeError: it raised something that is not meant for users.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, TesseraError) or memory.used_up(error):
            raise
        raise RecipeError(f"the own part {kind!r} raised {described(error)}") from error


def described(error: BaseException) -> str:
    """An exception of a user's own code: its kind, what it says, and the line it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((_LIBRARY, "<frozen"))]
    own = [f for f in own if not {"site-packages", "importlib"} & {*Path(f.filename).parts}]
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{said} ({own[-1].filename}:{own[-1].lineno})" if own else said


def _missing(asked: Mapping[str, str]) -> RecipeError:
    keys, names = " and ".join(asked.values()), " and ".join(f"`{name}`" for name in asked)
    some = len(asked) > 1
    return RecipeError(
        f"{keys} {'are' if some else 'is'} external, and no {names} {'were' if some else 'was'} "
        f"handed over: give parts=Parts({', '.join(f'{name}=...' for name in asked)}) in Python, "
        f"or `--with MODULE` on the command line, a module with "
        f"{'functions' if some else 'a function'} {names}"
    )


def a_kind(value: object) -> str:
    """What a value is, for messages."""
    return "nothing (None)" if value is None else f"a {type(value).__name__}"

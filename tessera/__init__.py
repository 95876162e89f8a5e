"""Train, sample and score image diffusion models at a fraction of the usual compute."""

import importlib
from typing import TYPE_CHECKING, Any

from tessera._version import __version__

if TYPE_CHECKING:
    from tessera.pipelines.base import Pipeline
    from tessera.pipelines.loading import load
    from tessera.recipes.loading import load_recipe
    from tessera.recipes.parts import Parts
    from tessera.recipes.schema import Recipe
    from tessera.starting.train import train
    from tessera.training.trainer import Trainer

_HOMES = {
    "Parts": "tessera.recipes.parts",
    "Pipeline": "tessera.pipelines.base",
    "Recipe": "tessera.recipes.schema",
    "Trainer": "tessera.training.trainer",
    "load": "tessera.pipelines.loading",
    "load_recipe": "tessera.recipes.loading",
    "train": "tessera.starting.train",
}

__all__ = ["Parts", "Pipeline", "Recipe", "Trainer", "__version__", "load", "load_recipe", "train"]


def __getattr__(name: str) -> Any:
    # PyTorch is imported by the first use, not by `import tessera`.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

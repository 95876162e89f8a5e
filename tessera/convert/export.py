"""Pipelines to the forms that other code reads."""

from __future__ import annotations

from tessera.convert import to_dit, to_guided, to_mar, to_unet2d
from tessera.convert.target import Exported, Target
from tessera.errors import TesseraError
from tessera.pipelines.base import Pipeline

# Another target is one file with a `TARGET`, and its entry here.
TARGETS: tuple[Target, ...] = (
    to_dit.TARGET,
    to_mar.TARGET,
    to_guided.TARGET,
    to_unet2d.TARGET,
)


def plan_export(pipe: Pipeline, to: str) -> Exported:
    """A model in another form, checked and ready to be written.

    Args:
        to: name of one of `TARGETS`.

    Raises:
        TesseraError: there is no such form, or the model has no counterpart there; says why.

    Example:
        >>> plan_export(load("dit-xl"), "dit").write(Path("dit.safetensors"))  # doctest: +SKIP
    """
    targets = {target.name: target for target in TARGETS}
    if to not in targets:
        raise TesseraError(f"`to={to}`: there is none. Choose {', '.join(targets)}")
    if pipe.parts():
        raise TesseraError(
            f"{pipe.recipe.name} is a pipeline of kind {pipe.kind}, of several networks. Export "
            f"its parts one by one, the folders {', '.join(pipe.parts())} in it"
        )
    return targets[to].export(pipe)

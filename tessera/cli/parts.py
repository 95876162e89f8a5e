"""`--with MODULE`: a user's own parts, from a module that the command line names."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from tessera.errors import TesseraError

if TYPE_CHECKING:
    from tessera.recipes.parts import Parts

OwnParts = Annotated[
    str | None,
    typer.Option(
        "--with",
        metavar="MODULE",
        help="Python module with parts of your own; see docs/extending.md.",
    ),
]


def import_parts(name: str | None) -> Parts:
    """The parts in a module: its functions of these names, or its object `parts`.

    The current folder is importable. Nothing but the command line leads here.

    Args:
        name: of the module, with dots; None for no parts.

    Raises:
        TesseraError: there is no such module, it raised something, or it has no part.
    """
    from tessera.recipes.parts import NO_PARTS, Parts

    if name is None:
        return NO_PARTS
    module = _module(name)
    whole = getattr(module, "parts", None)
    if isinstance(whole, Parts):
        return whole
    known = Parts.__dataclass_fields__
    # A package has modules of any name in it, which are no parts.
    found = {part: getattr(module, part, None) for part in known}
    found = {part: own for part, own in found.items() if not isinstance(own, ModuleType | None)}
    if not found:
        raise TesseraError(
            f"--with {name}: {module.__file__} has none of the functions {', '.join(known)}, and "
            "no `parts`, an object of tessera.Parts"
        )
    return Parts(**found)


def _module(name: str) -> ModuleType:
    from tessera.recipes.parts import described

    if not all(part.isidentifier() for part in name.split(".")):
        dotted = name.removesuffix(".py").strip("./").replace(os.sep, ".")
        raise TesseraError(
            f"--with {name}: give the name of a Python module, as in `import`, like {dotted}"
        )
    if not {"", os.getcwd()} & set(sys.path):  # `python -m tessera` has it there already
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise TesseraError(
                f"--with {name}: there is no Python module {error.name}, neither in {os.getcwd()} "
                "nor among the installed packages"
            ) from error
        raise TesseraError(f"--with {name}: importing it raised {described(error)}") from error

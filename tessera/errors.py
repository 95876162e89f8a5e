"""Errors that speak to the user: what is wrong, where, and what to do."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

from tessera.commands import install_command


class TesseraError(Exception):
    """Something the user can put right; the command prints the message and exits with code 2.

    Parameters of the library's functions stand in backquotes, with a value or without (`steps=4`),
    so that the command line can name its options in their place.
    """


class RecipeError(TesseraError):
    """A recipe or an override that cannot be used; the message names the key."""


class DataError(TesseraError):
    """Input data that cannot be read or does not fit; the message names the file."""


class CheckpointError(TesseraError):
    """A checkpoint or pipeline that is missing, damaged or of another kind."""


class OutputError(TesseraError):
    """A file or folder that cannot be written.

    Attributes:
        path: what should have been written.
        reason: why not, and what to do.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{path} cannot be written: {reason}")
        self.path, self.reason = Path(path), reason


class TrainingError(TesseraError):
    """A training run that cannot go on."""


def require_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Raises:
        TesseraError: the module is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TesseraError(
            f"{purpose} needs the package {module.split('.')[0]!r}, which is not installed. "
            f"Install it with: {install_command(extra)}"
        ) from error

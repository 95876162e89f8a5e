"""What went wrong, in words for the page; nothing that is done there ends in a traceback."""

from __future__ import annotations

import sys
import traceback

from tessera import memory
from tessera.errors import TesseraError


def said_in_words(error: BaseException) -> str:
    """What is wrong and, if the user can put it right, how.

    Errors of the program itself are printed in the terminal, with all that is known of them.
    """
    if isinstance(error, TesseraError):
        return str(error)
    if memory.used_up(error):
        return "the memory is used up. Make fewer or smaller images at once"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    traceback.print_exception(error, file=sys.stderr)
    return (
        f"this should not have happened ({type(error).__name__}: {error}). The terminal of the "
        "studio shows where; the rest of the page goes on"
    )

"""Files that are either whole or absent: written to a temporary name, flushed, renamed."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, TypeVar

from tessera.errors import OutputError, TesseraError

P = ParamSpec("P")
T = TypeVar("T")

_FORBIDDEN = "you may not write there. Name another place, or change its permissions"
_IN_THE_WAY = "a part of its path is a file, not a folder. Name another place"
# Whatever a block does, these mean that something cannot be written.
_REASONS = {
    errno.ENOSPC: "the disk is full. Free some space on it, or name a place on another disk",
    errno.EDQUOT: "your quota of the disk is used up. Free some of it, or name another place",
    errno.EFBIG: "it is larger than a file may be there (of this process: ulimit -f). Raise the "
    "limit, or name a place on another disk",
    errno.EROFS: "the disk can only be read from. Name a place on another disk",
}
# Reading fails with these, too.
_OPENING_REASONS = _REASONS | {
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EEXIST: _IN_THE_WAY,
    errno.EISDIR: "there is a folder of that name. Name another place",
    errno.ENAMETOOLONG: "its name is too long. Give it a shorter one",
}


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], *, opening: bool = False) -> Iterator[None]:
    """Say in words why `path` cannot be written, for errors of the block with such a reason.

    Args:
        opening: the block only makes or opens what is written, and reads nothing; then missing
            permission and the like are reasons, too.

    Raises:
        OutputError: names `path` and the reason.
    """
    try:
        yield
    except TesseraError:
        raise
    except Exception as error:
        number = _error_number(error)
        reason = (_OPENING_REASONS if opening else _REASONS).get(number or 0)
        if reason is None:
            raise
        raise OutputError(path, reason) from error


def _error_number(error: BaseException | None) -> int | None:
    """The system's number of an error, or of the one that it came of.

    Closing what could not be written fails once more, often in words of its own; and the library
    of safetensors gives the number in its message only.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found:
            return int(found[1])
        error = error.__cause__ or error.__context__
    return None


def check_writable(path: str | os.PathLike[str]) -> None:
    """Say before the work, not after it, that its result cannot be written to the file `path`.

    Raises:
        OutputError: names `path` and the reason.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(path, _OPENING_REASONS[errno.EISDIR])
    folder = next(folder for folder in path.parents if folder.exists())
    with writing(path, opening=True), tempfile.TemporaryFile(dir=folder):
        pass


@contextlib.contextmanager
def _folders_taken_back(path: Path) -> Iterator[None]:
    """When the block fails, remove the folders above `path` that it made, as far as empty."""
    new = [folder for folder in path.parents if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


Opened = Callable[Concatenate[str | os.PathLike[str], P], AbstractContextManager[T]]


def _in_words(open_path: Opened[P, T]) -> Opened[P, T]:
    """Let what opens a path for writing fail in words, and without leaving new folders behind."""

    @functools.wraps(open_path)
    @contextlib.contextmanager
    def opened(path: str | os.PathLike[str], /, *args: P.args, **options: P.kwargs) -> Iterator[T]:
        with _folders_taken_back(Path(path)), writing(path), contextlib.ExitStack() as stack:
            with writing(path, opening=True):
                value = stack.enter_context(open_path(path, *args, **options))
            try:
                yield value
            except OutputError as error:
                if not (isinstance(value, Path) and error.path.is_relative_to(value)):
                    raise
                # A file of a temporary folder, which nobody knows.
                name = Path(path) / error.path.relative_to(value)
                raise OutputError(name, error.reason) from error

    return opened


@_in_words
@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` that takes its name when the block ends well.

    On an exception the temporary file is removed and whatever stood under `path` stays.

    Raises:
        OutputError: it cannot be written, because the disk is full or for a reason of the kind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    _flush_folder(path.parent)


@_in_words
@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a temporary folder beside `path` that takes its place when the block ends well.

    Raises:
        OutputError: as of `atomic_file`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        yield part
        os.chmod(part, 0o777 & ~_umask())
        replace_folder(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`; an existing target is moved aside first, then removed."""
    old: Path | None = None
    if target.exists():
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
        os.replace(target, old / "was")
    os.replace(source, target)
    _flush_folder(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def _flush_folder(folder: Path) -> None:
    # A rename is durable only once the folder that holds it is on disk; not every system can do it.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

"""Files that are either whole or absent: written to a temporary name, flushed, renamed.

What a killed process leaves is hidden and named `.<name>.<machine>-<process>.<random>` and

    .part    half written, or about to be removed: worth nothing
    .old     a folder that holds what stood under `<name>` until the new one took its place

It is cleaned up, by the first process that writes into the same folder afterwards, if the process
that left it is one of this machine and no longer runs.
"""

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

from tessera import processes
from tessera.errors import DataError, OutputError, TesseraError
from tessera.plain import MIB, parse_json

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

_PART, _OLD = ".part", ".old"
_LEFT_OVER = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)\.[a-z0-9_]{8}\.(?:part|old)")

# Names of what this process is writing, which are unique, and the folders that it has tidied.
_active: set[str] = set()
_tidied: set[Path] = set()


def user_path(path: str | os.PathLike[str]) -> Path:
    """`path` with `~` and `~name` at its beginning as the home folder that they stand for.

    A folder that is really called `~` is named by its absolute path.
    """
    return Path(os.path.expanduser(path))


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether `name` is written like `user/name` on the Hugging Face hub, and is no path here.

    It may end in a revision: a branch, tag or commit, as `user/name@v1`. Where a folder `user` is,
    what is asked for is a path in it, there or not.
    """
    text = os.fspath(name)
    written = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text)
    return bool(written) and not Path(text.split("/")[0]).is_dir()


def split_hub_id(name: str) -> tuple[str, str | None]:
    """`user/name@revision` as the repository and the revision; None where it names none.

    Examples:
        >>> split_hub_id("user/name@v1")
        ('user/name', 'v1')
        >>> split_hub_id("user/name")
        ('user/name', None)
    """
    repository, _, revision = name.partition("@")
    return repository, revision or None


def check_folder_name(path: Path, endings: str, escape: str) -> None:
    """Raise for a name like `photos.jpg`, by which no folder is meant.

    Args:
        endings: the endings of files that can be written instead, in words.
        escape: what the caller gives for a folder of that name all the same.

    Raises:
        DataError: the name ends like that of a file, and no folder is there.
    """
    looks_like_file = re.fullmatch(r"\.(?=\w*[A-Za-z])\w{2,5}", path.suffix)
    if looks_like_file and not path.is_dir():
        raise DataError(
            f"{path}: {path.suffix} files cannot be written. End the name in {endings}, or in "
            f"nothing for a folder (if a folder is to be called so: `{escape}`)"
        )


def check_free(path: Path, overwrite: bool) -> None:
    """Raise if a file would be lost.

    Raises:
        DataError: something is at `path`, and it is not to be overwritten.
    """
    if path.exists() and not overwrite:
        raise DataError(
            f"{path} exists already; choose another name, or give `overwrite=True` to replace it"
        )


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
    path = user_path(path)
    with _temporary_file(path, mode) as (file, name):
        yield file
        _finish(file, name)
        os.replace(name, path)
    _flush_folder(path.parent)


def create_file(path: str | os.PathLike[str], text: str) -> None:
    """Write a new file, which appears with all its content at once.

    Raises:
        FileExistsError: it is there already.
    """
    path = Path(path)
    with _temporary_file(path, "w") as (file, name):
        file.write(text)
        _finish(file, name)
        try:
            os.link(name, path)
        except FileExistsError:
            # Over a network, a link that succeeded may be reported as one that was there.
            if name.stat().st_nlink != 2:
                raise
        except OSError:  # a file system without links
            with open(path, "x", encoding="utf-8") as plain:
                plain.write(text)
        os.unlink(name)
    _flush_folder(path.parent)


@_in_words
@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a temporary folder beside `path` that takes its place when the block ends well.

    Raises:
        OutputError: as of `atomic_file`.
    """
    path = user_path(path)
    _tidy_once(path.parent)
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path), suffix=_PART))
    _active.add(part.name)
    try:
        yield part
        os.chmod(part, 0o777 & ~_umask())
        _replace_folder(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    finally:
        _active.discard(part.name)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a process killed meanwhile leaves none of that name in part."""
    gone = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path), suffix=_PART))
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def is_left_over(path: Path, names: str | None = None) -> bool:
    """Whether `path` is what a killed process left, going by its name.

    Args:
        names: regular expression of the names that it stands for. Without one, a left-over must
            tell by its own name that its process was one of this machine and has ended.
    """
    if path.name in _active:
        return False
    if names is not None:
        return re.fullmatch(rf"\.(?:{names})\..+\.(?:part|old)", path.name) is not None
    found = _LEFT_OVER.fullmatch(path.name)
    if found is None or found[1] != processes.namespace():
        return False
    pid = int(found[2])
    return pid == os.getpid() or not processes.alive(pid)


def tidy(folder: Path, names: str | None = None) -> None:
    """Clean up what killed processes left in `folder` (see `is_left_over` for `names`).

    What was moved aside for something new that never came is put back.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        for path in [p for p in folder.iterdir() if is_left_over(p, names)]:
            if path.suffix == _OLD and path.is_dir():
                _put_back(path)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def flush_file(path: str | os.PathLike[str]) -> None:
    """Put a file that others have written on disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def read_json(
    path: str | os.PathLike[str],
    what: str | None = None,
    *,
    max_bytes: int = 16 * MIB,
    error: type[TesseraError] = DataError,
) -> Any:
    """The value in a JSON file, of which no more than `max_bytes` are read (see `parse_json`).

    Args:
        what: what messages call it; by default its path.
        error: what is raised for a file that cannot be read or parsed.

    Raises:
        TesseraError: of the kind `error`.
        FileNotFoundError: there is none.
    """
    what = os.fspath(path) if what is None else what
    try:
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{what} cannot be read ({problem.strerror})") from problem
    return parse_json(content, what, max_bytes=max_bytes, error=error)


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _temporary_file(path: Path, mode: str) -> Iterator[tuple[IO[Any], Path]]:
    """A file beside `path`, open, which is removed on an exception."""
    _tidy_once(path.parent)
    handle, text = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path), suffix=_PART)
    name = Path(text)
    _active.add(name.name)
    try:
        with os.fdopen(handle, mode) as file:
            yield file, name
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    finally:
        _active.discard(name.name)


def _finish(file: IO[Any], name: Path) -> None:
    """Put a temporary file on disk, with the permissions of an ordinary one."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.chmod(name, 0o666 & ~_umask())


def _replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`; an existing target is moved aside first, then removed."""
    old: Path | None = None
    if target.exists():
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=_prefix(target), suffix=_OLD))
        _active.add(old.name)
        os.replace(target, old / target.name)
    try:
        os.replace(source, target)
        _flush_folder(target.parent)
    finally:
        if old is not None:
            _put_back(old)
            gone = old.with_suffix(_PART)  # so that nobody puts it back from now on
            os.replace(old, gone)
            shutil.rmtree(gone, ignore_errors=True)
            _active.discard(old.name)


def _put_back(old: Path) -> None:
    """Give what was moved aside its name again, if nothing has taken it."""
    for entry in old.iterdir():
        target = old.parent / entry.name
        if old.name.startswith(f".{entry.name[:_NAME]}.") and not os.path.lexists(target):
            os.replace(entry, target)


def _tidy_once(folder: Path) -> None:
    """Make `folder` if need be; before this process first writes there, tidy it."""
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.absolute()
    if folder not in _tidied:
        _tidied.add(folder)
        tidy(folder)


_NAME = 180  # characters of a name that fit into that of a temporary file


def _prefix(path: Path) -> str:
    return f".{path.name[:_NAME]}.{processes.namespace()}-{os.getpid()}."


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

"""Files that are either whole or absent: written to a temporary name, flushed, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tessera.errors import DataError


def user_path(path: str | os.PathLike[str]) -> Path:
    """`path` with `~` and `~name` at its beginning as the home folder that they stand for.

    A folder that is really called `~` is named by its absolute path.
    """
    return Path(os.path.expanduser(path))


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether `name` is written like `user/name` on the Hugging Face hub, and is no path here.

    Where a folder `user` is, what is asked for is a path in it, there or not.
    """
    text = os.fspath(name)
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", text)) and not Path(text).parent.is_dir()


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
def atomic_file(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` that takes its name when the block ends well.

    On an exception the temporary file is removed and whatever stood under `path` stays.
    """
    path = user_path(path)
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


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a temporary folder beside `path` that takes its place when the block ends well."""
    path = user_path(path)
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

"""What the formats of released code share: telling them apart, and what we note beside their files.

Their files say nothing of the VAE, the scale, the names of the classes or the number of rows. Our
writers add a file `latents.json` that does, which the released readers do not look at.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.data.labels import LABELS_FILE, is_names
from tessera.data.latent_formats.base import LatentInfo, LatentPlan, read_info
from tessera.data.members import Members
from tessera.data.packed import LATENTS_FORMAT
from tessera.errors import DataError
from tessera.plain import MIB, parse_json

FACTS_FILE = "latents.json"
_VERSION = "1"
_BESIDE = {LABELS_FILE, FACTS_FILE, "last_idx.txt"}
_LIMIT = 64 * MIB
_LOOKED_AT = 64
"""Members of a ZIP that are looked at before its whole directory is read."""


@dataclass(frozen=True)
class Facts:
    """What `latents.json` says.

    Attributes:
        info: how the set was made.
        count: rows.
        labelled: the labels in the files mean something.
        class_names: of the classes, if known.
        folders: of the classes, in the order of their indices, if they have folders.
    """

    info: LatentInfo
    count: int
    labelled: bool
    class_names: tuple[str, ...] | None
    folders: tuple[str, ...] | None


def facts_json(plan: LatentPlan, folders: Iterable[str] | None = None) -> bytes:
    """`latents.json` of a set."""
    names = None if plan.labels is None else plan.class_names
    content: dict[str, Any] = {
        "format": LATENTS_FORMAT,
        "version": _VERSION,
        "name": plan.name,
        **plan.info.texts(),
        "count": plan.count,
        "labelled": plan.labels is not None,
        "class_names": None if names is None else list(names),
    }
    if folders is not None:
        content["folders"] = list(folders)
    return json.dumps(content, indent=1).encode()


def read_facts(members: Members) -> Facts | None:
    """What `latents.json` says; None where there is none.

    Raises:
        DataError: it is not what it should be.
    """
    if FACTS_FILE not in members.names:
        return None
    where = members.where(FACTS_FILE)
    content = parse_json(members.read(FACTS_FILE, _LIMIT), where, max_bytes=_LIMIT)
    found = content if isinstance(content, dict) else {}
    if found.get("format") != LATENTS_FORMAT or found.get("version") != _VERSION:
        raise DataError(f"{where} is not what `tessera data latents` writes, of version {_VERSION}")
    count, labelled = found.get("count"), found.get("labelled")
    lists = [found.get("class_names"), found.get("folders")]
    named = all(value is None or is_names(value) for value in lists)
    if not (isinstance(count, int) and 0 < count < 2**62 and isinstance(labelled, bool) and named):
        raise DataError(f"{where}: its count, labels or names are none")
    try:
        info = read_info(found)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    names, folders = (None if value is None else tuple(value) for value in lists)
    return Facts(info, count, labelled, names, folders)


def check_count(path: Path, found: int, facts: Facts | None) -> None:
    """Raise for a set that is not whole.

    Raises:
        DataError: it has none, more or fewer rows than it says.
    """
    if not found:
        raise DataError(f"{path}: no latents in it")
    if facts is not None and facts.count != found:
        raise DataError(
            f"{path}: not a whole set of latents ({FACTS_FILE} says {facts.count:,}, there are "
            f"{found:,})"
        )


def data_files(members: Members, pattern: str, title: str) -> list[str]:
    """The names of the files of a format; hidden ones and those beside them are none.

    Args:
        pattern: regular expression of their names.
        title: of the format.

    Raises:
        DataError: something else is among them; the message names it.
    """
    names = [name for name in members.names if not _is_beside(name)]
    foreign = next((name for name in names if not re.fullmatch(pattern, name)), None)
    if foreign is not None:
        raise DataError(
            f"{members.where(foreign)} does not belong to a {title}, which {members.path} seems to "
            "be; move it away"
        )
    return names


def first_file(path: Path) -> str | None:
    """Name of the first file of a folder or ZIP by which its kind can be told.

    Of a folder, those at the top come before those in its first sub-folder.
    """
    if path.is_dir():
        return _first_below(path, "", 0)
    if path.suffix.lower() != ".zip" or not path.is_file():
        return None
    try:
        names = _first_members(path)
    except Exception:  # a damaged directory may raise nearly anything; opening it will tell
        return None
    return next((name for name in names if not _is_beside(name)), None)


def _first_below(path: Path, above: str, depth: int) -> str | None:
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError:
        return None
    for entry in entries:
        if not _is_beside(entry.name) and entry.is_file():
            return above + entry.name
    for entry in entries:
        if depth < 2 and not _is_beside(entry.name) and entry.is_dir():
            found = _first_below(Path(entry.path), f"{above}{entry.name}/", depth + 1)
            if found is not None:
                return found
    return None


def _first_members(path: Path) -> list[str]:
    """Names at the beginning of a ZIP; of all members, if those tell nothing.

    Their own headers are read, because a directory of a million members takes seconds.
    """
    at = 0
    with open(path, "rb") as file:
        for _ in range(_LOOKED_AT):
            file.seek(at)
            header = file.read(30)
            if header[:4] != b"PK\3\4":
                break
            size, name_length, extra_length = (
                int.from_bytes(header[first:last], "little")
                for first, last in ((18, 22), (26, 28), (28, 30))
            )
            name = file.read(name_length).decode(errors="replace").replace("\\", "/")
            if not name.endswith("/") and not _is_beside(name):
                return [name]
            if header[6] & 8 or size == 2**32 - 1:  # its size comes behind it, or elsewhere
                break
            at += 30 + name_length + extra_length + size
    with zipfile.ZipFile(path) as archive:
        return sorted(e.filename.replace("\\", "/") for e in archive.infolist() if not e.is_dir())


def _is_beside(name: str) -> bool:
    parts = name.split("/")
    return name in _BESIDE or any(part.startswith((".", "__MACOSX")) for part in parts)

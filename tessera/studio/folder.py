"""The folder that the studio is opened on: the runs and pipelines in it, by their names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tessera.errors import TesseraError
from tessera.files import user_path
from tessera.training.run_folder import RECIPE

JOBS = ".studio"
"""Sub-folder with what the studio keeps of the trainings that it started."""

_DEEP = 3  # levels below the folder that are looked at
_MOST = 5_000  # folders that are looked into
_CONFIG = "config.json"


@dataclass(frozen=True)
class FolderEntry:
    """A run or a pipeline.

    Attributes:
        name: its path within the folder, with `/`; "." is the folder itself.
        path: where it is.
        is_run: it is the folder of a run, which can be watched and resumed.
        makes_images: it holds a pipeline that can be loaded.
        changed: when it was written to last, seconds since 1970.
    """

    name: str
    path: Path
    is_run: bool
    makes_images: bool
    changed: float


class StudioFolder:
    """Runs and pipelines below a folder; no name leads out of it.

    Args:
        root: the folder; it is made if it is not there.

    Raises:
        TesseraError: it is a file.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = user_path(root).resolve()
        if self.root.exists() and not self.root.is_dir():
            raise TesseraError(f"{root} is a file. Name a folder of runs and pipelines")

    def entries(self) -> list[FolderEntry]:
        """All runs and pipelines, the one that was written to last first."""
        found = sorted(self._walk(), key=lambda entry: entry.name)
        return sorted(found, key=lambda entry: entry.changed, reverse=True)

    def path(self, name: str | None) -> Path:
        """The path of a name, there or not.

        Raises:
            TesseraError: no name, or one that leads out of the folder.
        """
        if not name:
            raise TesseraError("nothing is chosen")
        if "\0" not in name:
            path = (self.root / name).resolve()
            if path == self.root or path.is_relative_to(self.root):
                return path
        raise TesseraError(f"{name!r} is not in {self.root}")

    def entry(self, name: str | None) -> FolderEntry:
        """The run or pipeline of a name.

        Raises:
            TesseraError: there is none, or it is outside of the folder.
        """
        path = self.path(name)
        entry = _entry(self.root, path)
        if entry is None:
            raise TesseraError(f"{name} is no run or pipeline (any more) in {self.root}")
        return entry

    def run(self, name: str | None) -> Path:
        """The path of a run.

        Raises:
            TesseraError: it is none.
        """
        entry = self.entry(name)
        if not entry.is_run:
            raise TesseraError(f"{name} is a pipeline, not a run: it has no {RECIPE}")
        return entry.path

    def free(self, name: str) -> Path:
        """The path for a new run.

        Raises:
            TesseraError: the name is none for a folder here, or it is taken.
        """
        name = name.strip()
        if not re.fullmatch(r"(?:[\w+=@-][\w.+=@-]*)(?:/[\w+=@-][\w.+=@-]*){0,2}", name):
            raise TesseraError(
                f"{name!r} is no name for a run: use letters, digits and - _ . +, and at most two /"
            )
        path = self.path(name)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise TesseraError(f"{name} is there already. Choose another name for the run")
        if any((above / RECIPE).is_file() for above in path.parents if above != self.root.parent):
            raise TesseraError(f"{name} lies in another run. Choose another name")
        return path

    def _walk(self) -> Iterator[FolderEntry]:
        """Breadth first, and not into what was found."""
        waiting, looked = [(self.root, 0)], 0
        while waiting and looked < _MOST:
            (place, depth), looked = waiting.pop(0), looked + 1
            entry = _entry(self.root, place)
            if entry is not None:
                yield entry
            elif depth < _DEEP:
                waiting += [(below, depth + 1) for below in _below(place)]


def _below(place: Path) -> list[Path]:
    """The folders in a folder; links are not followed, they may lead out of it."""
    try:
        with os.scandir(place) as found:
            return sorted(
                place / item.name
                for item in found
                if not item.name.startswith(".") and item.is_dir(follow_symlinks=False)
            )
    except OSError:  # gone, or not for us
        return []


def _entry(root: Path, path: Path) -> FolderEntry | None:
    """What a folder is; None if it is neither run nor pipeline."""
    try:
        is_run = (path / RECIPE).is_file()
        made = path / "pipeline" if is_run else path
        makes_images = (made / _CONFIG).is_file()
        if not is_run and not (makes_images and _is_pipeline(made)):
            return None
        files = (path / "metrics.jsonl", path / RECIPE, made / _CONFIG)
        changed = max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
    except OSError:
        return None
    name = path.relative_to(root).as_posix()
    return FolderEntry(name, path, is_run, makes_images, changed)


def _is_pipeline(folder: Path) -> bool:
    """Whether a configuration is that of a pipeline, by what lies beside it."""
    if (folder / "model.safetensors").is_file():
        return True
    return any((below / _CONFIG).is_file() for below in _below(folder))

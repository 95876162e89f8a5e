"""Commands as the user of this installation can type them, for reports and advice."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import shutil
import sys
import urllib.parse
import urllib.request
from pathlib import Path


def tessera_command() -> str:
    """How the command of this installation is called here.

    `tessera` where the shell finds it, else the path of the script beside this Python, like
    `.venv/bin/tessera`, else `python -m tessera`.
    """
    return _script("tessera") or f"{_shown(Path(sys.executable))} -m tessera"


def install_command(extra: str) -> str:
    """The command that installs an extra of tessera, from where this installation came from.

    The distribution is on no package index, so an extra is installed from its source folder.
    """
    pip = _script("pip") or f"{_shown(Path(sys.executable))} -m pip"
    folder, editable = _source()
    if folder is None:
        return f"{pip} install '.[{extra}]' (in tessera's source folder)"
    where = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
    return f"{pip} install {'-e ' if editable else ''}{shlex.quote(f'{where}[{extra}]')}"


def _script(name: str) -> str | None:
    """A script of this Python's environment: its name if the shell finds it, or its path."""
    on_path = shutil.which(name)
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    if beside is None:
        # Scripts of one Python can be in a folder of their own; in an environment they never are.
        return name if on_path is not None and sys.prefix == sys.base_prefix else None
    if on_path is not None and os.path.samefile(on_path, beside):
        return name
    return _shown(Path(beside))


def _shown(path: Path) -> str:
    """A path for the shell, from the current folder if it lies in it; links are not followed."""
    return shlex.quote(
        str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    )


def _source() -> tuple[Path | None, bool]:
    """The folder with tessera's source, if it is on this machine, and whether it is in use."""
    checkout = Path(__file__).parents[1]
    if (checkout / "pyproject.toml").is_file():
        return checkout, True
    try:
        record = importlib.metadata.distribution("tessera-diffusion").read_text("direct_url.json")
        url = urllib.parse.urlsplit(json.loads(record or "{}").get("url", ""))
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None, False
    folder = Path(urllib.request.url2pathname(url.path))
    known = url.scheme == "file" and (folder / "pyproject.toml").is_file()
    return (folder if known else None), False

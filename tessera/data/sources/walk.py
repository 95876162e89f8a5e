"""Files of one kind in a folder that holds no images beside them."""

from __future__ import annotations

import os
from pathlib import Path

from tessera.data.decode import is_image


def files_of(folder: Path, ending: str) -> list[Path]:
    """The files of an ending below a folder, sorted; none if there are images.

    Hidden files and folders are passed over. A folder of images is left at the first one.
    """
    found: list[Path] = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if is_image(name):
                return []
            if name.lower().endswith(ending) and not name.startswith("."):
                found.append(Path(place, name))
    return sorted(found)

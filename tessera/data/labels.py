"""Class labels: from `dataset.json`, or from the names of the folders that hold the images."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.data.members import Members, ZipMembers
from tessera.errors import DataError

LABELS_FILE = "dataset.json"
Label = int | list[float] | None
_ARCHIVE_NAME = re.compile(r"\d{5}/img\d{8}\.\w+")


@dataclass(frozen=True)
class Labels:
    """Labels of N images.

    Attributes:
        values: one entry an image: a class index, a vector, or None where there is none.
        class_names: names of the classes in the order of their indices, if known.
        strays: names of the images that lie beside the folders of the classes; they have none.
    """

    values: list[Label]
    class_names: tuple[str, ...] | None = None
    strays: frozenset[str] = frozenset()

    def of(self, images: Sequence[str], chosen: Sequence[str]) -> list[Label]:
        """Labels of the chosen ones of the N images."""
        table = dict(zip(images, self.values, strict=True))
        return [table[name] for name in chosen]


def find_labels(members: Members, images: Sequence[str]) -> Labels | None:
    """Labels of the named images: from `dataset.json` if there is one, else from the folders.

    In a ZIP archive a single folder around everything is looked through.

    Raises:
        DataError: `dataset.json` is not what it should be.
    """
    if LABELS_FILE in members.names:
        return parse_labels(members.read(LABELS_FILE), images, members.where(LABELS_FILE))
    inner = _without_common_folder(images) if isinstance(members, ZipMembers) else images
    labels = folder_labels(inner)
    if labels is None:
        return None
    pairs = zip(images, labels.values, strict=True)
    return replace(labels, strays=frozenset(image for image, value in pairs if value is None))


def parse_labels(text: bytes, images: Sequence[str], where: str) -> Labels | None:
    """Read `dataset.json`: `{"labels": null | [[name, label], ...], "class_names": [...]}`.

    `class_names` is this library's addition; other readers look at `labels` only.
    """
    try:
        content = json.loads(text)
        pairs = content["labels"]
        table = None if pairs is None else {_slashes(name): value for name, value in pairs}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{where}: should be {{"labels": [[file name, label], ...]}} or {{"labels": null}} '
            f"({type(error).__name__}: {error})"
        ) from error
    if table is None:
        return None
    names = content.get("class_names")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise DataError(f"{where}: class_names should be a list of strings")
    values = [_label(table.get(image), image, where) for image in images]
    if len({len(v) if isinstance(v, list) else -1 for v in values if v is not None}) > 1:
        raise DataError(f"{where}: labels must be all indices, or all vectors of one length")
    return Labels(values, None if names is None else tuple(names))


def folder_labels(images: Sequence[str]) -> Labels | None:
    """Labels from the top-level folder of each file; None unless there are at least two.

    Classes are numbered in the sorted order of their names; files in the root have no label.
    The numbered folders of an archive are not classes.
    """
    folders = [image.split("/", 1)[0] if "/" in image else None for image in images]
    names = sorted({folder for folder in folders if folder is not None})
    if len(names) < 2 or all(_ARCHIVE_NAME.fullmatch(image) for image in images):
        return None
    index = {name: i for i, name in enumerate(names)}
    return Labels([None if folder is None else index[folder] for folder in folders], tuple(names))


def stray_text(where: str) -> str:
    """What is wrong with an image beside the folders of the classes, and what can be done."""
    return (
        f"{where} lies beside the folders of the classes, so it has no class. Move it into one of "
        f'them or away; or, for a set without classes, put a {LABELS_FILE} with {{"labels": null}} '
        "there"
    )


def _without_common_folder(images: Sequence[str]) -> Sequence[str]:
    while images and len({image.split("/", 1)[0] for image in images}) == 1:
        if not all("/" in image for image in images):
            break
        images = [image.split("/", 1)[1] for image in images]
    return images


def label_array(
    values: Sequence[Label], images: Sequence[str], where: str
) -> NDArray[np.int64] | NDArray[np.float32]:
    """Labels of all images as int64 [N] (class indices) or float32 [N, K] (vectors).

    Raises:
        DataError: an image has no label; the message names it.
    """
    for value, image in zip(values, images, strict=True):
        if value is None:
            raise DataError(f"{where}: {image} has no label in {LABELS_FILE}")
    if values and isinstance(values[0], list):
        return np.array(values, np.float32)
    return np.array(values, np.int64)


def _slashes(name: str) -> str:
    return name.replace("\\", "/")


def _label(value: Any, image: str, where: str) -> Label:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    if isinstance(value, list) and value and all(isinstance(v, int | float) for v in value):
        return [float(v) for v in value]
    raise DataError(f"{where}: the label of {image} is neither a class index nor a list of numbers")

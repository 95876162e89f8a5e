"""Class labels: from `dataset.json`, or from the names of the folders that hold the images."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.data.members import Members, ZipMembers
from tessera.errors import DataError
from tessera.plain import MIB, parse_json

LABELS_FILE = "dataset.json"
Label = int | list[float] | None
_CLASSES = 2**31
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
        limit = _longest(len(images))
        return parse_labels(members.read(LABELS_FILE, limit), images, members.where(LABELS_FILE))
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
    content = parse_json(text, where, max_bytes=_longest(len(images)))
    pairs = content.get("labels", ...) if isinstance(content, dict) else ...
    if pairs is not None and not (isinstance(pairs, list) and all(map(_is_pair, pairs))):
        raise DataError(
            f'{where}: should be {{"labels": [[file name, label], ...]}} or {{"labels": null}}'
        )
    if pairs is None:
        return None
    table = {_slashes(name): value for name, value in pairs}
    names = content.get("class_names")
    if names is not None and not is_names(names):
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


def _longest(images: int) -> int:
    """Bytes of the longest `dataset.json` that is read with so many images."""
    return 64 * MIB + 16 * 1024 * images


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def is_names(value: Any) -> bool:
    """Whether a value of JSON is a list of texts that can be written and shown."""
    return isinstance(value, list) and all(
        isinstance(name, str) and not re.search("[\ud800-\udfff]", name) for name in value
    )


def _slashes(name: str) -> str:
    return name.replace("\\", "/")


def _label(value: Any, image: str, where: str) -> Label:
    if value is None or (type(value) is int and 0 <= value < _CLASSES):
        return value
    if isinstance(value, list) and value and all(map(_is_number, value)):
        return [float(v) for v in value]
    raise DataError(f"{where}: the label of {image} is neither a class index nor a list of numbers")


def _is_number(value: Any) -> bool:
    small = type(value) is int and abs(value) < 2**53
    return small or (type(value) is float and math.isfinite(value))

"""Which images are asked for: seeds, and the class of each."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Sequence
from typing import SupportsIndex, cast

import numpy as np
from numpy.typing import NDArray

from tessera.conditioning import NO_CLASS
from tessera.errors import TesseraError
from tessera.sampling.seeds import parse_seeds

Seeds = Iterable[int] | str
Label = SupportsIndex | str


def list_seeds(seeds: Seeds) -> list[int]:
    """Seeds in any of the forms that callers may give, as a list.

    Raises:
        TesseraError: one number alone, which may be meant as a seed or as a count; or no numbers.
    """
    if isinstance(seeds, str):
        return parse_seeds(seeds)
    try:
        return [operator.index(seed) for seed in seeds]
    except TypeError:
        pass
    try:
        number = operator.index(cast(SupportsIndex, seeds))
    except TypeError:
        raise TesseraError(
            f"`seeds`: expected whole numbers, or text like '0-63,100', got {seeds!r}"
        ) from None
    raise TesseraError(
        f"`seeds={number}`: one number may be meant as a seed or as a count. Give [{number}] for "
        f"the image of seed {number}, or range({number}) for {number} images"
    )


def choose_labels(
    labels: Label | Iterable[Label] | None,
    seeds: Sequence[int],
    num_classes: int,
    class_names: Sequence[str] | None = None,
) -> NDArray[np.int64] | None:
    """Class indices, one a seed; None where each seed is to draw its own.

    Args:
        labels: one class for all images, or one for each: index, name, or -1 for no class;
            "balanced" for seed modulo the number of classes; None to draw.

    Raises:
        TesseraError: the model knows no classes, or not this one, or the number of labels is not
            that of the seeds.
    """
    if labels is None:
        return None
    if num_classes == 0:
        raise TesseraError(
            "a class was asked for, but this model was trained without classes. Leave out `labels`"
        )
    if isinstance(labels, str) and labels == "balanced":
        return np.array([seed % num_classes for seed in seeds], np.int64)
    if getattr(labels, "ndim", None) == 0:  # an array of one number calls itself iterable
        labels = operator.index(cast(SupportsIndex, labels))
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        return np.full(len(seeds), class_index(labels, num_classes, class_names), np.int64)
    indices = [class_index(label, num_classes, class_names) for label in labels]
    if len(indices) != len(seeds):
        raise TesseraError(
            f"{len(indices)} classes were given for {len(seeds)} seeds. "
            "Give one class for all images, or one for each"
        )
    return np.array(indices, np.int64)


def class_index(label: Label, num_classes: int, class_names: Sequence[str] | None = None) -> int:
    """The index of a class given by name or index; -1 for no class.

    A string is looked up among the names before it is read as a number.

    Raises:
        TesseraError: there is no such class.
    """
    if isinstance(label, str):
        names = list(class_names or ())
        if label in names:
            return names.index(label)
        try:
            index = int(label)
        except ValueError:
            near = difflib.get_close_matches(label, names, 3)
            hint = f"Did you mean {' or '.join(near)}?" if near else _known(num_classes, names)
            raise TesseraError(f"there is no class {label!r}. {hint}") from None
    else:
        index = operator.index(label)
    if index != NO_CLASS and not 0 <= index < num_classes:
        raise TesseraError(
            f"there is no class {index}. {_known(num_classes, list(class_names or ()))}"
        )
    return index


def _known(num_classes: int, names: list[str]) -> str:
    known = f"The classes are 0 to {num_classes - 1}"
    return f"{known}: {shortened(names)}" if names else known


def shortened(names: Sequence[str]) -> str:
    """The first dozen of the names."""
    return f"{', '.join(names[:12])}{', …' if len(names) > 12 else ''}"

"""What is in a collection of images: sizes, channels, classes, number, from the files' headers."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tessera.data.decode import is_image
from tessera.data.labels import LABELS_FILE, Label, find_labels, stray_text
from tessera.data.members import Members, open_members
from tessera.data.parallel import cores, ordered_map
from tessera.data.sources import Source, open_source
from tessera.errors import DataError, TesseraError
from tessera.files import user_path
from tessera.images import open_image
from tessera.progress import progress
from tessera.recipes.loading import shipped

# What is opened as images, though it is no folder.
_ENDINGS = (
    ".zip", ".safetensors", ".tar", ".tgz", ".tar.gz", ".parquet", ".csv", ".tsv", ".jsonl",
    "-images-idx3-ubyte", "-images-idx3-ubyte.gz", "-images.idx3-ubyte",
)  # fmt: skip
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")
_CHUNK = 64


@dataclass(frozen=True)
class ImageFacts:
    """What is known of a collection of images before any of them is decoded.

    Attributes:
        path: of the collection.
        digest: hexadecimal, of the contents; another one if an image or its class is.
        sizes: (width, height) of the images that can be used, and how often each occurs.
        grey: number of grey ones among them.
        classes: name and number of images of each class, in the order of their indices; empty
            without class labels.
        skipped: messages about images that cannot be used.
        ignored: number of files that are not images.
    """

    path: Path
    digest: str
    sizes: tuple[tuple[tuple[int, int], int], ...]
    grey: int = 0
    classes: tuple[tuple[str, int], ...] = ()
    skipped: tuple[str, ...] = ()
    ignored: int = 0

    @property
    def count(self) -> int:
        """Images that can be used."""
        return sum(number for _, number in self.sizes)

    def at_least(self, side: int) -> float:
        """Share of the images whose shorter side has so many pixels."""
        large = sum(number for size, number in self.sizes if min(size) >= side)
        return large / max(self.count, 1)


def is_collection(name: str) -> bool:
    """Whether what stands in the place of a recipe is a collection of images.

    Shipped recipes, recipe files and what is not there are none.

    Raises:
        TesseraError: it is the folder of a run or of a model.
    """
    if name in shipped():
        return False
    path = user_path(name)
    if path.is_file():
        return path.name.lower().endswith(_ENDINGS)
    if not path.is_dir() or (path / "recipe.yaml").is_file():  # of which load_recipe speaks
        return False
    if (path / "config.json").is_file():
        raise TesseraError(
            f"{path} is the folder of a trained model. To train another one from it: tessera train "
            f"RECIPE training.initial_weights={path}"
        )
    return True


def look(path: str | os.PathLike[str]) -> ImageFacts:
    """Look at every image of a folder, an archive or another collection that is known.

    Of files in folders and ZIP archives the header is read and nothing decoded; what cannot be
    opened is left out, and said.

    Raises:
        DataError: nothing there, of no known kind, or without images that can be used.

    Example:
        >>> look("photos-64.zip").count  # doctest: +SKIP
        3667
    """
    path = user_path(path)
    with open_source(path) as source:
        if source.kind in ("image folder", "ZIP of images"):
            with contextlib.closing(open_members(path)) as members:
                facts = _of_files(path, members)
        else:
            facts = _of_records(path, source)
    if not facts.count:
        lines = [f"{path}: there is no image in it that can be used", *facts.skipped[:5]]
        raise DataError("\n  ".join(lines))
    return facts


@dataclass(frozen=True)
class _Seen:
    """Of one file: its name and content as a digest, size and mode, or what is wrong with it."""

    digest: bytes
    size: tuple[int, int] = (0, 0)
    grey: bool = False
    error: str | None = None


def _of_files(path: Path, members: Members) -> ImageFacts:
    names = [name for name in members.names if is_image(name)]
    labels = find_labels(members, names)
    strays = labels.strays if labels is not None else frozenset()

    def see(name: str) -> _Seen:
        where = members.where(name)
        key = name.encode("utf-8", "surrogateescape")
        if name in strays:
            return _Seen(key, error=stray_text(where))
        try:
            data = members.read(name)
            digest = hashlib.sha256(key + b"\0" + data).digest()
        except DataError as error:
            return _Seen(key, error=str(error))
        try:
            with open_image(data, where) as image:
                return _Seen(digest, image.size, image.mode in _GREY)
        except DataError as error:
            return _Seen(digest, error=str(error))
        except Exception:  # a damaged header may raise nearly anything
            return _Seen(digest, error=f"{where}: not an image that can be read")

    total = hashlib.sha256()
    sizes: Counter[tuple[int, int]] = Counter()
    grey, skipped, used = 0, list[str](), list[bool]()
    chunks = (names[at : at + _CHUNK] for at in range(0, len(names), _CHUNK))
    with progress(f"looking at {path.name}", len(names), unit="images") as bar:
        for seen in ordered_map(lambda chunk: [*map(see, chunk)], chunks, cores(), 4):
            for one in seen:
                total.update(one.digest)
                used.append(one.error is None)
                if one.error is not None:
                    skipped.append(one.error)
                    continue
                sizes[one.size] += 1
                grey += one.grey
            bar.advance(len(seen))
    if LABELS_FILE in members.names:
        total.update(members.read(LABELS_FILE))
    values = [] if labels is None else labels.values
    kept = [value for value, fine in zip(values, used, strict=False) if fine]
    return ImageFacts(
        path,
        total.hexdigest(),
        tuple(sorted(sizes.items())),
        grey,
        _classes(kept, labels.class_names if labels is not None else None),
        tuple(skipped),
        sum(name != LABELS_FILE and not is_image(name) for name in members.names),
    )


def _of_records(path: Path, source: Source) -> ImageFacts:
    """Of a collection whose images have no header of their own, or none that is cheap to reach."""
    # Of what comes out: a list does not change when its images do.
    total = hashlib.sha256(repr(source.class_names).encode())
    sizes: Counter[tuple[int, int]] = Counter()
    grey, skipped, labels = 0, list[str](), list[Label]()
    with progress(f"looking at {path.name}", source.count, unit="images") as bar:
        for record in source.records:
            bar.advance()
            try:
                image = record.load()
            except DataError as error:
                skipped.append(str(error))
                continue
            total.update(repr((record.label, image.shape)).encode())
            total.update(image.tobytes())
            sizes[image.shape[1], image.shape[0]] += 1
            grey += image.ndim == 2
            labels.append(record.label)
    return ImageFacts(
        path,
        total.hexdigest(),
        tuple(sorted(sizes.items())),
        grey,
        _classes(labels, source.class_names),
        tuple(skipped),
        len(source.ignored),
    )


def _classes(labels: Sequence[Label], names: tuple[str, ...] | None) -> tuple[tuple[str, int], ...]:
    """Name and number of images of each class; none unless every image has a class."""
    indices = [label for label in labels if isinstance(label, int)]
    if not indices or len(indices) < len(labels):
        return ()
    counts = Counter(indices)
    known = names or tuple(str(index) for index in range(max(indices) + 1))
    return tuple((name, counts[index]) for index, name in enumerate(known))

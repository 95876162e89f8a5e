"""Conversion of an image collection to an EDM archive (ZIP or folder) or a packed set."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from tessera.data import archive
from tessera.data.decode import channels_first, shape_text
from tessera.data.labels import LABELS_FILE, Label, label_array
from tessera.data.members import MAX_BYTES
from tessera.data.packed import PackedWriter
from tessera.data.parallel import cores, ordered_map
from tessera.data.sources import Options, Record, Source, open_source
from tessera.data.transforms import (
    Filter,
    Pixels,
    Transform,
    apply_transform,
    check_transform,
    to_channels,
)
from tessera.errors import DataError
from tessera.files import atomic_file, atomic_folder, check_folder_name, check_free, user_path
from tessera.images import MAX_PIXELS
from tessera.progress import progress

Format = Literal["zip", "packed", "folder"]
FORMATS: tuple[Format, ...] = get_args(Format)
_SUFFIXES: dict[Format, str] = {"zip": ".zip", "packed": ".safetensors"}
# Images handed to a thread at once: enough to hide the cost of handing over, few enough to hold.
_CHUNK = 8


@dataclass
class Report:
    """What a conversion did.

    Attributes:
        path: where the set is now.
        format: of the set.
        kind: of the source, in words.
        count: images written.
        shape: (C, H, W).
        num_classes: number of different labels; 0 without labels.
        class_names: if known.
        bad: messages about images that were left out, `skip_bad`.
        too_small: images left out by center-crop-wide.
        ignored: files of the source that are not images.
        notes: what the user should know.
        seconds: time taken.
    """

    path: Path
    format: Format
    kind: str
    count: int = 0
    shape: tuple[int, ...] = ()
    num_classes: int = 0
    class_names: tuple[str, ...] | None = None
    bad: list[str] = field(default_factory=list)
    too_small: int = 0
    ignored: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def convert_images(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    resolution: tuple[int, int] | None = None,
    transform: Transform = "none",
    resample: Filter | None = None,
    channels: int | None = None,
    max_images: int | None = None,
    form: Format | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    upright: bool = True,
    released_wide_crop: bool = False,
    max_file_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    image_column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
    workers: int | None = None,
) -> Report:
    """Convert a collection; the result appears under `target` when it is whole, or not at all.

    The same source and options give the same bytes.

    Args:
        source: see `sources.open_source`.
        resolution: (width, height) of the result; None keeps the size of the images.
        transform, resample: see `transforms.apply_transform`.
        channels: 3 makes all images RGB, 1 grey, 4 RGBA; None leaves them as they are.
        max_images: stop after this many images of the source.
        form: of the result; by default `.zip` is an archive, `.safetensors` a packed set, and a
            name without such an ending a folder.
        skip_bad: leave out images that cannot be used, instead of stopping at the first.
        overwrite: replace what stands under `target`.
        upright: turn photos as the camera's orientation tag says.
        released_wide_crop: see `transforms.apply_transform`.
        max_file_bytes: the largest file in a folder or ZIP that is read.
        max_pixels: refuse images of more pixels, before they are decoded.
        image_column, label_column: of a table; by default those that look like it. "none" as label
            column: without labels.
        split: of a collection that has several.
        workers: threads; by default one per core.

    Raises:
        DataError: the source or an image of it cannot be used, or nothing is left of it.
    """
    source, target = user_path(source), user_path(target)
    check_transform(transform, resolution, resample)
    form = _format(target, form)
    _check_target(source, target, overwrite)
    workers = cores() if workers is None else workers

    def edit(image: Pixels) -> Pixels | None:
        cut = apply_transform(image, transform, resolution, resample, released_wide_crop)
        return None if cut is None else to_channels(cut, channels)

    alpha = channels == 4
    options = Options(upright, max_file_bytes, max_pixels, image_column, label_column, split, alpha)
    started = time.monotonic()
    with (
        open_source(source, options) as opened,
        _sink(form, target, opened) as sink,
    ):
        report = Report(target, form, opened.kind, ignored=opened.ignored)

        chunks = _chunks(itertools.islice(opened.records, max_images))
        prepare = functools.partial(_prepared, edit=edit, sink=sink)
        results = ordered_map(lambda chunk: [*map(prepare, chunk)], chunks, workers, workers + 2)
        total = opened.count if max_images is None else min(opened.count, max_images)
        bars = progress(f"converting {source.name}", total, unit="images")
        with contextlib.closing(results), bars as bar:
            labels, names = _write_all(results, sink, report, skip_bad, bar.advance)
        if not labels:
            raise DataError(_nothing_left(source, report))
        sink.finish(_settle_labels(labels, names, opened, report), report.class_names)
    _add_notes(report)
    report.seconds = time.monotonic() - started
    return report


@dataclass(frozen=True)
class _Prepared:
    """An image ready to be written, too small for the crop (no payload), or unusable (an error)."""

    record: Record
    shape: tuple[int, ...] = ()
    payload: Any = None
    error: str | None = None


def _prepared(record: Record, edit: Callable[[Pixels], Pixels | None], sink: _Sink) -> _Prepared:
    try:
        image = edit(record.load())
        if image is None:
            return _Prepared(record)
        return _Prepared(record, channels_first(image).shape, sink.encode(image))
    except DataError as error:
        text = str(error)
        return _Prepared(record, error=text if record.name in text else f"{record.name}: {text}")


def _write_all(
    chunks: Iterable[Sequence[_Prepared]],
    sink: _Sink,
    report: Report,
    skip_bad: bool,
    advance: Callable[[], object],
) -> tuple[list[Label], list[str]]:
    """Write the images that can be used; their labels and names."""
    labels: list[Label] = []
    names: list[str] = []
    for result in itertools.chain.from_iterable(chunks):
        advance()
        problem = _problem(result, report, names)
        if problem is not None:
            if not skip_bad:
                raise DataError(f"{problem}\n(--skip-bad leaves such images out)")
            report.bad.append(problem)
        elif result.payload is None:
            report.too_small += 1
        else:
            report.shape, report.count = result.shape, report.count + 1
            sink.add(result.payload, result.shape)
            labels.append(result.record.label)
            names.append(result.record.name)
    return labels, names


def _add_notes(report: Report) -> None:
    """Say what is odd about the set that was made."""
    if len(report.bad) > report.count:
        report.notes.append(
            "most images were left out; the first one that can be used sets the shape of all"
        )
    if report.format != "packed" and report.shape[1] & (report.shape[1] - 1):
        report.notes.append(
            f"the side of {report.shape[1]} pixels is no power of two; every reader takes it, but "
            "EDM's own conversion tool does not make such sets"
        )


def _problem(result: _Prepared, report: Report, written: Sequence[str]) -> str | None:
    """Why an image cannot join the set; None if it can."""
    if result.error is not None or result.payload is None:
        return result.error
    name, shape = result.record.name, result.shape
    if shape[1] != shape[2]:
        return (
            f"{name}: {shape_text(shape)} is not square; choose a size with --resolution, "
            "best with --transform center-crop"
        )
    if report.shape and shape != report.shape:
        advice = (
            "--channels 3 makes all images RGB"
            if shape[1:] == report.shape[1:]
            else "--resolution brings all images to one size"
        )
        return (
            f"{name}: {shape_text(shape)}, but the first image ({written[0]}) is "
            f"{shape_text(report.shape)}; {advice}"
        )
    return None


def _settle_labels(
    labels: list[Label], names: list[str], source: Source, report: Report
) -> NDArray[Any] | None:
    """Labels of the whole set or none at all; fills in the report."""
    missing = sum(label is None for label in labels)
    if missing:
        if missing < len(labels):
            report.notes.append(
                f"{missing} of {len(labels)} images have no label (the first is "
                f"{names[labels.index(None)]}), so the set is written without labels"
            )
        return None
    values = label_array(labels, names, source.name)
    report.class_names = source.class_names
    report.num_classes = len(np.unique(values)) if values.ndim == 1 else values.shape[1]
    if report.class_names is not None and report.num_classes < len(report.class_names):
        report.notes.append(
            f"{report.num_classes} of the {len(report.class_names)} classes occur in the set"
        )
    return values


def _nothing_left(source: Path, report: Report) -> str:
    lines = [f"{source}: no image in it can be used, so nothing was written"]
    if report.too_small:
        lines.append(f"{report.too_small} images are smaller than the resolution")
    lines += report.bad[:5]
    if len(report.bad) > 5:
        lines.append(f"... and {len(report.bad) - 5} more")
    return "\n  ".join(lines)


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    records = iter(records)
    while chunk := list(itertools.islice(records, _CHUNK)):
        yield chunk


def _format(target: Path, form: Format | None) -> Format:
    by_suffix = {suffix: name for name, suffix in _SUFFIXES.items()}
    guess: Format = by_suffix.get(target.suffix.lower(), "folder")
    if form is None:
        if guess == "folder":
            check_folder_name(
                target, ".zip (an archive) or .safetensors (a packed set)", "form=folder"
            )
        return guess
    if form not in FORMATS:
        raise DataError(f"format {form!r}: choose one of {', '.join(FORMATS)}")
    if form != guess:
        ending = _SUFFIXES.get(form)
        raise DataError(
            f"{target}: the name of a {form} set should end in {ending}"
            if ending
            else f"{target}: the name of a folder should not end in {target.suffix}"
        )
    return form


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise DataError(f"{target}: the result would replace its own source")
    occupied = any(target.iterdir()) if target.is_dir() else target.exists()
    if occupied:
        check_free(target, overwrite)
    if occupied and target.is_dir() and not (target / LABELS_FILE).is_file():
        raise DataError(
            f"{target} holds something else than a data set ({LABELS_FILE} is not in it), which "
            "would be lost; choose another name"
        )


# ------------------------------------------------------------------------------------------- sinks


class _Sink(Protocol):
    def encode(self, image: Pixels) -> Any:
        """What `add` wants of uint8 [H, W] or [H, W, C]; runs in any thread."""

    def add(self, payload: Any, shape: tuple[int, ...]) -> None:
        """Append an image."""

    def finish(self, labels: NDArray[Any] | None, class_names: tuple[str, ...] | None) -> None:
        """Write the labels."""


class _ArchiveSink:
    def __init__(self, put: archive.PutFile) -> None:
        self._put = put
        self._count, self._ending = 0, "png"

    def encode(self, image: Pixels) -> bytes:
        return archive.encode_member(image)

    def add(self, payload: bytes, shape: tuple[int, ...]) -> None:
        self._ending = archive.member_ending(shape[0])
        self._put(archive.member_name(self._count, self._ending), payload)
        self._count += 1

    def finish(self, labels: NDArray[Any] | None, class_names: tuple[str, ...] | None) -> None:
        values = None if labels is None else labels.tolist()
        self._put(LABELS_FILE, archive.labels_json(values, class_names, self._ending))


class _PackedSink:
    def __init__(self, file: IO[bytes], name: str, class_names: tuple[str, ...] | None) -> None:
        self._file, self._name, self._class_names = file, name, class_names
        self._writer: PackedWriter | None = None

    def encode(self, image: Pixels) -> Pixels:
        return np.ascontiguousarray(channels_first(image))

    def add(self, payload: Pixels, shape: tuple[int, ...]) -> None:
        if self._writer is None:
            channels, height, width = shape
            self._writer = PackedWriter(
                self._file, (channels, height, width), self._name, self._class_names
            )
        self._writer.add(payload)

    def finish(self, labels: NDArray[Any] | None, class_names: tuple[str, ...] | None) -> None:
        assert self._writer is not None
        self._writer.finish(labels)


@contextlib.contextmanager
def _sink(form: Format, target: Path, source: Source) -> Iterator[_Sink]:
    if form == "folder":
        with atomic_folder(target) as folder:
            yield _ArchiveSink(archive.folder_putter(folder))
        return
    with atomic_file(target) as file:
        if form == "packed":
            yield _PackedSink(file, target.stem, source.class_names)
        else:
            with archive.open_zip(file) as zipped:
                yield _ArchiveSink(archive.zip_putter(zipped))

"""WebDataset shards: tar files in which the files of a sample are called alike up to a dot."""

from __future__ import annotations

import contextlib
import functools
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from tessera.data.decode import is_image
from tessera.data.sources.base import (
    NO_LABELS,
    Kind,
    Options,
    Pixels,
    Record,
    Source,
    choose_name,
    number_classes,
)
from tessera.data.sources.walk import files_of
from tessera.errors import DataError
from tessera.plain import MIB, parse_json

_PATTERN = re.compile(r"(.*)\{(\d+)\.\.(\d+)\}(.*\.tar)")
_MOST_SHARDS = 100_000
_LABEL_BYTES = MIB
_KEYS = ("label", "class", "cls")


@dataclass
class _Sample:
    """Where the files of a sample are: (offset, size) by ending."""

    shard: Path
    key: str
    files: dict[str, tuple[int, int]] = field(default_factory=dict)


def is_pattern(path: Path) -> bool:
    """Whether a path stands for numbered shards: `photos-{000..003}.tar`."""
    return _PATTERN.fullmatch(path.name) is not None


def _matches(path: Path) -> bool:
    packed = path.name.lower().endswith((".tar.gz", ".tgz"))
    return packed or path.suffix.lower() == ".tar" or bool(files_of(path, ".tar"))


def _shards(path: Path) -> list[Path]:
    if path.is_dir():
        return files_of(path, ".tar")
    numbers = _PATTERN.fullmatch(path.name)
    if path.exists() or numbers is None:
        return [path]
    before, first, last, behind = numbers.groups()
    if len(first) > 9 or len(last) > 9 or not 0 <= int(last) - int(first) < _MOST_SHARDS:
        raise DataError(f"{path}: the numbers of the shards should rise, as in {{000..003}}")
    return [
        path.with_name(f"{before}{number:0{len(first)}d}{behind}")
        for number in range(int(first), int(last) + 1)
    ]


@contextlib.contextmanager
def _open(path: Path, options: Options) -> Iterator[Source]:
    samples: list[_Sample] = []
    ignored: list[str] = []
    for shard in _shards(path):
        _read_index(shard, samples, ignored)
    where = str(path)
    ending = _image_ending(samples, options, where)
    pictures = [sample for sample in samples if ending(sample) is not None]
    values = [_label(sample, options) for sample in pictures]
    _check_label_key(values, options, where)
    labels, names = number_classes(values, where)
    records = [
        Record(
            f"{sample.shard}: {sample.key}.{ending(sample)}",
            label,
            functools.partial(_load, sample, str(ending(sample)), options),
        )
        for sample, label in zip(pictures, labels, strict=True)
    ]
    ignored += [f"{s.shard}: {s.key}" for s in samples if ending(s) is None]
    name = path.stem.split("{")[0].rstrip("-_") or path.stem
    yield Source("WebDataset shards", name, len(records), records, names, tuple(ignored))


def _read_index(shard: Path, samples: list[_Sample], ignored: list[str]) -> None:
    """Add the samples of a shard; the contents of its files are stepped over."""
    try:
        with open(shard, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise DataError(f"{shard} is compressed; unpack it first (gunzip)")
            file.seek(0)
            bounded = cast("IO[bytes]", _Headers(file, str(shard)))
            with tarfile.open(fileobj=bounded, mode="r:") as archive:
                for member in archive:
                    _add_member(shard, member, samples, ignored)
                    cast("Any", archive).members = []  # tarfile keeps them all
                # It takes any damaged header for the end.
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise DataError(
                        f"{shard}: not a whole tar file (cut off or damaged at byte "
                        f"{archive.offset:,})"
                    )
    except FileNotFoundError as error:
        raise DataError(f"{shard}: no such file") from error
    except DataError:
        raise
    except Exception as error:  # a damaged archive may raise nearly anything
        raise DataError(f"{shard}: not a whole tar file ({error})") from error


def _add_member(
    shard: Path, member: tarfile.TarInfo, samples: list[_Sample], ignored: list[str]
) -> None:
    if member.isdir():
        return
    name = member.name.removeprefix("./")
    parts = name.split("/")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    key, dot, ending = parts[-1].partition(".")
    if not member.isreg() or member.issparse() or parts[0] == "" or hidden or not (key and dot):
        ignored.append(f"{shard}: {member.name[:200]}")
        return
    key, ending = "/".join([*parts[:-1], key]), ending.lower()
    last = samples[-1] if samples else None
    if last is None or last.key != key or last.shard != shard:
        last = _Sample(shard, key)
        samples.append(last)
    if ending in last.files:
        raise DataError(f"{shard}: two files {key}.{ending}")
    last.files[ending] = (member.offset_data, member.size)


class _Headers:
    """A tar file of which headers are read, and no header of impossible length."""

    def __init__(self, file: IO[bytes], where: str) -> None:
        self._file, self._where = file, where
        self.tell, self.seek, self.seekable = file.tell, file.seek, file.seekable

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MIB:
            raise DataError(f"{self._where}: a header of over {MIB:,} bytes in it")
        return self._file.read(size)


def _image_ending(samples: list[_Sample], options: Options, where: str) -> Any:
    """Gives the ending of the image of a sample, or None where it has none."""
    there = sorted({e for s in samples for e in s.files if is_image(f"x.{e}")})
    if options.image_column is not None:
        chosen = choose_name(
            options.image_column.lower(), [], there, "image", "image_column", where
        )
        return lambda sample: chosen if chosen in sample.files else None
    if not there:
        raise DataError(f"{where}: no images in it")
    for sample in samples:
        several = [e for e in there if e in sample.files]
        choose_name(None, several, there, f"image of sample {sample.key}", "image_column", where)
    return lambda sample: next((e for e in there if e in sample.files), None)


def _label(sample: _Sample, options: Options) -> int | str | None:
    """The number in `.cls`, or what `.json` says."""
    column = options.label_column
    if column == NO_LABELS:
        return None
    if "cls" in sample.files and column in (None, "cls"):
        text = _bytes(sample, "cls", _LABEL_BYTES).strip()
        if not text.isdigit() or len(text) > 10:
            raise DataError(f"{sample.shard}: {sample.key}.cls holds no number of a class")
        return int(text)
    if "json" not in sample.files:
        return None
    where = f"{sample.shard}: {sample.key}.json"
    content = parse_json(_bytes(sample, "json", _LABEL_BYTES), where, max_bytes=_LABEL_BYTES)
    fields = content if isinstance(content, dict) else {}
    keys = _KEYS if column is None else (column,)
    value = next((fields[key] for key in keys if fields.get(key) is not None), None)
    if value is not None and type(value) not in (int, str):
        raise DataError(f"{where}: its label is neither a whole number nor a name")
    return cast("int | str | None", value)


def _check_label_key(values: list[int | str | None], options: Options, where: str) -> None:
    given = options.label_column
    if given not in (None, NO_LABELS) and all(value is None for value in values):
        raise DataError(f"{where}: no sample has a label {given!r} (.cls, or a key of .json)")


def _load(sample: _Sample, ending: str, options: Options) -> Pixels:
    data = _bytes(sample, ending, options.max_file_bytes)
    return options.decode(data, f"{sample.shard}: {sample.key}.{ending}")


def _bytes(sample: _Sample, ending: str, limit: int) -> bytes:
    offset, size = sample.files[ending]
    where = f"{sample.shard}: {sample.key}.{ending}"
    if size > limit:
        raise DataError(
            f"{where} has {size:,} bytes, and over {limit:,} are not read. If it is an image as it "
            "should be: tessera data convert --max-file-size MIB"
        )
    try:
        with open(sample.shard, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror})") from error
    if len(data) < size:
        raise DataError(f"{where}: the tar file is cut off there")
    return data


SHARDS = Kind(
    "WebDataset .tar shards, folders of them or NAME-{000..003}.tar",
    _matches,
    _open,
    frozenset({"image_column", "label_column"}),
)

"""What cannot be written is said in words, by every writer, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import resource
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import random_images, write_packed
from tiny_pipeline import tiny_pipeline

from tessera.data.convert import convert_images
from tessera.data.dataset import open_dataset
from tessera.data.encoding import write_latents
from tessera.errors import OutputError
from tessera.files import atomic_file, atomic_folder, check_writable, writing
from tessera.images import save_png
from tessera.metrics.formats import Measured, save_features
from tessera.pipelines.experts import ExpertsPipeline
from tessera.pipelines.generate import Job, generate_arrays, generate_folder
from tessera.sampling.output import Trajectory, write_npz

SOURCE = "source.safetensors"


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk: longer files are refused, though with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Codec:
    """Latents that are the pixels."""

    model, downsample, channels, scale, shift = "identity", 1, 3, 1.0, 0.0
    precision = "fp32"

    def weights_digest(self) -> str:
        return "0" * 64

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([pixels.float()] * 2, dim=1)


def job() -> Job:
    return Job(tiny_pipeline(), [0, 1], 0, 2, {})


def experts(target: Path) -> None:
    ExpertsPipeline([tiny_pipeline(), tiny_pipeline()], [1.0]).save(target)


def latents(target: Path) -> None:
    codec: Any = Codec()
    write_latents(open_dataset(target.parents[1] / SOURCE), codec, target)


def samples(target: Path) -> None:
    write_npz(target, random_images(20).transpose(0, 2, 3, 1), None)


def animation(target: Path) -> None:
    film = Trajectory(target, job().pipe.to_pixels)
    generate_arrays(job(), target.parent, trajectory=film)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "set.zip": lambda target: convert_images(target.parents[1] / SOURCE, target),
    "set.safetensors": lambda target: convert_images(target.parents[1] / SOURCE, target),
    "set": lambda target: convert_images(target.parents[1] / SOURCE, target),
    "latents.zip": latents,
    "samples.npz": samples,
    "samples": lambda target: generate_folder(job(), target),
    "film.gif": animation,
    "grid.png": lambda target: save_png(target, np.random.default_rng(0).integers(
        0, 256, (64, 64, 3), dtype=np.uint8)),
    "features.npz": lambda target: save_features(
        target, Measured("x", "inception", n=9, features=torch.zeros(9, 2048))),
    "pipeline": lambda target: tiny_pipeline().save(target),
    "experts": experts,
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_says_why_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    write_packed(tmp_path / SOURCE, random_images(20))
    target = tmp_path / "new" / name
    # Of samples, the settings must be written (1 kB), and the images must not.
    limit = 100 if name != "samples" else 0
    with files_of_at_most(limit), pytest.raises(OutputError) as raised:
        WRITERS[name](target)
    assert str(target) in str(raised.value)
    assert "cannot be written: it is larger than a file may be there" in str(raised.value)
    assert ".part" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == [SOURCE]
    WRITERS[name](target)
    assert target.exists()


def test_what_was_encoded_is_kept_and_the_set_is_named(tmp_path: Path) -> None:
    write_packed(tmp_path / SOURCE, random_images(20))
    target = tmp_path / "new" / "latents.safetensors"
    with files_of_at_most(100), pytest.raises(OutputError) as raised:
        latents(target)
    assert str(target) in str(raised.value)
    assert not target.exists()
    latents(target)
    assert [path.name for path in target.parent.iterdir() if path.suffix] == [target.name]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "only be read from"),
        (errno.EACCES, "may not write there"),
    ],
)
@pytest.mark.parametrize("opened", [atomic_file, atomic_folder])
def test_reasons_at_the_beginning(
    number: int, words: str, opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(number, "x")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    target = tmp_path / "a" / "b" / "file"
    with pytest.raises(OutputError, match=words), opened(target):
        pass
    assert not list(tmp_path.iterdir())


def test_what_is_read_meanwhile_is_not_blamed_on_the_result(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic_file(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "x", "source.png")
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "x"):
        raise FileNotFoundError(errno.ENOENT, "x", "source.png")


def test_an_archive_that_cannot_be_closed_either(tmp_path: Path) -> None:
    """Python's own words for that say nothing of the disk."""

    def write() -> None:
        try:
            raise OSError(errno.ENOSPC, "x")
        finally:
            raise zipfile.BadZipFile("a handle is open")

    with pytest.raises(OutputError, match="the disk is full"), writing(tmp_path / "x"):
        write()


def test_a_result_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="a part of its path is a file"):
        check_writable(tmp_path / "file" / "x.npz")
    with pytest.raises(OutputError, match="there is a folder of that name"):
        check_writable(tmp_path)
    check_writable(tmp_path / "new" / "x.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

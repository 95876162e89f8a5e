"""The classifier of a set is kept beside it, and never used for another set."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import write_archive, write_packed
from typer.testing import CliRunner, Result

from tessera.cli import app
from tessera.errors import DataError
from tessera.images import save_png
from tessera.metrics import reference as module
from tessera.metrics.reference import open_reference, reference_of

LABELS = [i % 2 for i in range(24)]


def images(seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    made = random.integers(0, 100, (24, 1, 8, 8))
    made[1::2] += 150
    return made.astype(np.uint8)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sets that a classifier was trained on, quickly."""
    names: list[str] = []
    build = module.build_reference

    def counted(data: Any, **how: Any) -> module.Reference:
        names.append(data.name)
        return build(data, **{**how, "training_images": 256})

    monkeypatch.setattr(module, "build_reference", counted)
    return names


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.ref.npz"))


def test_a_set_is_trained_on_once(tmp_path: Path, trained: list[str]) -> None:
    photos = write_archive(tmp_path / "photos.zip", images(), LABELS)
    samples = write_archive(tmp_path / "samples.zip", images(2), LABELS)

    def distance(reference: Path) -> float:
        result = evaluate("score", samples, reference, "--json")
        assert result.exit_code == 0, result.output
        return float(json.loads(result.stdout)["fd_classifier"])

    first = distance(photos)
    assert trained == ["photos"]
    assert distance(photos) == pytest.approx(first, rel=1e-3)
    assert evaluate("reference", photos, tmp_path / "photos.npz").exit_code == 0
    assert distance(tmp_path / "photos.npz") == pytest.approx(first, rel=1e-3)
    assert trained == ["photos"]
    assert len(kept(tmp_path)) == 1
    with np.load(kept(tmp_path)[0], allow_pickle=False) as file:
        assert json.loads(str(file["tessera"]))["name"] == "photos"


def folder_of(path: Path, made: np.ndarray) -> Path:
    for index, image in enumerate(made):
        save_png(path / "ab"[index % 2] / f"{index:02d}.png", image.transpose(1, 2, 0))
    return path


def npz_of(path: Path, made: np.ndarray) -> Path:
    np.savez(path, made.transpose(0, 2, 3, 1), np.array(LABELS))
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.zip", lambda path, made: write_archive(path, made, LABELS)),
        ("a.safetensors", lambda path, made: write_packed(path, made, LABELS)),
        ("a.npz", npz_of),
        ("a", folder_of),
    ],
)
def test_a_changed_set_is_another_even_of_the_same_size_and_time(
    name: str, write: Callable[[Path, np.ndarray], Path], tmp_path: Path, trained: list[str]
) -> None:
    path = write(tmp_path / name, images())
    times = {file: file.stat().st_mtime_ns for file in [path, *path.rglob("*")]}
    before = reference_of(path)
    write(path, images(1))
    for file, moment in times.items():
        os.utime(file, ns=(moment, moment))
    after = reference_of(path)
    assert len(trained) == 2
    assert not np.array_equal(before.statistics.mu, after.statistics.mu)
    assert len(kept(tmp_path)) == 1  # nothing is left of the set that is no more
    assert np.array_equal(reference_of(path).statistics.mu, after.statistics.mu)
    assert len(trained) == 2


def test_other_options_and_other_sets_have_files_of_their_own(
    tmp_path: Path, trained: list[str]
) -> None:
    photos = write_archive(tmp_path / "photos.zip", images(), LABELS)
    other = write_archive(tmp_path / "other.zip", images(1), LABELS)
    for _ in range(2):
        reference_of(photos)
        reference_of(photos, seed=1)
        reference_of(photos, training_images=300)
        reference_of(other)
    assert trained == ["photos"] * 3 + ["other"]
    assert len(kept(tmp_path)) == 4


def test_names_and_labels_belong_to_a_folder(tmp_path: Path, trained: list[str]) -> None:
    photos = folder_of(tmp_path / "photos", images())
    reference_of(photos)
    (photos / "notes.txt").write_text("no image")
    reference_of(photos)
    assert len(trained) == 1
    (photos / "a").rename(photos / "c")
    assert reference_of(photos).extractor.facts.class_names == ("b", "c")
    names = [f"{'cb'[i % 2]}/{i:02d}.png" for i in range(24)]
    content = {"labels": [[name, index % 3] for index, name in enumerate(names)]}
    (photos / "dataset.json").write_text(json.dumps(content))
    assert reference_of(photos).extractor.facts.outputs == 3
    assert len(trained) == 3


def test_a_set_that_changes_meanwhile_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_archive(tmp_path / "photos.zip", images(), LABELS)
    build = module.build_reference

    def changed(data: Any, **how: Any) -> module.Reference:
        os.replace(write_archive(tmp_path / "new.zip", images(1), LABELS), photos)
        return build(data, **{**how, "training_images": 256})

    monkeypatch.setattr(module, "build_reference", changed)
    reference_of(photos)
    assert kept(tmp_path) == []


def test_a_damaged_file_is_made_again(tmp_path: Path, trained: list[str]) -> None:
    photos = write_archive(tmp_path / "photos.zip", images(), LABELS)
    reference_of(photos)
    (file,) = kept(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    for _ in range(2):
        open_reference(photos)
    assert len(trained) == 2


def test_a_place_that_cannot_be_written_is_no_error(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_archive(tmp_path / "photos.zip", images(), LABELS)

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system", str(tmp_path))

    monkeypatch.setattr(module, "save_reference", refuse)
    result = evaluate("score", photos, photos)
    assert result.exit_code == 0, result.output
    assert "photos.zip cannot be kept beside it (Read-only file system)" in result.output
    assert kept(tmp_path) == []


def test_what_is_no_set_is_refused_before(tmp_path: Path, trained: list[str]) -> None:
    with pytest.raises(DataError, match="no such file"):
        reference_of(tmp_path / "absent.zip")
    photos = write_archive(tmp_path / "photos.zip", images(), LABELS)
    shutil.copy(photos, tmp_path / "few.zip")
    write_archive(tmp_path / "few.zip", images()[:4], LABELS[:4])
    with pytest.raises(DataError, match="too few"):
        reference_of(tmp_path / "few.zip")
    assert kept(tmp_path) == []


@pytest.mark.parametrize("command", ["reference", "features", "nll"])
def test_nothing_is_overwritten_unless_asked_to(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = npz_of(tmp_path / "photos.npz", images())
    out = tmp_path / "mine.npz"
    out.write_bytes(b"mine")

    def words(out: Path) -> str:
        pair = ("runs/none", photos, "--out", out) if command == "nll" else (photos, out)
        result = evaluate(command, *pair)
        assert result.exit_code == 1
        return str(result.exception)

    assert f"{out} exists already; choose another name or add --overwrite" in words(out)
    assert "own source" in words(photos)
    (tmp_path / "folder.npz").mkdir()
    assert "is a folder" in words(tmp_path / "folder.npz")
    assert "give it a name with .npz" in words(tmp_path / "a.rar")
    assert out.read_bytes() == b"mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "folder.npz", "mine.npz", "photos.npz",
    ]  # fmt: skip


def test_overwriting_when_asked_to(tmp_path: Path, trained: list[str]) -> None:
    photos = write_archive(tmp_path / "photos.zip", images(), LABELS)
    out = tmp_path / "mine.npz"
    out.write_bytes(b"mine")
    result = evaluate("reference", photos, out, "--overwrite")
    assert result.exit_code == 0, result.output
    assert open_reference(out).statistics.n == 24

"""Files and folders are whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tessera.errors import TesseraError
from tessera.files import (
    atomic_file,
    atomic_folder,
    check_folder_name,
    check_free,
    is_hub_id,
    sha256,
    user_path,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "weights.bin"
    with atomic_file(target) as file:
        file.write(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert names(target.parent) == ["weights.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "weights.bin"
    target.write_bytes(b"old")

    def write_half() -> None:
        with atomic_file(target) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["weights.bin"]


def test_text_and_permissions(tmp_path: Path) -> None:
    target = tmp_path / "log.txt"
    mask = os.umask(0o027)
    try:
        with atomic_file(target, "w") as file:
            file.write("σ")
    finally:
        os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o640


def test_folder_replaces_an_old_one(tmp_path: Path) -> None:
    target = tmp_path / "pipeline"
    for content in ("first", "second"):
        with atomic_folder(target) as part:
            (part / content).write_text(content)
    assert names(target) == ["second"]
    assert names(tmp_path) == ["pipeline"]


def test_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "pipeline"
    with atomic_folder(target) as part:
        (part / "old").write_text("old")

    def write_half() -> None:
        with atomic_folder(target) as part:
            (part / "new").write_text("half")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        write_half()
    assert names(target) == ["old"]
    assert names(tmp_path) == ["pipeline"]


def test_json_and_digest(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"images": 3})
    assert json.loads((tmp_path / "a.json").read_text()) == {"images": 3}
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea")


def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a") == user_path(Path("~/a")) == tmp_path / "a"
    assert user_path("~") == tmp_path
    assert user_path("a/~") == Path("a/~")
    write_json("~/a.json", 1)
    with atomic_folder("~/b") as part:
        (part / "c").write_text("")
    assert names(tmp_path) == ["a.json", "b"]


def test_ids_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("user/some-model.v2")
    for path in ("user", "a/b/c", "/user/model", "user/", "~/model", "./model", "../model"):
        assert not is_hub_id(path), path
    (tmp_path / "user").mkdir()
    assert not is_hub_id("user/some-model.v2")


def test_names_of_folders(tmp_path: Path) -> None:
    for name in ("a", "a.b", "a-1.5", "a.backup2", "."):
        check_folder_name(tmp_path / name, ".npz", "output=png")
    for name in ("a.jpg", "a.b.PNG", "a.7z", "a.npz2"):
        with pytest.raises(TesseraError, match=r"End the name in \.npz,.*`output=png`"):
            check_folder_name(tmp_path / name, ".npz", "output=png")
    (tmp_path / "a.jpg").mkdir()
    check_folder_name(tmp_path / "a.jpg", ".npz", "output=png")


def test_files_that_are_there(tmp_path: Path) -> None:
    check_free(tmp_path / "a", overwrite=False)
    (tmp_path / "a").touch()
    check_free(tmp_path / "a", overwrite=True)
    with pytest.raises(TesseraError, match=r"a exists already.*`overwrite=True`"):
        check_free(tmp_path / "a", overwrite=False)

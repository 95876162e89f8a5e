"""Files and folders are whole or absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tessera import files, processes
from tessera.errors import CheckpointError, DataError, OutputError, TesseraError
from tessera.files import (
    atomic_file,
    atomic_folder,
    check_folder_name,
    check_free,
    create_file,
    is_hub_id,
    read_json,
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
    assert is_hub_id("user/name@refs/pr/1")
    for path in (
        "user",
        "a/b/c",
        "user@v1",
        "user/name@",
        "user/name@a@b",
        "/user/model",
        "user/",
        "~/model",
        "./model",
        "../model",
    ):
        assert not is_hub_id(path), path
    (tmp_path / "user").mkdir()
    assert not is_hub_id("user/some-model.v2")
    assert not is_hub_id("user/name@refs/pr/1")


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


WRITE_AND_DIE = """
import sys
from tessera.files import atomic_file, atomic_folder
kind, path = sys.argv[1:]
with (atomic_folder if kind == "folder" else atomic_file)(path) as part:
    if kind == "folder":
        (part / "half").write_text("half")
    else:
        part.write(b"half")
        part.flush()
    print("half", flush=True)
    sys.stdin.read()
"""


def writer(kind: str, path: Path) -> subprocess.Popen[str]:
    """A process that has begun to write `path`, and goes on when its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_AND_DIE, kind, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    return process


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has written nothing yet."""
    monkeypatch.setattr(files, "_tidied", set())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_goes_with_the_next_write(
    kind: str, tmp_path: Path, anew: None
) -> None:
    process = writer(kind, tmp_path / "photos")
    (left,) = tmp_path.iterdir()
    write_json(tmp_path / "a.json", 1)
    assert names(tmp_path) == [left.name, "a.json"]  # its process still writes
    process.kill()
    # Not waited for yet: one that has ended has, even if nobody has asked how.
    while processes.alive(process.pid):
        time.sleep(0.002)
    files._tidied.clear()
    write_json(tmp_path / "b.json", 1)
    assert names(tmp_path) == ["a.json", "b.json"]
    process.communicate()


def test_what_others_left_stays(tmp_path: Path, anew: None) -> None:
    own = f"{processes.namespace()}-{2**22 + 1}"  # a number beyond those of processes
    others = [
        f".x.{'0' * 8}-1.abcdefgh.part",  # of another machine
        ".x.abcdefgh.part",
        ".x.part",
        f"x.{own}.abcdefgh.part",
        f".x.{own}.abcdefgh.part.txt",
    ]
    for name in [*others, f".x.{own}.abcdefgh.part"]:
        (tmp_path / name).write_text("x")
    write_json(tmp_path / "a.json", 1)
    assert names(tmp_path) == sorted([*others, "a.json"])


def test_a_folder_that_was_moved_aside_in_vain_is_put_back(tmp_path: Path, anew: None) -> None:
    tag = f"{processes.namespace()}-{2**22 + 1}.abcdefgh"
    old = tmp_path / f".pipeline.{tag}.old" / "pipeline"
    old.mkdir(parents=True)
    (old / "config.json").write_text("old")
    (tmp_path / f".pipeline.{tag}.part").mkdir()
    write_json(tmp_path / "a.json", 1)
    assert names(tmp_path) == ["a.json", "pipeline"]
    assert (tmp_path / "pipeline" / "config.json").read_text() == "old"

    (tmp_path / f".pipeline.{tag}.old" / "pipeline").mkdir(parents=True)
    files._tidied.clear()
    write_json(tmp_path / "b.json", 1)
    assert names(tmp_path) == ["a.json", "b.json", "pipeline"]
    assert names(tmp_path / "pipeline") == ["config.json"]


def test_a_folder_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "pipeline"
    with atomic_folder(target) as part:
        (part / "old").write_text("old")
    replace = os.replace

    def refuse(source: Path, into: Path) -> None:
        if Path(into) == target and (Path(source) / "new").exists():
            raise OSError(28, "No space left on device")
        replace(source, into)

    def write() -> None:
        with atomic_folder(target) as part:
            (part / "new").write_text("new")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match="the disk is full"):
        write()
    assert names(target) == ["old"]
    assert names(tmp_path) == ["pipeline"]


def test_a_file_is_created_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_file(tmp_path / "a", "one")
    with pytest.raises(FileExistsError):
        create_file(tmp_path / "a", "two")
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links")))
    create_file(tmp_path / "b", "three")
    with pytest.raises(FileExistsError):
        create_file(tmp_path / "b", "four")
    assert [(tmp_path / name).read_text() for name in names(tmp_path)] == ["one", "three"]


def test_names_as_long_as_can_be(tmp_path: Path) -> None:
    write_json(tmp_path / ("a" * 255), 1)
    for _ in range(2):
        with atomic_folder(tmp_path / ("b" * 255)) as part:
            (part / "x").touch()
    assert names(tmp_path) == ["a" * 255, "b" * 255]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "nested"),
        (b"[" * 50 + b"]" * 50, "nested"),
        (b'{"a": ', "JSON"),
        (b"\xff", "JSON"),
        (b'"' + b"x" * 2**20 + b'"', "1,048,57"),
    ],
)
def test_json_is_read_within_bounds(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_json(path, max_bytes=2**20, error=CheckpointError)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")
    with pytest.raises(DataError, match="cannot be read"):
        read_json(tmp_path)


def test_processes_are_told_from_later_ones_of_their_number() -> None:
    own = os.getpid()
    since = processes.started(own)
    assert processes.alive(own)
    assert processes.alive(own, since)
    if since is not None:
        assert not processes.alive(own, since - 1)
    assert not processes.alive(2**22 + 1)
    assert not processes.alive(2**80)

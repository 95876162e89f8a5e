"""Sets of latents that are cut off, mixed, foreign or hostile: an error that names the file."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hostile_files import budget, odd_bytes, odd_json, seeds
from hypothesis import given

from tessera.data.latent_formats.base import LatentInfo, LatentPlan
from tessera.data.latent_formats.registry import choose_format, latent_sink
from tessera.data.latents import is_latents, open_latents
from tessera.errors import DataError

COUNT = 5
NAMES = {"packed": "set.safetensors", "lego": "set.zip", "npz": "npz", "ptshard": "shards"}


def write(path: Path, name: str, side: int = 4, first: int = 0) -> Path:
    form = choose_format(path, name, True)
    plan = LatentPlan(
        "x", COUNT, (2, side, side), LatentInfo("v", 8, 2, 0.5, 0.0), not form.drawn,
        np.arange(COUNT) % 2, ("a", "b"), form.precision or "float16", 2,
    )  # fmt: skip
    values = torch.full((COUNT, 4, side, side), 0.5)
    with latent_sink(path, form, plan) as put:
        put(0, values, values if plan.mirrored else None)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("whole")
    sets = {name: write(folder / file, name) for name, file in NAMES.items()}
    write(folder / "lego", "lego")
    return {**sets, "lego folder": folder / "lego"}


def copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        target.unlink(missing_ok=True)
        shutil.copy(source, target)
    return target


def files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def read_all(path: Path) -> None:
    data = open_latents(path)
    data.read(np.arange(len(data)))
    if data.flips:
        both = open_latents(path, xflip=True)
        both.read(np.arange(2 * len(data)))
        both.close()
    data.close()


@pytest.mark.parametrize("kind", [*NAMES, "lego folder"])
def test_damaged_files(whole: dict[str, Path], tmp_path: Path, kind: str) -> None:
    @given(seeds)
    @budget(60)
    def damage(random: Random) -> None:
        path = copy(whole[kind], tmp_path / whole[kind].name)
        chosen = random.choice(files(path))
        data = chosen.read_bytes()
        if chosen.suffix == ".json" and random.random() < 0.7:
            data = json.dumps(odd_json(json.loads(data), random, 0.1)).encode()
        elif random.random() < 0.3:
            data = data[: random.randrange(len(data))]
        else:
            data = odd_bytes(data, random)
        chosen.unlink()
        chosen.write_bytes(data)
        is_latents(path)
        with contextlib.suppress(DataError):
            read_all(path)

    damage()


@pytest.mark.parametrize("kind", [*NAMES, "lego folder"])
def test_truncated_files_are_named(whole: dict[str, Path], tmp_path: Path, kind: str) -> None:
    for number, file in enumerate(files(whole[kind])):
        for keep in (0, 40, -1):
            path = copy(whole[kind], tmp_path / whole[kind].name)
            cut = files(path)[number]
            data = cut.read_bytes()
            cut.unlink()
            cut.write_bytes(data[:keep])
            with pytest.raises(DataError) as error:
                read_all(path)
            assert cut.name in str(error.value), (file, keep)


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def shard(**tensors: torch.Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


def row(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("attacked",)


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


TWO = torch.zeros(2, dtype=torch.int64)
MIXED: list[tuple[str, str, bytes, str]] = [
    ("lego folder", "00000/img00000003.npy", npy(row(2, 8, 8)), r"shape \(2, 8, 8\)"),
    ("lego folder", "00000/img00000003.npy", npy(row(2, 4, 4, dtype=np.float64)), "float32"),
    ("lego folder", "00000/img00000000.npy", npy(row(2, 4, 8)), "wanted, not"),
    ("lego folder", "00000/img00000001.png", b"", "does not belong"),
    ("lego folder", "00000/img00000005.npy", npy(row(2, 4, 4)), "says 5, there are 6"),
    ("lego folder", "dataset.json", b'{"labels": [["00000/img00000000.npy", 1]]}', "no label"),
    ("lego folder", "latents.json", b"{}", "is not what"),
    ("npz", "a/img00000002.npz", npz(moments=row(4, 8, 8)), r"shape \(4, 8, 8\)"),
    ("npz", "a/img00000002.npz", npz(moments=row(4, 2, 8)), r"shape \(4, 2, 8\)"),
    ("npz", "a/img00000002.npz", npz(other=row(4, 4, 4)), "no array moments"),
    ("npz", "a/img00000002.npz", npz(moments=row(4, 4, 4)), "no array moments_flip"),
    ("npz", "a/img00000000.npz", npz(moments=row(3, 4, 4)), "wanted, not"),
    ("npz", "a/img00000000.npz", npz(moments=np.array(None)), "float32"),
    ("npz", "b/z.png", b"", "does not belong"),
    ("npz", "c/img00000009.npz", npz(moments=row(4, 4, 4)), "says 5, there are 6"),
    ("npz", "latents.json", b"[]", "is not what"),
    ("ptshard", "shard_00001.pt", shard(moments=half(2, 4, 8, 8), labels=TWO), "are alike"),
    ("ptshard", "shard_00001.pt", shard(moments=half(2, 4, 4, 4), labels=TWO), "are alike"),
    ("ptshard", "shard_00001.pt", shard(moments=half(2, 3, 4, 4), labels=TWO), "moments of shape"),
    ("ptshard", "shard_00001.pt", shard(moments=half(2, 4, 4, 4).int(), labels=TWO), "moments of"),
    ("ptshard", "shard_00001.pt", shard(moments=half(2, 4, 4, 4)), "no dictionary"),
    ("ptshard", "shard_00001.pt", shard(moments=half(2, 4, 4, 4), labels=TWO[:1]), "not 2 class"),
    ("ptshard", "shard_00001.pt", shard(moments=half(2, 4, 4, 4), labels=TWO - 1), "no class ind"),
    ("ptshard", "shard_00001.pt", shard(moments=half(2, 4, 4, 4).mT, labels=TWO), "in a row"),
    ("ptshard", "shard_00001.pt", shard(moments=half(1, 4, 4, 4).expand(2, 4, 4, 4), labels=TWO),
     "in a row"),
    ("ptshard", "shard_00001.pt", shard(moments=half(2, 4, 4, 4), labels=Attack()), "mkdir"),
    ("ptshard", "shard_00002.txt", b"", "does not belong"),
    ("ptshard", "shard_00009.pt", shard(moments=half(1, 4, 4, 4), labels=TWO[:1]), "are alike"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "data", "message"), MIXED)
def test_mixed_and_foreign_files(
    whole: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    name: str,
    data: bytes,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = copy(whole[kind], tmp_path / "set")
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        read_all(path)
    assert Path(name).name in str(error.value) or "says 5" in message
    assert not (tmp_path / "attacked").exists()


def without(path: Path, name: str) -> Path:
    next(path.rglob(name)).unlink()
    return path


def test_sets_of_which_files_are_missing(whole: dict[str, Path], tmp_path: Path) -> None:
    cases = (("npz", "img00000002.npz"), ("ptshard", "shard_00001.pt"))
    for kind, name in cases:
        path = without(copy(whole[kind], tmp_path / kind), name)
        with pytest.raises(DataError, match="not a whole set of latents"):
            read_all(path)
    data = open_latents(whole["npz"])
    gone = copy(whole["ptshard"], tmp_path / "gone")
    data = open_latents(gone)
    (gone / "shard_00000.pt").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"shard_00000\.pt is not whole any more"):
        data.read(np.arange(2))


def bomb(path: Path, member: str, start: bytes) -> None:
    """A ZIP of a few kilobytes with a member of 64 MB."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(member, "w") as file,
    ):
        file.write(start)
        for _ in range(64):
            file.write(bytes(10**6))


def lie_npy(path: Path) -> None:
    path.write_bytes(npy(row(1))[:80].replace(b"(1,)", b"(9**9999,)") + bytes(100))


def long_header(path: Path) -> None:
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"2," * 10**6 + b")}"
    path.write_bytes(b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text)


@pytest.mark.parametrize(
    ("kind", "name", "make"),
    [
        ("npz", "a/img00000002.npz", lambda path: bomb(path, "moments.npy", npy(row(4, 4, 4)))),
        ("lego folder", "00000/img00000000.npy", lie_npy),
        ("lego folder", "00000/img00000001.npy", long_header),
    ],
)
def test_what_would_become_huge(
    whole: dict[str, Path], tmp_path: Path, kind: str, name: str, make: Callable[[Path], None]
) -> None:
    path = copy(whole[kind], tmp_path / "set")
    make(path / name)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=Path(name).name):
            read_all(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()

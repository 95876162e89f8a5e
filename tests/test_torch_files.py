"""Files of `torch.save` that are read where they lie, with nothing run."""

from __future__ import annotations

import mmap
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.errors import DataError
from tessera.torch_files import TENSOR_NAMES, StoredTensor, read_torch_zip


def read(path: Path) -> Any:
    with open(path, "rb") as file:
        return read_torch_zip(
            path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), TENSOR_NAMES
        )


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("attacked",)


def test_tensors_and_views_of_them(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(2, 3, 4)
    torch.save({"whole": whole, "part": whole[1, :, 2:], "n": torch.tensor([7])}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert all(isinstance(tensor, StoredTensor) for tensor in found.values())
    for name, wanted in (("whole", whole), ("part", whole[1, :, 2:]), ("n", torch.tensor([7]))):
        assert torch.equal(found[name].view_of(found[name].storage.read()), wanted)
    assert found["part"].storage is found["whole"].storage


def test_what_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Attack()}, "attack.pt")
    with pytest.raises(DataError, match=r"mkdir, which may run code"):
        read(tmp_path / "attack.pt")
    assert not Path("attacked").exists()
    torch.save(torch.nn.Linear(1, 1), "module.pt")
    with pytest.raises(DataError, match="Linear"):
        read(tmp_path / "module.pt")
    torch.save({"a": torch.zeros(100)}, "whole.pt")
    with (
        zipfile.ZipFile("whole.pt") as source,
        zipfile.ZipFile("small.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(DataError, match="compressed"):
        read(tmp_path / "small.pt")
    Path("cut.pt").write_bytes(Path("whole.pt").read_bytes()[:-40])
    with pytest.raises(DataError, match="the ZIP"):
        read(tmp_path / "cut.pt")

"""Damaged checkpoints of every kind: an error in words and nothing written, or they are read."""

from __future__ import annotations

import argparse
import contextlib
import resource
import shutil
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
from hostile_files import ODD, budget, odd_bytes, seeds
from hypothesis import given
from released_kinds import KINDS, dit_tensors, energy_state, released_bytes
from released_states import write_torch

from tessera.convert.assemble import plan_conversion
from tessera.errors import CheckpointError, TesseraError

MIB = 2**20
HEADS = ("network.heads=3",)


@pytest.fixture(scope="module", autouse=True)
def _little_memory() -> Iterator[None]:
    """All of these tests together allocate little, whatever allocates it."""
    before = peak()
    with mock.patch("tessera.recipes.size.physical", return_value=64 * MIB):
        yield
    assert peak() - before < 512 * MIB


def peak() -> int:
    """The most memory that this process had, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def refused_or_read(path: Path, options: tuple[str, ...]) -> None:
    """Nothing else than an error in words, and nothing written by it."""
    dest = path.parent / "made"
    shutil.rmtree(dest, ignore_errors=True)
    before = {entry.name for entry in path.parent.iterdir()}
    try:
        plan = plan_conversion([path], options=options)
    except TesseraError:
        assert {entry.name for entry in path.parent.iterdir()} == before
    else:
        plan.write(dest)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("name", KINDS)
@given(seeds)
@budget(4)
def test_changed_bytes(folder: Path, name: str, random: Random) -> None:
    file, data = released_bytes(name)
    # Programs lie at the ends of files, numbers between them.
    size = random.choice([1000, 20_000, len(data)])
    side = random.choice(["head", "tail", "cut"])
    match side:
        case "head":
            data = odd_bytes(data[:size], random) + data[size:]
        case "tail":
            data = data[:-size] + odd_bytes(data[-size:], random)
        case "cut":
            data = data[: random.randrange(len(data))]
    path = folder / file
    path.unlink(missing_ok=True)  # which may still be mapped
    path.write_bytes(data)
    refused_or_read(path, KINDS[name].options)


@pytest.mark.parametrize("name", KINDS)
def test_truncated_and_flipped(folder: Path, name: str) -> None:
    """Cut anywhere it is refused; of a bit in its first pickle, or in its numbers, it may be."""
    file, data = released_bytes(name)
    path = folder / file
    for share in (0.5, 0.9999):
        path.unlink(missing_ok=True)
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(CheckpointError):
            plan_conversion([path], options=KINDS[name].options)
    for at in (150, len(data) // 2, len(data) - 30):
        path.unlink()
        path.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        refused_or_read(path, KINDS[name].options)


@given(seeds)
@budget(40)
def test_odd_values(folder: Path, random: Random) -> None:
    """Whole files that hold something else in places."""
    content: Any = random.choice([dit_tensors, energy_state])()
    for _ in range(random.choice([1, 1, 2])):
        place = content
        while isinstance(place, dict) and random.random() < 0.6:
            inner = [v for v in place.values() if isinstance(v, dict)]
            place = random.choice(inner) if inner else None
        target = place if isinstance(place, dict) and place else content
        key = random.choice([*target])
        odd = [*ODD, torch.ones(2), torch.ones(3, 2, 1), torch.full((1,), torch.nan)]
        match random.randrange(3):
            case 0:
                del target[key]
            case 1:
                target[key] = random.choice(odd)
            case 2:
                target[random.choice(["x", "blocks.7.mlp.fc1.weight", 3, None])] = target[key]
    given = content.get("args")
    if isinstance(given, argparse.Namespace) and random.random() < 0.5:
        setattr(given, random.choice([*vars(given)]), random.choice(ODD))
    path = folder / "odd.pt"
    path.unlink(missing_ok=True)
    with contextlib.suppress(UnicodeEncodeError):  # of what PyTorch itself cannot save
        write_torch(path, content, old=random.random() < 0.5)
        refused_or_read(path, HEADS)


@pytest.mark.parametrize("name", ["data.resolution", "network.depth", "network.width"])
def test_networks_beyond_memory(tmp_path: Path, name: str) -> None:
    """What a file or an option says is compared with its tensors before anything is made."""
    path = write_torch(tmp_path / "a.pt", dit_tensors())
    tracemalloc.start()
    with pytest.raises(TesseraError):
        plan_conversion([path], options=(*HEADS, f"{name}=16384", "network.width=48000"))
    assert tracemalloc.get_traced_memory()[1] < 100 * MIB
    tracemalloc.stop()


def test_tensors_that_are_announced_only(tmp_path: Path) -> None:
    """A view that repeats a number 10^12 times is as large as its storage allows."""
    tensors = dit_tensors()
    tensors["pos_embed"] = torch.zeros(1, 1, 1).expand(1, 1_000_000, 1_000_000)
    path = write_torch(tmp_path / "a.pt", tensors)
    tracemalloc.start()
    with pytest.raises(TesseraError):
        plan_conversion([path], options=HEADS)
    assert tracemalloc.get_traced_memory()[1] < 100 * MIB
    tracemalloc.stop()


def test_levels_and_blocks_that_are_announced_only(tmp_path: Path) -> None:
    """The numbers in the names of tensors, of which nothing is made."""
    tensors = {
        name: torch.zeros(4, 4, 1, 1)
        for name in (
            "encoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight",
            "encoder.down.0.block.0.conv1.weight", "encoder.down.0.block.99999999.conv1.weight",
            "encoder.down.99999999.block.0.conv1.weight", f"decoder.up.{'9' * 5000}.conv.weight",
        )
    }  # fmt: skip
    for wide in (4, 2**18):
        tensors["encoder.down.0.block.0.conv1.weight"] = torch.zeros(wide, 1, 1, 1)
        path = write_torch(tmp_path / f"{wide}.ckpt", {"model": tensors})
        with pytest.raises(CheckpointError):
            plan_conversion([path])

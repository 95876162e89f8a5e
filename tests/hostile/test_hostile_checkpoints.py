"""Damaged checkpoints of every kind: an error in words and nothing written, or they are read."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
import tracemalloc
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from golden_cases import load, weights
from hostile_files import ODD, budget, odd_bytes, seeds
from hypothesis import given
from released_files import SNAPSHOT, STATE, recorded_file
from released_states import RECORDED, arguments, parameters, write_torch

from tessera.convert.assemble import plan_conversion
from tessera.errors import TesseraError

MIB = 2**20
HEADS = ("network.heads=3",)
FLAGS = ("data.resolution=16", "network.head_channels=16", "network.attention_order=split")


def small_dit() -> dict[str, Any]:
    """A network whose files are quick to write."""
    found: dict[str, Any] = torch.load(RECORDED / "dit-released-oldformat.pt", weights_only=True)
    return found


def energy_state() -> dict[str, Any]:
    tensors = {f"dit.{k}": v for k, v in weights(load("energy", "energy_mean_pool")).items()}
    tensors["alpha"] = torch.tensor(0.01)
    args = arguments(energy_grad_multiplier=1.0, linear_then_mean=False, diffusion_timesteps=500)
    return {"model": tensors, "model_ema": parameters(tensors), "epoch": 1, "args": args}


@functools.cache
def files() -> dict[str, tuple[bytes, tuple[str, ...]]]:
    """A file of every kind, and the options it needs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def torch_file(content: Any, old: bool = False) -> bytes:
            return write_torch(folder / "x", content, old=old).read_bytes()

        return {
            "edm.pkl": (recorded_file(SNAPSHOT, folder).read_bytes(), ()),
            "edm.pt": (recorded_file(STATE, folder).read_bytes(), ()),
            "lego.pkl": (
                (RECORDED / "lego-pg-cond-network-snapshot-000128.pkl").read_bytes(), (),
            ),
            "dit-old.pt": ((RECORDED / "dit-released-oldformat.pt").read_bytes(), HEADS),
            "0001.pt": (torch_file({"ema": small_dit(), "args": arguments()}), HEADS),
            "energy.pth": (torch_file(energy_state()), ("network.heads=2",)),
            "pdm.pt": (torch_file(weights(load("pdm", "unet_p2_uncond_sigma"))), FLAGS),
        }  # fmt: skip


def refused_or_read(path: Path, options: tuple[str, ...]) -> None:
    """Nothing else than an error in words, and nothing written by it."""
    dest = path.parent / "made"
    shutil.rmtree(dest, ignore_errors=True)
    try:
        plan = plan_conversion([path], options=options)
    except TesseraError:
        assert not dest.exists()
    else:
        plan.write(dest)


@given(seeds)
@budget(60)
def test_changed_bytes(tmp_path_factory: pytest.TempPathFactory, random: Random) -> None:
    folder = tmp_path_factory.getbasetemp()
    name = random.choice([*files()])
    data, options = files()[name]
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
    path = folder / name
    path.unlink(missing_ok=True)  # which may still be mapped
    path.write_bytes(data)
    refused_or_read(path, options)


@given(seeds)
@budget(60)
def test_odd_values(tmp_path_factory: pytest.TempPathFactory, random: Random) -> None:
    """Whole files that hold something else in places."""
    folder = tmp_path_factory.getbasetemp()
    content: Any = random.choice([small_dit, energy_state])()
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
    if "args" in content and hasattr(content["args"], "seed") is False and random.random() < 0.5:
        name = random.choice([*vars(content["args"])])
        setattr(content["args"], name, random.choice(ODD))
    path = folder / "odd.pt"
    path.unlink(missing_ok=True)
    with contextlib.suppress(UnicodeEncodeError):  # of what PyTorch itself cannot save
        write_torch(path, content, old=random.random() < 0.5)
        refused_or_read(path, HEADS)


@pytest.mark.parametrize("name", ["data.resolution", "network.depth", "network.width"])
def test_networks_beyond_memory(tmp_path: Path, name: str) -> None:
    """What a file or an option says is compared with its tensors before anything is made."""
    path = write_torch(tmp_path / "a.pt", small_dit())
    tracemalloc.start()
    with pytest.raises(TesseraError):
        plan_conversion([path], options=(*HEADS, f"{name}=16384", "network.width=48000"))
    assert tracemalloc.get_traced_memory()[1] < 100 * MIB
    tracemalloc.stop()


def test_tensors_that_are_announced_only(tmp_path: Path) -> None:
    """A view that repeats a number 10^12 times is as large as its storage allows."""
    tensors = small_dit()
    tensors["pos_embed"] = torch.zeros(1, 1, 1).expand(1, 1_000_000, 1_000_000)
    path = write_torch(tmp_path / "a.pt", tensors)
    tracemalloc.start()
    with pytest.raises(TesseraError):
        plan_conversion([path], options=HEADS)
    assert tracemalloc.get_traced_memory()[1] < 100 * MIB
    tracemalloc.stop()

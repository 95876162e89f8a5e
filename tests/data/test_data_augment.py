"""The augmentation pipeline against the released code, and its invariants."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from golden_cases import RecordedDraws, case, load
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessera.data import augment
from tessera.data.augment import Augmentation
from tessera.errors import DataError
from tessera.randomness import AddressedDraws

TRANSFORMS = [
    "xflip", "yflip", "rotate_int", "translate_int", "scale", "rotate_frac", "aniso",
    "translate_frac", "brightness", "contrast", "lumaflip", "hue", "saturation",
]  # fmt: skip
RUNS = {run["run"]: run for run in case("edm", "augment")["config"]["runs"]}


def only(**options: float) -> Augmentation:
    """A pipeline of the given transforms alone."""
    return Augmentation(**(dict.fromkeys(TRANSFORMS, 0.0) | options))


def recorded_draws(golden: dict[str, Tensor], run: dict[str, Any]) -> RecordedDraws:
    numbers = {}
    for draw in run["draws_in_order"]:
        value = golden[f"in.{run['run']}.{draw}"]
        if draw in ("translate_int.u", "translate_frac.n"):  # recorded with the axis first
            value = value.reshape(2, -1).T
        numbers[f"augment.{draw}"] = value
    return RecordedDraws(numbers)


@pytest.mark.parametrize("fixed_margin", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_recorded_runs(name: str, fixed_margin: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    golden, run = load("edm", "augment"), RUNS[name]
    images = golden[run["images"]]
    if fixed_margin:  # what other devices than the CPU do
        monkeypatch.setattr(augment, "_margins", lambda G, w, h: (w - 1, w - 1, h - 1, h - 1))
    output, labels = only(**run["options"])(images, recorded_draws(golden, run))
    assert (output - golden[f"out.{name}.images"]).abs().max() <= 3e-5
    assert labels.shape == (len(images), run["label_dim"])
    assert (labels - golden[f"out.{name}.labels"]).abs().max() <= 1e-6


@pytest.mark.parametrize("name", [n for n in RUNS if f"out.{n}.G_inv" in load("edm", "augment")])
def test_recorded_geometry(name: str) -> None:
    golden, run = load("edm", "augment"), RUNS[name]
    images = golden[run["images"]]
    G = only(**run["options"]).geometry(images, recorded_draws(golden, run), [])
    assert torch.allclose(G, golden[f"out.{name}.G_inv"], rtol=1e-5, atol=1e-5)
    x0, x1, y0, y1 = augment._margins(G, images.shape[3], images.shape[2])
    assert [x0, y0, x1, y1] == golden[f"out.{name}.margin"].flatten().tolist()


@pytest.mark.parametrize("name", [n for n in RUNS if f"out.{n}.M" in load("edm", "augment")])
def test_recorded_colours(name: str) -> None:
    golden, run = load("edm", "augment"), RUNS[name]
    images = golden[run["images"]]
    M = only(**run["options"]).colour(images, recorded_draws(golden, run), [])
    assert torch.allclose(M, golden[f"out.{name}.M"], rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(height=st.integers(4, 24), width=st.integers(4, 24), channels=st.integers(1, 4))
def test_nothing_happens_at_probability_zero(height: int, width: int, channels: int) -> None:
    images = torch.rand(3, channels, height, width) * 2 - 1
    moves = {"xflip": 1, "yflip": 1, "translate_int": 1}
    draws = AddressedDraws(0, torch.arange(3))
    output, labels = only(p=0, **moves)(images, draws)
    assert torch.equal(output, images)
    assert (labels == 0).all()
    assert labels.shape == (3, 4)


@pytest.mark.parametrize("size", [8, 17, 32])
def test_resampling_keeps_smooth_images(size: int) -> None:
    """The identity map returns a flat image as it was, and a slow wave almost."""
    identity = torch.eye(3).expand(2, 3, 3)
    flat = torch.full((2, 1, size, size), 0.7)
    assert torch.allclose(augment.resample(flat, identity), flat, atol=1e-4)
    wave = torch.cos(torch.arange(size) * (torch.pi / (size - 1))).expand(2, 1, size, size)
    assert (augment.resample(wave, identity) - wave).abs().max() < 0.02


def test_shift_by_whole_pixels_is_a_shift() -> None:
    images = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    images = torch.nn.functional.avg_pool2d(images, 5, 1, 2)
    G = torch.eye(3)[None].clone()
    G[0, 0, 2] = 3
    still = augment.resample(images, torch.eye(3)[None])
    moved = augment.resample(images, G)
    assert torch.allclose(moved[..., 2:10], still[..., 5:13], atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(6)))
def test_images_do_not_influence_each_other(order: list[int]) -> None:
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    numbers, permutation = torch.arange(6), torch.tensor(order)
    pipeline = Augmentation(p=0.8, rotate_int=1, translate_int=1, hue=1, saturation=1)
    output, labels = pipeline(images, AddressedDraws(5, numbers))
    other, other_labels = pipeline(images[permutation], AddressedDraws(5, numbers[permutation]))
    assert torch.equal(other_labels, labels[permutation])
    assert torch.allclose(other, output[permutation], atol=1e-6)
    alone, _ = pipeline(images[2:3], AddressedDraws(5, numbers[2:3]))
    assert torch.allclose(alone, output[2:3], atol=3e-5)


def test_defaults_and_fields_are_the_recipe_section() -> None:
    from tessera.recipes.schema import AugmentConfig

    section = AugmentConfig().model_dump()
    assert Augmentation(**section) == Augmentation()
    assert set(section) == {field.name for field in fields(Augmentation)}
    _, labels = Augmentation()(torch.zeros(2, 3, 8, 8), AddressedDraws(0, torch.arange(2)))
    assert labels.shape == (2, AugmentConfig().label_dim)


def test_colours_of_other_channels_are_refused() -> None:
    with pytest.raises(DataError, match="1 or 3 channels, not 2"):
        only(p=1, hue=1)(torch.zeros(2, 2, 8, 8), AddressedDraws(0, torch.arange(2)))

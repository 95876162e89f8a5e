"""Addressed randomness: known answers, statistics, independence of batches."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from tessera import randomness
from tessera.randomness import (
    PURPOSES,
    AddressedDraws,
    derive_seed,
    mix64,
    numpy_generator,
)

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def draws(images: Tensor | range = range(512), seed: int = 0) -> AddressedDraws:
    numbers = images if isinstance(images, Tensor) else torch.tensor(list(images))
    return AddressedDraws(seed, numbers)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1])


def test_splitmix64_known_answers() -> None:
    # The first outputs of the reference generator seeded with 0.
    bits = mix64(torch.arange(1, 4, dtype=torch.int64) * GOLDEN)
    assert [value % (1 << 64) for value in bits.tolist()] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_seeds_of_purposes_differ() -> None:
    seeds = {derive_seed(seed, "a", index) for seed in range(20) for index in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert derive_seed(1, "data") == derive_seed(1, "data")
    assert derive_seed(1, "data") != derive_seed(1, "date")


def test_numpy_generator_is_addressed() -> None:
    first = numpy_generator(3, "order", 7).integers(1 << 30, size=8)
    assert (first == numpy_generator(3, "order", 7).integers(1 << 30, size=8)).all()
    assert (first != numpy_generator(3, "order", 8).integers(1 << 30, size=8)).any()


@pytest.mark.parametrize("start", [0, 199_999_488, 1 << 40])
def test_normal_is_standard_normal(start: int) -> None:
    sample = draws(range(start, start + 256)).normal("noise", 3, 16, 16)
    assert sample.shape == (256, 3, 16, 16)
    assert sample.dtype == torch.float32
    assert stats.kstest(sample.flatten().numpy(), "norm").pvalue > 1e-3
    # The tails that a wrong radius would lose: beyond 4 σ lie 6.3e-5 of all.
    assert 2 < (sample.abs() > 4).sum() < 30
    assert sample.isfinite().all()


def test_normal_of_odd_count_and_single_numbers() -> None:
    assert draws().normal("σ").shape == (512,)
    assert stats.kstest(draws(range(20_000)).normal("σ").numpy(), "norm").pvalue > 1e-3
    assert draws().normal("noise", 1, 3, 5).shape == (512, 1, 3, 5)


def test_uniform_is_uniform() -> None:
    sample = draws().uniform("u", 256)
    assert sample.dtype == torch.float32
    assert 0 <= float(sample.min()) < 1e-4
    assert 1 - 1e-4 < float(sample.max()) < 1
    assert stats.kstest(sample.flatten().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("high", [1, 2, 4, 10, 1000])
def test_integers_are_uniform(high: int) -> None:
    sample = draws().integers("class", high, 100)
    counts = torch.bincount(sample.flatten(), minlength=high)
    assert sample.dtype == torch.int64
    assert len(counts) == high
    assert high == 1 or stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_integers_reach_large_bounds() -> None:
    high = (1 << 31) - 1
    sample = draws(range(10_000)).integers("index", high)
    assert (sample >= 0).all()
    assert sample.max() < high
    assert stats.kstest(sample.numpy() / high, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_neighbours_are_uncorrelated(kind: str) -> None:
    source = draws(range(1024))
    sample = getattr(source, kind)("noise", 64)
    # 65,536 pairs: the standard deviation of a chance correlation is 0.004.
    for lag in (1, 2, 32):
        assert abs(correlation(sample[lag:], sample[:-lag])) < 0.02, f"images {lag} apart"
        assert abs(correlation(sample[:, lag:], sample[:, :-lag])) < 0.02, f"elements {lag} apart"
    for other in ("noise2", "sigma", "label_dropout"):
        assert abs(correlation(sample, getattr(source, kind)(other, 64))) < 0.02
    for seed in (1, 2, 1 << 32):
        other_seed = getattr(draws(range(1024), seed), kind)("noise", 64)
        assert abs(correlation(sample, other_seed)) < 0.02


def test_no_draw_repeats_between_images_and_elements() -> None:
    # image i, element j must not meet image i + 1, element j - 1, or the like.
    bits = draws(range(500))._bits("noise", 500)
    assert len(bits.unique()) == 500 * 500


def test_sums_over_images_are_normal() -> None:
    # Means of many draws would show faint dependence that single pairs hide.
    sample = draws(range(2048)).normal("noise", 128)
    for axis, count in ((0, 2048), (1, 128)):
        means = sample.mean(dim=axis).numpy() * count**0.5
        assert stats.kstest(means, "norm").pvalue > 1e-3


@settings(deadline=None)
@given(
    order=st.permutations(range(8)),
    cuts=st.lists(st.integers(1, 7), unique=True).map(sorted),
    start=st.integers(0, 1 << 45),
    seed=st.integers(0, 1 << 62),
)
def test_draws_do_not_depend_on_the_batch(
    order: list[int], cuts: list[int], start: int, seed: int
) -> None:
    images = torch.arange(start, start + 8)
    shuffled = images[torch.tensor(order)]
    whole = draws(images, seed)
    bounds = [0, *cuts, 8]
    parts = [draws(shuffled[low:high], seed) for low, high in pairwise(bounds)]
    for call in (
        lambda d: d.normal("a", 3, 5),
        lambda d: d.uniform("b", 4),
        lambda d: d.integers("c", 7, 2),
    ):
        joined = torch.cat([call(part) for part in parts])
        assert torch.equal(joined, call(whole)[torch.tensor(order)])


def test_first_elements_do_not_depend_on_the_count() -> None:
    source = draws()
    assert torch.equal(source.uniform("u", 4), source.uniform("u", 9)[:, :4])


def test_a_step_has_one_number_on_all_processes() -> None:
    whole = AddressedDraws(3, torch.arange(8), images_seen=16)
    part = AddressedDraws(3, torch.arange(4, 8), images_seen=16)
    assert whole.step("mask") == part.step("mask") != whole.step("order")
    assert whole.step("mask") != AddressedDraws(3, torch.arange(8), images_seen=24).step("mask")
    numbers = [AddressedDraws(0, torch.arange(1), n).step("mask") for n in range(4000)]
    assert 0 <= min(numbers) < max(numbers) < 1
    assert sum(numbers) / 4000 == pytest.approx(0.5, abs=0.02)


def test_every_purpose_is_listed() -> None:
    """The draws of the library, found in its source, are those of the list."""
    found = set()
    for path in Path(randomness.__file__).parent.rglob("*.py"):
        text = path.read_text()
        found |= set(
            re.findall(r"draws\.(?:normal|uniform|integers|step)\(\s*f?\"([^\"]+)\"", text)
        )
    heads = {name.split(".")[0] if name not in PURPOSES else name for name in found}
    assert heads == PURPOSES.keys()

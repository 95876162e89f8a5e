"""Seeds: how they are written, and that an image's numbers are its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tessera.errors import TesseraError
from tessera.sampling.seeds import SeedNoise, parse_seeds


def test_lists_and_ranges() -> None:
    assert parse_seeds("0-3,100") == [0, 1, 2, 3, 100]
    assert parse_seeds(" 7 , 2 - 4 ") == [7, 2, 3, 4]
    assert parse_seeds("5-5") == [5]


@given(st.lists(st.integers(0, 10**6), min_size=1, unique=True))
def test_every_list_is_read_back(seeds: list[int]) -> None:
    assert parse_seeds(",".join(map(str, seeds))) == seeds


@given(st.integers(0, 10**6), st.integers(0, 200))
def test_every_range_is_inclusive(first: int, length: int) -> None:
    assert parse_seeds(f"{first}-{first + length}") == list(range(first, first + length + 1))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "''"),
        ("1,,2", "''"),
        ("1,a-3", "'a-3'"),
        ("0-3,-5", "'-5'"),
        ("1.5", "'1.5'"),
        ("9-3", "'9-3' runs backwards"),
        ("0-4,3", "seed 3 occurs twice"),
        ("0-99999999999", "'0-99999999999'"),
    ],
)
def test_errors_name_the_part(text: str, part: str) -> None:
    with pytest.raises(TesseraError, match=r"seeds .*" + part):
        parse_seeds(text)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=6))
def test_a_seed_does_not_depend_on_its_neighbours(seeds: list[int]) -> None:
    together = SeedNoise(seeds)
    expected = [(SeedNoise([seed])) for seed in seeds]
    for kind in ("latents", "classes", "step"):
        if kind == "classes":
            all_rows, rows = together.integers(7), [one.integers(7) for one in expected]
        else:
            dtype = torch.float32 if kind == "latents" else torch.float64
            all_rows = together.normal((2, 5, 5), dtype)
            rows = [one.normal((2, 5, 5), dtype) for one in expected]
            assert all_rows.dtype == dtype
        assert torch.equal(all_rows, torch.cat(rows))


def test_seeds_wrap_at_32_bits() -> None:
    assert torch.equal(SeedNoise([3]).normal((4,)), SeedNoise([3 + 2**32]).normal((4,)))

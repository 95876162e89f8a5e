"""Data order: the released sampler's sequence, epochs, and purity."""

from __future__ import annotations

import golden_cases
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.data.order import EpochOrder, WindowedOrder

SAMPLERS = golden_cases.case("edm", "dataset")["config"]["infinite_sampler"]


@pytest.mark.parametrize("case", SAMPLERS, ids=str)
def test_windowed_order_repeats_the_released_sampler(case):
    order = WindowedOrder(
        case["n"], case["seed"], shuffle=case["shuffle"], window=case["window_size"]
    )
    world = case["num_replicas"]
    numbers = np.arange(len(case["first"])) * world + case["rank"]
    assert order.indices(numbers).tolist() == case["first"]


def released_sequence(n: int, seed: int, count: int) -> list[int]:
    """The sampler's loop as its description says, one number at a time."""
    generator = np.random.RandomState(seed)
    order = np.arange(n)
    generator.shuffle(order)
    window = int(np.rint(0.5 * n))
    given = []
    for k in range(count):
        i = k % n
        given.append(int(order[i]))
        if window >= 2:
            j = (i - generator.randint(window)) % n
            order[i], order[j] = order[j], order[i]
    return given


@pytest.mark.parametrize("n", [1, 2, 3, 5, 100, 5000])
def test_windowed_order_over_many_blocks(n):
    expected = released_sequence(n, 3, 3 * n + 13000)
    numbers = np.arange(len(expected))
    assert WindowedOrder(n, 3).indices(numbers).tolist() == expected


def test_windowed_order_is_right_after_jumps():
    expected = np.array(released_sequence(50, 1, 60000))
    order = WindowedOrder(50, 1)
    for start in (0, 59000, 3, 30000, 58000, 100, 4090):
        numbers = np.arange(start, start + 20)
        np.testing.assert_array_equal(order.indices(numbers), expected[numbers])
    numbers = np.array([59999, 0, 17, 59999, 4096])
    np.testing.assert_array_equal(order.indices(numbers), expected[numbers])


@given(n=st.integers(1, 50), seed=st.integers(0, 2**40), epoch=st.integers(0, 10))
def test_an_epoch_has_every_image_once(n, seed, epoch):
    indices = EpochOrder(n, seed).indices(np.arange(epoch * n, (epoch + 1) * n))
    assert sorted(indices.tolist()) == list(range(n))


@given(numbers=st.lists(st.integers(0, 500), min_size=1, max_size=60))
def test_epoch_order_is_a_function_of_the_number(numbers):
    whole = EpochOrder(13, 7).indices(np.arange(501))
    np.testing.assert_array_equal(EpochOrder(13, 7).indices(np.array(numbers)), whole[numbers])


def test_epochs_and_seeds_differ():
    first, second = EpochOrder(100, 0).indices(np.arange(200)).reshape(2, 100)
    assert (first != second).any()
    assert (EpochOrder(100, 1).indices(np.arange(100)) != first).any()

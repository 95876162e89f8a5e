"""Values and files that are not what they should be, by a seed."""

from __future__ import annotations

import math
from random import Random
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

ODD: list[Any] = [
    None, True, 0, -1, 2**31, 2**63, 10**30, 10**400, 1.5, math.nan, math.inf, "", "x", "\ud800",
    "a" * 1000, [], {}, [[]], [1], [None], {"a": 1}, ["a", "b"], [[["a"]]], "[1]", "1e400",
]  # fmt: skip


def budget(examples: int) -> settings:
    """The same examples at each run, a fixed number of them."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


seeds = st.integers(0, 2**32 - 1).map(Random)


def odd_json(value: Any, random: Random, share: float = 0.05) -> Any:
    """`value` with a share of its parts replaced, left out or renamed."""
    if random.random() < share:
        return random.choice(ODD)
    if isinstance(value, dict):
        kept = [pair for pair in value.items() if random.random() > share / 4]
        return {
            (k if random.random() > share / 4 else f"{k}_"): odd_json(v, random, share)
            for k, v in kept
        }
    if isinstance(value, list):
        return [odd_json(v, random, share) for v in value if random.random() > share / 4]
    return value


def odd_bytes(data: bytes, random: Random) -> bytes:
    """`data` with a few bytes changed, removed, inserted or repeated."""
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 3, 8])):
        if not changed:
            break
        at, length = random.randrange(len(changed)), random.choice([1, 4, 30])
        match random.randrange(5):
            case 0 | 1:
                changed[at] = random.choice([0, 1, 127, 128, 255, random.randrange(256)])
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at : at + 8] = b"\xff" * 8
            case 4:
                other = random.randrange(len(changed))
                changed[at:at] = changed[other : other + length]
    return bytes(changed)

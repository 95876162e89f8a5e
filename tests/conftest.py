"""Settings of all tests; read before anything imports PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache

# Tests run side by side, one process per core: more threads than that only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# No test asserts on time, and a busy machine is no failure.
settings.register_profile("tessera", deadline=None)
settings.load_profile("tessera")


@pytest.fixture(autouse=True, scope="session")
def float32() -> Iterator[None]:
    """`auto` is fp32 in tests, also where bfloat16 is fast: their numbers are those of float32."""
    import torch

    from tessera import precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "fast_dtype", lambda device: torch.float32)
        yield


@pytest.fixture(autouse=True, scope="session")
def commands_made_once() -> Iterator[None]:
    """Typer makes all commands anew for each one that a test calls."""
    from typer import testing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing, "_get_command", cache(testing._get_command))
        yield

"""Settings of all tests; read before anything imports PyTorch."""

from __future__ import annotations

import os

# Tests run side by side, one process per core: more threads than that only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# No test asserts on time, and a busy machine is no failure.
settings.register_profile("tessera", deadline=None)
settings.load_profile("tessera")

"""The reference numbers recorded from the released code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def load(system: str, name: str) -> dict[str, Tensor]:
    """The tensors of a case."""
    return safetensors.torch.load_file(GOLDEN / system / f"{name}.safetensors")


def case(system: str, name: str) -> dict[str, Any]:
    """The description of a case."""
    cases = json.loads((GOLDEN / system / "cases.json").read_text())["cases"]
    return next(entry for entry in cases if entry["name"] == name)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max|actual - expected| / max|expected|."""
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max())

"""The reference numbers recorded from the released code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.convert.edm import network_section
from tessera.networks.adm_unet import AdmUNet
from tessera.networks.song_unet import SongUNet

GOLDEN = Path(__file__).parent / "golden"


def load(system: str, name: str) -> dict[str, Tensor]:
    """The tensors of one file."""
    return safetensors.torch.load_file(GOLDEN / system / f"{name}.safetensors")


def case(system: str, name: str) -> dict[str, Any]:
    """The description of one case: configuration, inputs, outputs, tolerance."""
    document = json.loads((GOLDEN / system / "cases.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = next(c for c in document["cases"] if c["name"] == name)
    return found


def weights(tensors: Mapping[str, Tensor], prefix: str = "w.") -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max|actual - expected| / max|expected|."""
    assert actual.shape == expected.shape
    difference = (actual.detach() - expected).abs()
    return float(difference.max() / expected.abs().max())


def recorded_conditioning(tensors: Mapping[str, Tensor]) -> Conditioning:
    """The recorded one-hot class labels and augmentation labels, where there are any."""
    classes = tensors.get("in.class_labels")
    return Conditioning(
        labels=None if classes is None else classes.argmax(dim=1),
        augment=tensors.get("in.augment_labels"),
    )


def recorded_network(config: dict[str, Any], out_channels: int | None = None) -> nn.Module:
    """The network that a case describes, with fresh weights."""
    section = network_section(config["model_type"], config)
    channels = config["img_channels"]
    if config.get("precond", "").startswith("Patch"):
        channels -= 2
        section["coord_frequencies"] = 0
    dims = (channels, out_channels or channels, config["label_dim"], config["augment_dim"])
    if section.pop("kind") == "adm_unet":
        return AdmUNet(config["img_resolution"], *dims, **section)
    return SongUNet(config["img_resolution"], *dims, **section)


class RecordedDraws:
    """`Draws` that hands out recorded numbers, by purpose."""

    def __init__(self, numbers: Mapping[str, Tensor]) -> None:
        self.numbers = numbers

    def normal(self, purpose: str, *shape: int) -> Tensor:
        return self.numbers[purpose].reshape(-1, *shape).to(torch.float32)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        return self.numbers[purpose].reshape(-1, *shape).to(torch.float32)

    def integers(self, purpose: str, high: int, *shape: int) -> Tensor:
        return self.numbers[purpose].reshape(-1, *shape).to(torch.int64)


class RecordedSteps:
    """A sampler's `NoiseSource` that hands out the recorded noise of its steps."""

    def __init__(self, steps: Tensor | None) -> None:
        self.steps = iter(() if steps is None else steps)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        assert dtype == torch.float64
        return next(self.steps)

    def integers(self, high: int) -> Tensor:
        raise AssertionError("a sampler draws no classes")

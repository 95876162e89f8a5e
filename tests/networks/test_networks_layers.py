"""The shared layers against the released code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import case, load, relative_error, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tessera.conditioning import one_hot
from tessera.networks.layers import (
    Conv,
    Dropout,
    FourierEmbedding,
    GroupNorm,
    PositionalEmbedding,
    Resample,
    UNetBlock,
)

MODULES: dict[str, dict[str, Any]] = case("edm", "modules")["config"]


def build(config: dict[str, Any]) -> nn.Module:
    options = dict(config)
    kind = options.pop("cls")
    if kind == "Conv2d":
        taps, up = options["resample_filter"], options["mode"] == "up"
        if options["kernel"] == 0:
            return Resample(taps, up)
        return Conv(
            options["in_channels"],
            options["out_channels"],
            options["kernel"],
            up=up,
            down=not up,
            taps=taps,
            fused=options["fused_resample"],
        )
    if kind == "UNetBlock":
        heads = options.pop("num_heads", 1) if options.pop("attention", False) else 0
        options.pop("num_heads", None)
        taps = options.pop("resample_filter", (1, 1))
        adaptive = options.pop("adaptive_scale")
        return UNetBlock(
            options.pop("in_channels"),
            options.pop("out_channels"),
            options.pop("emb_channels"),
            heads=heads,
            taps=taps,
            adaptive=adaptive,
            **options,
        )
    if kind == "PositionalEmbedding":
        return PositionalEmbedding(options["num_channels"], options["endpoint"])
    if kind == "FourierEmbedding":
        return FourierEmbedding(options["num_channels"])
    if kind == "GroupNorm":
        return GroupNorm(options["num_channels"])
    weight = load("edm", "modules")["linear.w.weight"]
    return nn.Linear(weight.shape[1], weight.shape[0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", MODULES)
def test_recorded_module(name: str, memory_format: torch.memory_format) -> None:
    golden = weights(load("edm", "modules"), f"{name}.")
    module = build(MODULES[name]).eval()
    module.load_state_dict(weights(golden), strict=True)
    inputs = [golden[f"in.{index}"] for index in range(2) if f"in.{index}" in golden]
    if inputs[0].ndim == 4:
        inputs[0] = inputs[0].to(memory_format=memory_format)
        module = module.to(memory_format=memory_format)
    with torch.no_grad():
        output = module(*inputs)
    if MODULES[name]["cls"] in ("PositionalEmbedding", "FourierEmbedding"):
        assert (output - golden["out"]).abs().max() <= 1e-4
    else:
        assert relative_error(output, golden["out"]) <= 1e-5
    if output.ndim == 4:
        assert output.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("kind", ["song", "adm"])
def test_block_keeps_bfloat16_and_channels_last(kind: str) -> None:
    """The residual stream stays in the autocast type; norms are computed in float32."""
    block = UNetBlock(32, 64, 16, heads=2, adaptive=kind == "adm", skip_scale=0.5)
    block = block.to(memory_format=torch.channels_last).eval()
    x = torch.randn(2, 32, 8, 8).to(memory_format=torch.channels_last)
    emb = torch.randn(2, 16)
    with torch.no_grad():
        exact = block(x, emb)
        with torch.autocast("cpu", torch.bfloat16):
            y = block(x.bfloat16(), emb)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y.float(), exact) < 0.02


@pytest.mark.parametrize("size", [8, 32])
def test_group_norm_is_float32_inside(size: int) -> None:
    """Statistics of bfloat16 inputs are those of float32; only the result is rounded."""
    torch.manual_seed(0)
    norm = GroupNorm(16).requires_grad_(False)
    x = (torch.randn(2, 16, size, size) + 3).bfloat16()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        with torch.autocast("cpu", torch.bfloat16):
            y = norm(x.to(memory_format=memory_format))
        expected = norm(x.float())
        assert y.dtype == torch.bfloat16
        assert y.is_contiguous(memory_format=memory_format)
        assert (y.float() - expected).abs().max() <= expected.abs().max() * 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dropout(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Zeros with the probability, the others scaled; the gradient is masked alike; seeded."""
    layer = Dropout(0.13)
    x = torch.ones(5, 3, 64, 63, dtype=dtype).to(memory_format=memory_format).requires_grad_()
    torch.manual_seed(1)
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    assert torch.equal(x.grad, y)
    zeros = y == 0
    assert abs(zeros.float().mean() - 0.13) < 5 * (0.13 * 0.87 / y.numel()) ** 0.5
    rounding = 2**-15 if dtype == torch.float32 else 2**-8
    assert (y[~zeros].float() * 0.87 - 1).abs().max() < rounding
    # Neither neighbours nor the four parts of a draw depend on one another.
    flat = zeros.float().permute(0, 2, 3, 1).flatten() - 0.13
    for lag in range(1, 9):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 * 0.13 * 0.87 / y.numel() ** 0.5
    torch.manual_seed(1)
    assert torch.equal(layer(x), y)
    assert not torch.equal(layer(x), y)
    assert layer.eval()(x) is x
    assert Dropout(0.0)(x).equal(x)


@settings(deadline=None, max_examples=25)
@given(
    classes=st.integers(1, 7),
    labels=st.lists(st.integers(-1, 6), min_size=1, max_size=8),
)
def test_one_hot(classes: int, labels: list[int]) -> None:
    known = torch.tensor(labels).clamp(max=classes - 1)
    rows = one_hot(known, classes, len(labels), torch.device("cpu"))
    assert rows.shape == (len(labels), classes)
    assert torch.equal(rows.sum(dim=1), (known >= 0).float())
    assert torch.equal(rows.argmax(dim=1)[known >= 0], known[known >= 0])
    assert not one_hot(None, classes, 3, torch.device("cpu")).any()

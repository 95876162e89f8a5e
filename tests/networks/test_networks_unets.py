"""Sizes, initial weights and invariants of the U-Nets and of preconditioning."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tessera.conditioning import Conditioning
from tessera.diffusion.preconditioning import Edm, Preconditioned
from tessera.errors import TesseraError
from tessera.networks.adm_unet import AdmUNet
from tessera.networks.layers import UNetBlock
from tessera.networks.song_unet import SongUNet

NCSNPP: dict[str, Any] = {
    "embedding": "fourier",
    "encoder": "residual",
    "channel_mult_noise": 2,
    "resample_filter": (1, 3, 3, 1),
}
CIFAR: dict[str, Any] = {"channel_mult": (2, 2, 2)}
SMALL: dict[str, Any] = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1}


@pytest.mark.parametrize(
    ("network", "arguments", "options", "parameters", "keys"),
    [
        (SongUNet, (32, 3, 3, 10, 9), CIFAR, 55_735_299, 427),
        (SongUNet, (32, 3, 3, 0, 9), CIFAR, 55_733_891, 425),
        (SongUNet, (32, 3, 3, 10, 9), CIFAR | NCSNPP, 56_400_643, 434),
        (SongUNet, (32, 3, 3, 0, 9), CIFAR | NCSNPP, 56_397_827, 432),
        (SongUNet, (64, 3, 3, 0, 9), {}, 61_805_571, 553),
        (SongUNet, (64, 3, 3, 0, 9), NCSNPP, 62_761_091, 563),
        (AdmUNet, (64, 3, 3, 1000), {}, 295_899_267, 553),
    ],
)
def test_published_sizes(
    network: type[nn.Module],
    arguments: tuple[int, ...],
    options: dict[str, Any],
    parameters: int,
    keys: int,
) -> None:
    with torch.device("meta"):
        net = network(*arguments, **options)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == keys


def bound(fan_in: int, fan_out: int) -> float:
    return math.sqrt(6 / (fan_in + fan_out))


def test_initial_weights_of_song_unet() -> None:
    torch.manual_seed(0)
    net = SongUNet(16, 3, 3, 10, 9, **SMALL, attn_resolutions=(16,), encoder="skip")
    state = dict(net.named_parameters())
    expected = {
        "enc.16x16_conv": bound(27, 144),
        "enc.16x16_block0.conv0": bound(144, 144),
        "enc.16x16_block0.conv1": 1e-5 * bound(144, 144),
        "enc.16x16_block0.qkv": math.sqrt(0.2) * bound(16, 48),
        "enc.16x16_block0.proj": 1e-5 * bound(16, 16),
        "enc.8x8_aux_skip": bound(3, 16),
        "dec.16x16_aux_conv": 1e-5 * bound(144, 27),
        "map_label": bound(10, 16),
        "map_layer1": bound(64, 64),
    }
    for name, limit in expected.items():
        weight = state[f"{name}.weight"]
        assert weight.abs().max() <= limit
        assert weight.abs().max() > 0.8 * limit
        assert weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.2)
    for name, parameter in state.items():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name


def test_initial_weights_of_adm_unet() -> None:
    torch.manual_seed(0)
    net = AdmUNet(
        16, 3, 3, 10, 9, model_channels=64, channel_mult=(1, 1), num_blocks=1, attn_resolutions=(8,)
    )
    for name, parameter in net.named_parameters():
        layer = name.rsplit(".", 1)[0]
        if layer.endswith(("conv1", "proj", "map_augment", "out_conv")):
            assert not parameter.any(), name
        elif layer == "map_label":
            assert parameter.std().item() == pytest.approx(1, rel=0.1)
        elif "norm" in layer:
            assert (parameter == float(name.endswith("weight"))).all(), name
        else:
            module = net.get_submodule(layer)
            fan_in = module.weight[0].numel()
            assert parameter.abs().max() <= fan_in**-0.5, name
            assert parameter.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.3), name


@pytest.mark.parametrize("network", [SongUNet, AdmUNet])
def test_untrained_denoiser_returns_the_scaled_input(network: type[nn.Module]) -> None:
    net = Preconditioned(network(16, 3, 3, **SMALL), Edm(), (3, 16, 16)).eval()
    z, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 10.0])
    with torch.no_grad():
        mean = net(z, sigma, Conditioning()).mean
    expected = z * (0.25 / (sigma**2 + 0.25))[:, None, None, None]
    assert torch.allclose(mean, expected, atol=1e-3)


@settings(deadline=None, max_examples=12)
@given(
    height=st.integers(1, 5).map(lambda n: 4 * n),
    width=st.integers(1, 5).map(lambda n: 4 * n),
    batch=st.integers(1, 3),
    kind=st.sampled_from(["standard", "residual", "skip", "adm"]),
)
def test_any_size_that_halves_evenly(height: int, width: int, batch: int, kind: str) -> None:
    common: dict[str, Any] = {
        "model_channels": 8,
        "channel_mult": (1, 1, 2),
        "num_blocks": 1,
        "attn_resolutions": (8,),
    }
    net: nn.Module
    if kind == "adm":
        net = AdmUNet(16, 3, 6, 4, **common)
    else:
        options = {"encoder": kind, "decoder": "skip", "resample_filter": (1, 3, 3, 1)}
        net = SongUNet(16, 3, 6, 4, **common, **options)
    x, noise = torch.randn(batch, 3, height, width), torch.zeros(batch)
    with torch.no_grad():
        assert net(x, noise, Conditioning()).shape == (batch, 6, height, width)


@pytest.mark.parametrize("network", [SongUNet, AdmUNet])
def test_images_of_a_batch_are_independent(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = network(16, 3, 3, 4, 2, **SMALL).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    order = torch.tensor([2, 0, 1])
    x, noise = torch.randn(3, 3, 16, 16), torch.randn(3)
    cond = Conditioning(torch.tensor([1, -1, 3]), torch.randn(3, 2))
    with torch.no_grad():
        y = net(x, noise, cond)
        assert torch.allclose(net(x[order], noise[order], cond[order]), y[order], atol=1e-5)
        assert not torch.allclose(net(x, noise, replace(cond, labels=None)), y, atol=1e-3)


@pytest.mark.parametrize("network", [SongUNet, AdmUNet])
def test_blocks_hold_most_of_the_weights(network: type[nn.Module]) -> None:
    net = network(16, 3, 3, **SMALL)
    blocks = list(net.blocks())
    assert all(isinstance(block, UNetBlock) for block in blocks)
    assert len(blocks) == sum(isinstance(m, UNetBlock) for m in net.modules())
    inside = sum(p.numel() for block in blocks for p in block.parameters())
    assert inside > 0.8 * sum(p.numel() for p in net.parameters())


def test_preconditioning_is_float32_under_autocast() -> None:
    torch.manual_seed(0)
    net = Preconditioned(SongUNet(16, 3, 3, **SMALL), Edm(), (3, 16, 16)).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    dtypes = []
    net.network.register_forward_hook(lambda _m, inputs, out: dtypes.extend([inputs, out.dtype]))
    z = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    sigma = torch.tensor([1e-3, 1e-3])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mean = net(z, sigma, Conditioning()).mean
    (scaled, noise, _), raw = dtypes
    assert scaled.dtype == noise.dtype == mean.dtype == torch.float32
    assert raw == torch.bfloat16
    assert torch.allclose(mean, z.float(), atol=5e-3)  # bfloat16 would be off by 1e-2


@pytest.mark.parametrize(("width", "named"), [(48, "144"), (2, "2")])
def test_widths_that_cannot_be_normalised_are_named_when_the_network_is_made(
    width: int, named: str
) -> None:
    with pytest.raises(TesseraError, match=rf"{named} channels.*network\.model_channels"):
        SongUNet(8, 3, 3, model_channels=width, channel_mult=(1, 2), num_blocks=1)

"""The U-Nets and their preconditioning against the released code."""

from __future__ import annotations

import pytest
import torch
from golden_cases import (
    case,
    load,
    recorded_conditioning,
    recorded_network,
    relative_error,
    weights,
)
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.diffusion.preconditioning import Edm, Iddpm, Preconditioned, Preconditioning, Ve, Vp

NETWORKS = ["net_ddpmpp", "net_ncsnpp", "net_adm", "net_songskip"]
PRECONDITIONINGS: dict[str, Preconditioning] = {
    "edm": Edm(),
    "vp": Vp(released_sigma_min=True),
    "ve": Ve(),
}


def restored(name: str, memory_format: torch.memory_format) -> tuple[nn.Module, dict[str, Tensor]]:
    golden = load("edm", name)
    network = recorded_network(case("edm", name)["config"])
    network.load_state_dict(weights(golden), strict=True)
    return network.eval().to(memory_format=memory_format), golden


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NETWORKS)
def test_raw_output_and_intermediates(name: str, memory_format: torch.memory_format) -> None:
    network, golden = restored(name, memory_format)
    seen: dict[str, Tensor] = {}
    for path, module in network.named_modules():
        if f"out.inter.{path}" in golden:
            module.register_forward_hook(
                lambda _module, _inputs, output, path=path: seen.update({path: output})
            )
    cond = recorded_conditioning(golden)
    x = golden["in.x"].to(memory_format=memory_format)
    with torch.no_grad():
        raw = network(x, golden["in.noise_labels"], cond)
    assert relative_error(raw, golden["out.raw"]) <= 2e-5
    recorded = weights(golden, "out.inter.")
    assert seen.keys() == recorded.keys()
    for path, expected in recorded.items():
        y = seen[path].to(torch.float64)
        first, last = y[0, 0, 0, 0], y[-1, -1, -1, -1]
        summary = torch.stack([y.mean(), y.std(), first, last])
        assert relative_error(summary, expected) <= 1e-4, path


@pytest.mark.parametrize("name", NETWORKS[:3])
def test_no_class_and_no_augmentation(name: str) -> None:
    network, golden = restored(name, torch.contiguous_format)
    for cond in (Conditioning(), Conditioning(labels=torch.full([2], -1))):
        with torch.no_grad():
            raw = network(golden["in.x"], golden["in.noise_labels"], cond)
        assert relative_error(raw, golden["out.raw.zero_label_no_aug"]) <= 2e-5


@pytest.mark.parametrize("kind", PRECONDITIONINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_denoised(name: str, kind: str) -> None:
    network, golden = restored(name, torch.contiguous_format)
    x, cond = golden["in.x"], recorded_conditioning(golden)
    classes = 0 if cond.labels is None else 3
    denoiser = Preconditioned(network, PRECONDITIONINGS[kind], tuple(x.shape[1:]), classes)
    with torch.no_grad():
        for index, sigma in enumerate(golden["in.sigmas"]):
            z = (x * sigma.clamp(min=0.5)).to(torch.float64)
            for level in (sigma.to(torch.float64), sigma.expand(len(x))):
                mean = denoiser(z, level, cond).mean
                assert mean.dtype == torch.float32
                assert relative_error(mean, golden[f"out.{kind}.{index}"]) <= 2e-5
        mean = denoiser(x, golden["in.sigma_vec"], Conditioning()).mean
    assert relative_error(mean, golden[f"out.{kind}.vec_nolabel"]) <= 2e-5


def test_iddpm() -> None:
    golden, config = load("edm", "iddpm"), case("edm", "iddpm")["config"]
    network = recorded_network(config, out_channels=2 * config["img_channels"])
    state = weights(golden)
    table = state.pop("u")
    network.load_state_dict({k.removeprefix("model."): v for k, v in state.items()}, strict=True)
    iddpm = Iddpm(config["C_1"], config["C_2"], config["M"])
    denoiser = Preconditioned(network.eval(), iddpm, (3, 16, 16), num_classes=3)

    own = iddpm.table(torch.device("cpu"))
    assert torch.allclose(own, table, rtol=2e-6, atol=0)
    limits = torch.tensor([denoiser.sigma_min, denoiser.sigma_max], dtype=torch.float64)
    assert torch.allclose(limits, golden["out.sigma_min_max"], rtol=2e-6, atol=0)
    assert torch.equal(iddpm.index(golden["in.round"]), golden["out.round_index"])
    rounded = denoiser.round_sigma(golden["in.round"])
    assert rounded.dtype == torch.float64
    assert torch.allclose(rounded, golden["out.round_sigma"], rtol=2e-6, atol=0)

    cond = recorded_conditioning(golden)
    with torch.no_grad():
        for index, sigma in enumerate(golden["in.sigmas"]):
            z = golden["in.x"] * sigma.clamp(min=0.5)
            mean = denoiser(z, sigma, cond).mean
            assert relative_error(mean, golden[f"out.iddpm.{index}"]) <= 2e-5

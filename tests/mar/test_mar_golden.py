"""MAR against the released code: head, losses, forward passes, gradients, generation."""

from __future__ import annotations

import pytest
import torch
from golden_cases import load, weights
from mar_case import document
from torch import Tensor, nn

from tessera.diffusion.discrete import Process
from tessera.diffusion.masked import ToldHead
from tessera.networks.diffusion_head import DiffusionHead

TABLES = {
    "alphas_cumprod": "alpha_bar",
    "betas": "betas",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance_clipped": "posterior_log_variance",
}


def assert_near(actual: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=rtol, atol=atol)


def assert_gradients(
    module: nn.Module, expected: dict[str, Tensor], rtol: float, atol: float
) -> None:
    """Every recorded gradient, and no parameter without one."""
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        gradient = found[name]
        assert gradient is not None, name
        assert_near(gradient, value, rtol, atol)


def recorded_head(name: str, prefix: str) -> tuple[DiffusionHead, dict[str, Tensor]]:
    golden, c = load("mar", name), document()["cases"][name]["config"]
    channels = c.get("in_channels", c.get("target_channels"))
    head = DiffusionHead(channels, c["z_channels"], c["width"], c["depth"])
    head.load_state_dict(weights(golden, prefix), strict=True)
    return head, golden


@pytest.mark.parametrize("spacing", ["", "100", "4"])
def test_the_process(spacing: str) -> None:
    golden = load("mar", "cosine_tables")
    prefix = f"cos1000{'_s' + spacing if spacing else ''}"
    process = Process.named("cosine", 1000, spacing)
    for name, attribute in TABLES.items():
        assert_near(getattr(process, attribute), golden[f"{prefix}.{name}"], 1e-12, 1e-14)


def test_the_head() -> None:
    head, golden = recorded_head("diffloss_net", "w.")
    told = head.times(golden["in.t"].float(), 1000) + head.cond_embed(golden["in.c"])
    output = head(golden["in.x"], told)
    assert_near(output, golden["out.net"], 1e-4, 2e-5)
    output.square().mean().backward()
    assert_gradients(head, weights(golden, "grad."), 1e-3, 2e-5)


def test_the_table_of_times_is_that_of_each_row() -> None:
    head, golden = recorded_head("diffloss_net", "w.")
    steps = golden["in.t"].float() % 4  # six rows of four steps
    assert_near(head.times(steps, 4), head.times(steps, 1000), 1e-6, 1e-6)


def test_the_guided_head() -> None:
    head, golden = recorded_head("diffloss_net", "w.")
    half = len(golden["in.x"]) // 2
    told = ToldHead(head, head.cond_embed(golden["in.c"]), (2, half), steps=1000, scale=2.5)
    told.shape, told.scale = (half,), torch.tensor(2.5)
    x, t = golden["in.x"][:half], golden["in.t"][:half].float()
    # The two halves were recorded at steps of their own; the guided noise needs both.
    times = head.times(golden["in.t"].float(), 1000)
    both = head(torch.cat([x, x]), times + head.cond_embed(golden["in.c"]))[:, :16]
    guided = both[half:] + 2.5 * (both[:half] - both[half:])
    assert_near(guided, golden["out.cfg"][:half, :16], 1e-4, 2e-5)
    assert t.shape == (half,)

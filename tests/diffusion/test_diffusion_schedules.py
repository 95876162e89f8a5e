"""Noise schedules against the released code and against themselves."""

from __future__ import annotations

import pytest
import torch
from golden_cases import load
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.diffusion import schedules
from tessera.diffusion.preconditioning import Vp


def test_vp_against_recorded_numbers() -> None:
    golden = load("edm", "noise_tables")
    sigma = schedules.vp_sigma(golden["in.t"])
    expected = golden["out.vp.sigma"]
    clear = expected > 0.05  # below, the recorded exp(x) - 1 cancels
    assert torch.allclose(sigma[clear], expected[clear], rtol=1e-5, atol=0)
    # The recorded float64 numbers cancel too, by about 1e-16 / σ².
    sigma, expected = schedules.vp_sigma(golden["in.t64"]), golden["out.vp.sigma64"]
    assert ((sigma / expected - 1).abs() <= 1e-12 + 4e-16 / expected**2).all()
    time, expected = schedules.vp_time(golden["in.sigma64"]), golden["out.vp.sigma_inv64"]
    allowed = 1e-12 + 4e-16 / golden["in.sigma64"] ** 2
    assert ((time / expected - 1).abs() <= allowed).all()


def test_vp_range() -> None:
    recorded = load("edm", "noise_tables")["out.vp.sigma_min_max"].tolist()
    released = Vp(released_sigma_min=True)
    assert released.sigma_min == recorded[0]
    assert released.sigma_max == pytest.approx(recorded[1], rel=1e-6)
    assert Vp().sigma_min == pytest.approx(0.0010005, rel=1e-4)


@settings(deadline=None, max_examples=50)
@given(st.floats(1e-5, 1.0))
def test_vp_inverse_and_derivative(t: float) -> None:
    time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    sigma = schedules.vp_sigma(time)
    assert schedules.vp_time(sigma.detach()).item() == pytest.approx(t, rel=1e-9)
    (slope,) = torch.autograd.grad(sigma, time)
    assert schedules.vp_sigma_derivative(time.detach()).item() == pytest.approx(slope.item(), 1e-7)


@settings(deadline=None, max_examples=50)
@given(st.floats(1e-6, 1e4))
def test_ve_inverse_and_derivative(t: float) -> None:
    time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    sigma = schedules.ve_sigma(time)
    assert schedules.ve_time(sigma.detach()).item() == pytest.approx(t)
    (slope,) = torch.autograd.grad(sigma, time)
    assert schedules.ve_sigma_derivative(time.detach()).item() == pytest.approx(slope.item())


@settings(deadline=None, max_examples=50)
@given(steps=st.integers(1, 60), rho=st.floats(1, 10))
def test_steps_fall_from_sigma_max_to_sigma_min(steps: int, rho: float) -> None:
    beta_d, beta_min = schedules.vp_betas(0.002, 80.0)
    for sigmas in (
        schedules.edm_steps(steps, 0.002, 80.0, rho),
        schedules.vp_steps(steps, beta_d, beta_min),
        schedules.ve_steps(steps, 0.002, 80.0),
        schedules.iddpm_steps(steps, 0.002, 81.0),
    ):
        assert sigmas.shape == (steps,)
        assert sigmas.dtype == torch.float64
        assert (sigmas[1:] < sigmas[:-1]).all()
        assert sigmas[0].item() == pytest.approx(80.0, rel=0.02)
        if steps > 1:
            assert 0.002 * (1 - 1e-9) <= sigmas[-1].item() < 0.0065


def test_iddpm_table_is_the_released_one() -> None:
    table = schedules.iddpm_table(dtype=torch.float32).tolist()
    assert len(table) == 1001
    assert table[0] == pytest.approx(20291.17, rel=1e-6)
    assert table[1] == pytest.approx(641.66, rel=1e-5)
    assert table[999] == pytest.approx(0.0064223371, rel=1e-6)
    assert table[1000] == 0
    exact = schedules.iddpm_table()
    assert exact.dtype == torch.float64
    assert torch.allclose(exact.to(torch.float32), torch.tensor(table), rtol=1e-4)

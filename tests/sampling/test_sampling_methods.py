"""Samplers on a Gaussian, whose solution is known, and what they ask of the denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser, Posterior
from tessera.errors import TesseraError
from tessera.sampling.ablation import ablation_sampler
from tessera.sampling.core import NoiseSource, SamplerState
from tessera.sampling.edm import edm_sampler
from tessera.sampling.seeds import SeedNoise

MEAN, STD = 0.3, 0.5
Sample = Callable[..., Iterator[SamplerState]]


class Gaussian(Denoiser):
    """The ideal denoiser of x ~ N(MEAN, STD²); counts its calls."""

    shape = (1, 2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        assert sigma.shape == (len(z),)
        assert sigma.device.type == "cpu"
        self.calls += 1
        variance = sigma.reshape(-1, 1, 1, 1) ** 2
        return Posterior((STD**2 * z + variance * MEAN) / (STD**2 + variance))


class NoNoise:
    """A noise source that must not be asked."""

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        raise AssertionError("noise drawn")

    def integers(self, high: int) -> Tensor:
        raise AssertionError("classes drawn")


def latents(count: int = 64) -> Tensor:
    return SeedNoise(range(count)).normal((1, 2, 2))


def exact(unit: Tensor, sigma_max: float) -> Tensor:
    """Where the ODE leads from σ_max: the deviation from the mean shrinks by STD / √(STD² + σ²)."""
    z = unit.double() * sigma_max
    return MEAN + (z - MEAN) * STD / math.sqrt(STD**2 + sigma_max**2)


def error(sample: Sample, steps: int, **options: Any) -> float:
    unit = latents()
    *_, last = sample(steps=steps, **options)(Gaussian(), unit, Conditioning(), NoNoise())
    return float((last.x - exact(unit, 80.0)).abs().max())


@pytest.mark.parametrize(
    ("sample", "options", "order"),
    [
        (edm_sampler, {}, 2),
        (edm_sampler, {"solver": "euler"}, 1),
        (ablation_sampler, {}, 2),
        (ablation_sampler, {"alpha": 0.5}, 3),  # one more than promised, on a Gaussian
        (ablation_sampler, {"schedule": "vp", "scaling": "vp", "sigma_max": 80.0}, 2),
    ],
)
def test_order_of_convergence(sample: Sample, options: dict[str, Any], order: int) -> None:
    # σ_min is small enough for the last, first-order step not to count.
    coarse, fine = (error(sample, n, sigma_min=1e-4, **options) for n in (40, 80))
    assert fine < 0.05
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def test_churn_keeps_the_distribution() -> None:
    unit = SeedNoise(range(3000)).normal((1, 2, 2))
    noise = SeedNoise(range(3000, 6000))
    *_, last = edm_sampler(steps=80, s_churn=20.0)(Gaussian(), unit, Conditioning(), noise)
    assert abs(last.x.mean() - MEAN) < 0.02
    assert abs(last.x.std() - STD) < 0.02


@pytest.mark.parametrize("sample", [edm_sampler, ablation_sampler])
def test_ends_the_wrong_way_round(sample: Sample) -> None:
    for ends in ({"sigma_min": 90.0}, {"sigma_min": 3.0, "sigma_max": 2.0}):
        with pytest.raises(TesseraError, match="no noise levels lie between"):
            sample(**ends).levels(Gaussian())
    # Cut by what the model knows, too.
    denoiser = Gaussian()
    denoiser.sigma_max = 1.0
    with pytest.raises(TesseraError, match=r"and the model knows .* to 1$"):
        sample(sigma_min=1.5, sigma_max=2.0).levels(denoiser)


@pytest.mark.parametrize("sample", [edm_sampler, ablation_sampler])
@pytest.mark.parametrize(("solver", "calls"), [("heun", 13), ("euler", 7)])
def test_calls(sample: Sample, solver: str, calls: int) -> None:
    denoiser = Gaussian()
    states = list(sample(steps=7, solver=solver)(denoiser, latents(2), Conditioning(), NoNoise()))
    assert denoiser.calls == calls
    assert [state.step for state in states] == [1, 2, 3, 4, 5, 6, 7]
    assert [state.sigma for state in states] == sorted((s.sigma for s in states), reverse=True)
    assert states[-1].sigma == 0
    assert all(state.x.dtype == torch.float64 for state in states)


@pytest.mark.parametrize("discretization", ["edm", "vp", "ve", "iddpm"])
def test_one_step_is_the_denoised_noise(discretization: str) -> None:
    denoiser, unit = Gaussian(), latents(3)
    *_, last = ablation_sampler(steps=1, discretization=discretization)(
        denoiser, unit, Conditioning(), NoNoise()
    )
    assert denoiser.calls == 1
    assert torch.isfinite(last.x).all()
    assert torch.allclose(last.x, last.denoised)
    assert last.steps == 1
    *_, edm = edm_sampler(steps=1)(denoiser, unit, Conditioning(), NoNoise())
    assert (edm.x - MEAN).abs().max() < 0.05


@pytest.mark.parametrize("sample", [edm_sampler, ablation_sampler])
def test_noise_is_drawn_at_every_step_with_churn(sample: Sample) -> None:
    # Also at those outside of the window, so that a seed's stream does not depend on it.
    drawn: list[torch.dtype] = []

    class Counting(SeedNoise):
        def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
            drawn.append(dtype)
            return super().normal(shape, dtype)

    options = {"steps": 5, "s_churn": 10.0, "s_min": 1.0, "s_max": 2.0}
    list(sample(**options)(Gaussian(), latents(2), Conditioning(), Counting(range(2))))
    assert drawn == [torch.float64] * 5


@pytest.mark.parametrize("options", [{}, {"schedule": "vp", "scaling": "vp"}])
def test_refinement_sees_unscaled_states(options: dict[str, Any]) -> None:
    seen: list[tuple[float, float]] = []

    def refine(
        denoiser: Denoiser, x: Tensor, sigma: float, cond: Conditioning, noise: NoiseSource
    ) -> Tensor:
        assert isinstance(denoiser, Gaussian)
        seen.append((sigma, float(x.std())))
        return x

    unit = latents(256)
    sample = ablation_sampler if options else edm_sampler
    plain = list(sample(steps=30, **options)(Gaussian(), unit, Conditioning(), NoNoise()))
    refined = list(
        sample(steps=30, refine=refine, **options)(Gaussian(), unit, Conditioning(), NoNoise())
    )
    assert [sigma for sigma, _ in seen] == [state.sigma for state in plain]
    for sigma, spread in seen:
        assert spread == pytest.approx(math.sqrt(STD**2 + sigma**2), rel=0.1)
    assert torch.allclose(plain[-1].x, refined[-1].x)
    shifted = list(
        sample(
            steps=3,
            refine=lambda _denoiser, x, sigma, *_: x + 1 if sigma == 0 else x,
            **options,
        )(Gaussian(), unit, Conditioning(), NoNoise())
    )
    plain = list(sample(steps=3, **options)(Gaussian(), unit, Conditioning(), NoNoise()))
    assert torch.allclose(shifted[-1].x, plain[-1].x + 1)

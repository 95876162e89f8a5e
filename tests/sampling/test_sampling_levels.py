"""Any noise levels meet any solver, and all of them converge to the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser, Posterior
from tessera.errors import RecipeError, TesseraError
from tessera.recipes.build import build_sampler
from tessera.recipes.loading import load_recipe
from tessera.recipes.schema import SAMPLERS

MEAN, STD = 0.3, 0.5


class Gaussian(Denoiser):
    """The ideal denoiser of x ~ N(MEAN, STD²)."""

    shape = (1, 2, 2)

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        variance = sigma.reshape(-1, 1, 1, 1) ** 2
        return Posterior((STD**2 * z + variance * MEAN) / (STD**2 + variance))


class Noise:
    """Numbers of one generator for a whole batch."""

    def __init__(self, count: int) -> None:
        self._count, self._generator = count, torch.Generator().manual_seed(0)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn((self._count, *shape), generator=self._generator, dtype=dtype)

    def integers(self, high: int) -> Tensor:
        raise AssertionError("classes drawn")


def section(kind: str, steps: int) -> dict[str, Any]:
    if kind == "process":
        return {"kind": kind, "steps": str(steps), "noise_schedule": "linear"}
    if kind == "list":
        return {"kind": kind, "sigmas": np.geomspace(80, 0.005, steps).tolist()}
    return {"kind": kind, "steps": steps}


LEVELS = ("edm", "vp", "ve", "iddpm", "process", "list")
SOLVERS: dict[str, dict[str, Any]] = {
    "edm": {},
    "euler": {"kind": "edm", "solver": "euler"},
    "ablation": {},
    "scaled": {"kind": "ablation", "schedule": "vp", "scaling": "vp"},
    "ddim": {"clip": "none"},
    "ddpm": {"clip": "none"},
}


def sampled(
    name: str, kind: str, steps: int, count: int = 32
) -> tuple[Tensor, Tensor, list[float]]:
    """(first noise, samples, noise levels)."""
    options = {"kind": name, **SOLVERS[name], "levels": section(kind, steps)}
    sampler = build_sampler(SAMPLERS[options["kind"]].model_validate(options))
    denoiser, noise = Gaussian(), Noise(count)
    levels = sampler.levels(denoiser)
    unit = noise.normal((1, 2, 2))
    states = list(sampler(denoiser, unit, Conditioning(), noise))
    assert [state.sigma for state in states] == pytest.approx([*levels[1:], 0.0], rel=1e-6)
    return unit, states[-1].x, levels


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "ddpm"])
def test_deterministic_solvers_end_where_the_equation_leads(name: str, kind: str) -> None:
    def error(steps: int) -> float:
        unit, x, levels = sampled(name, kind, steps)
        assert len(levels) == steps
        z = unit.double() * levels[0]
        exact = MEAN + (z - MEAN) * STD / math.sqrt(STD**2 + levels[0] ** 2)
        return float((x - exact).abs().max())

    coarse, fine = error(25), error(100)
    assert fine < 0.06  # of first order, at noise levels of no use to it
    assert fine < max(0.4 * coarse, 0.002)  # the last step, to 0, is of first order for all


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("name", ["ddpm", "edm"])
def test_noisy_solvers_end_in_the_distribution(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOLVERS, "edm", {"s_churn": 20})
    _, x, _ = sampled(name, kind, 200, count=3000)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert x.std().item() == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "edm", "ablation"])
def test_own_levels_are_those_of_the_section(name: str) -> None:
    """A sampler's own keys are shorthand for its own kind of levels."""
    own: dict[str, Any] = {"steps": 7}
    kind = "edm"
    if name in ("ddpm", "ddim"):
        own, kind = {"steps": "7", "noise_schedule": "linear"}, "process"
    samplers = [
        build_sampler(SAMPLERS[name].model_validate({"kind": name, **options}))
        for options in (own, {"levels": section(kind, 7)})
    ]
    assert samplers[0].levels(Gaussian()) == samplers[1].levels(Gaussian())


@pytest.mark.parametrize(
    ("sampler", "own"),
    [
        ("edm", "steps=5"), ("edm", "rho=5"), ("edm", "sigma_max=50"),
        ("ablation", "steps=5"), ("ablation", "c_1=0.1"),
        ("ddpm", "steps=5"), ("ddim", "noise_schedule=linear"),
    ],
)  # fmt: skip
def test_levels_and_own_steps_are_refused_together(sampler: str, own: str) -> None:
    changes = [f"sampling.kind={sampler}", f"sampling.{own}", "sampling.levels.kind=vp"]
    with pytest.raises(RecipeError, match=f"{own.partition('=')[0]} and levels both say"):
        load_recipe("cifar10-small", changes)


def test_lists_must_fall() -> None:
    for sigmas in ((1.0, 5.0), (5.0, 5.0), (5.0, 1.0, 2.0)):
        options = {"kind": "edm", "levels": {"kind": "list", "sigmas": sigmas}}
        sampler = build_sampler(SAMPLERS["edm"].model_validate(options))
        with pytest.raises(TesseraError, match="must be positive and fall"):
            sampler.levels(Gaussian())

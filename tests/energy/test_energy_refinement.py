"""Landscapes of denoisers, refinement of samples, and what energies are trained on besides."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from energy_case import column, random_energy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.discrete import Discrete, DiscreteDenoiser
from tessera.diffusion.discrete_objective import DiscreteObjective
from tessera.diffusion.energy import (
    MOST_STEPS,
    adaptive_steps,
    descend,
    energy,
    landscape,
)
from tessera.diffusion.energy_objective import (
    EnergyObjective,
    EnergyTerms,
    refinement_energies,
    refinement_loss,
)
from tessera.diffusion.experts import Experts
from tessera.diffusion.guidance import Guided
from tessera.diffusion.objectives import EdmObjective
from tessera.diffusion.preconditioning import Edm, Preconditioned, Preconditioning, Vp
from tessera.diffusion.windows import Windows
from tessera.errors import TesseraError
from tessera.networks.dit import DiT, EnergyDiT
from tessera.randomness import AddressedDraws
from tessera.sampling.core import Sampler
from tessera.sampling.ddpm import sample_ddpm
from tessera.sampling.edm import sample_edm
from tessera.sampling.levels import edm_levels, process_levels
from tessera.sampling.mcmc import Refinement, Tally
from tessera.sampling.seeds import SeedNoise

SHAPE = (3, 4, 4)
SCALINGS: dict[str, Preconditioning] = {
    "edm": Edm(),
    "vp": Vp(),
    "eps": Discrete(timesteps=50, prediction="eps"),
    "v": Discrete(timesteps=50, prediction="v"),
    "x0": Discrete(timesteps=50, prediction="x0"),
}


def denoiser_of(name: str, **options: Any) -> Preconditioned:
    scaling, network = SCALINGS[name], random_energy(**options)
    if isinstance(scaling, Discrete):
        return DiscreteDenoiser(network, scaling, SHAPE, 5)
    return Preconditioned(network, scaling, SHAPE, 5)


def batch(count: int = 4, seed: int = 0) -> tuple[Tensor, Conditioning]:
    torch.manual_seed(seed)
    return torch.randn(count, *SHAPE), Conditioning(labels=torch.arange(count) % 5)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("wrapped", ["", "guided", "interval", "weak", "experts"])
def test_the_noise_is_the_slope_of_the_energy(name: str, wrapped: str) -> None:
    """Of V at x_t, whatever the scaling of the network, and through wrappers."""
    model: Denoiser = denoiser_of(name, multiplier=3.0)
    if wrapped == "guided":
        model = Guided(model, 2.0)
    if wrapped == "interval":
        model = Guided(model, 2.0, interval=(0.5, 2.0))
    if wrapped == "weak":
        model = Guided(model, 2.0, weak=denoiser_of(name, head="linear_then_mean"))
    if wrapped == "experts":
        model = Experts([model, denoiser_of(name, head="linear_then_mean")], [1.0])
    x, cond = batch()
    sigma = model.round_sigma(torch.tensor([0.3, 0.9, 1.5, 6.0]))
    z = (x + column(sigma) * torch.randn_like(x)).requires_grad_()
    (slope,) = torch.autograd.grad(energy(model, z, sigma, cond).sum(), z)
    with torch.no_grad():
        here = landscape(model, z, sigma, cond)
        torch.testing.assert_close(here.energy, energy(model, z, sigma, cond))
        noise = (z - model(z, sigma, cond).mean) / column(sigma)
    torch.testing.assert_close(here.noise, noise, atol=1e-4, rtol=1e-4)
    at_xt = slope * column((1 + sigma**2).sqrt())
    torch.testing.assert_close(at_xt, noise, atol=1e-4, rtol=1e-3)


def test_denoisers_without_an_energy() -> None:
    plain = Preconditioned(DiT(4, 3, 5, patch=1, depth=1, width=16, heads=2), Edm(), SHAPE, 5)
    x, cond = batch()
    sigma = torch.ones(4)
    with pytest.raises(TesseraError, match="network is a DiT"):
        landscape(plain, x, sigma, cond)
    with pytest.raises(TesseraError, match="network is a DiT"):
        Refinement()(plain, x.double(), 1.0, cond, SeedNoise(range(4)))
    model = denoiser_of("edm")
    with pytest.raises(TesseraError, match="some channels"):
        energy(Guided(model, 2.0, channels=2), x, sigma, cond)
    with pytest.raises(TesseraError, match="kind Windows"):
        energy(Windows(model, (8, 8)), torch.randn(1, 3, 8, 8), sigma[:1], Conditioning())
    # Before anything is evaluated, whatever is around what has none.
    Guided(Experts([model, model], [1.0]), 2.0, weak=model).check_energy()
    for other in (plain, Guided(model, 2.0, channels=2), Windows(model, (8, 8))):
        for around in (other, Guided(other, 2.0), Guided(model, 2.0, weak=plain)):
            with pytest.raises(TesseraError, match="energ"):
                Refinement().check(around)
    with pytest.raises(TesseraError, match="network is a DiT"):
        Experts([model, plain], [1.0]).check_energy()
    with pytest.raises(TesseraError, match="level=state"):
        Refinement(level="step").check(model)


@given(
    name=st.sampled_from(["edm", "eps"]),
    step_size=st.floats(0.001, 30),
    steps=st.integers(1, 4),
    clamp=st.sampled_from(["none", "clean", "noisy"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_energies_fall_where_steps_are_rejected(
    name: str, step_size: float, steps: int, clamp: Any, seed: int
) -> None:
    model = denoiser_of(name)
    x, cond = batch(seed=seed)
    sigma = model.round_sigma(torch.tensor([0.05, 0.5, 1.0, 5.0]).double())
    z = x.double() * column((1 + sigma**2).sqrt())
    with torch.no_grad():
        path = descend(model, z, sigma, cond, step_size=step_size, steps=steps, clamp=clamp)
    assert path.energies.shape == (steps + 1, 4)
    assert (path.energies.diff(dim=0) <= 0).all()
    assert ((path.accepted >= 0) & (path.accepted <= steps)).all()
    still = path.accepted == 0
    assert torch.equal(path.z[still], z[still])
    if clamp != "none":
        edge = 2 if clamp == "clean" else 2 + 4 * sigma[~still]
        assert (path.z[~still].abs().amax(dim=(1, 2, 3)) <= edge).all()


def test_images_of_different_patience() -> None:
    """Each image makes its own steps, and is not moved by the others."""
    model = denoiser_of("eps")
    x, cond = batch()
    sigma = model.levels[torch.tensor([0, 10, 30, 49])].float()
    z = x * column((1 + sigma**2).sqrt())
    steps = torch.tensor([1, 2, 3, 4])
    with torch.no_grad():
        together = descend(model, z, sigma, cond, step_size=0.05, steps=steps, reject=False)
        for index, count in enumerate(steps.tolist()):
            here = slice(index, index + 1)
            alone = descend(
                model, z[here], sigma[here], cond[here], step_size=0.05, steps=count, reject=False
            )
            torch.testing.assert_close(together.z[here], alone.z, atol=1e-5, rtol=1e-4)
    assert together.accepted.tolist() == [1, 2, 3, 4]
    assert len(together.energies) == MOST_STEPS


def test_time_of_continuous_levels_is_near_that_of_the_linear_schedule() -> None:
    discrete = DiscreteDenoiser(random_energy(), Discrete(prediction="eps"), SHAPE, 5)
    sigma = discrete.levels[torch.tensor([0, 100, 500, 999])]
    exact = Guided(discrete, 2.0).time(sigma)
    torch.testing.assert_close(exact, torch.tensor([0, 0.1, 0.5, 0.999]).double())
    torch.testing.assert_close(denoiser_of("edm").time(sigma), exact, atol=0.01, rtol=0)
    visited = discrete.for_levels(sigma)
    torch.testing.assert_close(visited.time(sigma), exact)


class Counting(nn.Module):
    """An energy network that counts its evaluations."""

    def __init__(self, inner: EnergyDiT) -> None:
        super().__init__()
        self.inner, self.multiplier = inner, inner.multiplier
        self.energies = self.gradients = 0

    @property
    def step_size(self) -> Tensor:
        return self.inner.step_size

    def energy(self, *arguments: Any) -> Tensor:
        self.energies += 1
        return self.inner.energy(*arguments)

    def energy_and_output(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        self.gradients += 1
        return self.inner.energy_and_output(*arguments)


@pytest.mark.parametrize("reject", [False, True])
def test_evaluations_of_a_refinement(reject: bool) -> None:
    network = Counting(random_energy())
    model = Preconditioned(network, Edm(), SHAPE, 5)
    x, cond = batch()
    noise = SeedNoise(range(4))
    refine = Refinement(step_size=1e-4, steps=3, reject=reject)
    refined = refine(model, x.double(), 1.0, cond, noise)
    assert (network.gradients, network.energies) == (3, int(reject))
    assert not torch.equal(refined, x.double())
    # Once no image moves, no more is asked.
    wild = Refinement(step_size=1e4, steps=3)
    torch.testing.assert_close(wild(model, x.double(), 1.0, cond, noise), x.double())
    assert network.gradients - 3 <= 2
    assert (wild.tally.tried, wild.tally.rate) == (12, 0)
    for idle in (Refinement(steps=0), Refinement()):
        sigma = 0.0 if idle.steps is None else 1.0
        assert torch.equal(idle(model, x.double(), sigma, cond, noise), x.double())
        assert math.isnan(idle.tally.rate)


@pytest.mark.parametrize("name", ["edm", "eps"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_any_sampler_with_any_energy(name: str, scale: float) -> None:
    """Deterministic, the same in any batch, with less energy than without."""
    model: Denoiser = denoiser_of(name)
    model = Guided(model, scale) if scale != 1 else model
    latents, cond = batch(3)

    def sample(kind: str, refine: Refinement | None, rows: slice = slice(None)) -> Tensor:
        solver = sample_ddpm if kind == "ddpm" else sample_edm
        levels = process_levels if name == "eps" else edm_levels
        options: dict[str, Any] = {"steps": "5"} if name == "eps" else {"steps": 5}
        sampler = Sampler(
            lambda m: levels(m, **options),
            lambda *a: solver(*a, refine=refine, **({"clip": "none"} if kind == "ddpm" else {})),
        )
        seeds = SeedNoise(range(3)[rows])
        *_, last = sampler(model, latents[rows], cond[rows], seeds)
        return last.x

    for kind in ("ddpm", "edm"):
        refine = Refinement(step_size=0.01)
        plain, refined = sample(kind, None), sample(kind, refine)
        assert refined.isfinite().all()
        assert not torch.allclose(plain, refined)
        assert 0 < refine.tally.rate <= 1
        assert torch.equal(sample(kind, Refinement(step_size=0.01)), refined)
        alone = sample(kind, Refinement(step_size=0.01), slice(1, 2))
        torch.testing.assert_close(alone, refined[1:2], atol=1e-4, rtol=1e-3)


def test_the_models_own_step_size() -> None:
    model = denoiser_of("eps", step_size=0.05)
    x, cond = batch()
    sigma, noise = float(model.levels[10]), SeedNoise(range(4))
    own = Refinement(steps=2)(model, x.double(), sigma, cond, noise)
    given_ = Refinement(steps=2, step_size=0.05)(model, x.double(), sigma, cond, noise)
    torch.testing.assert_close(own, given_)


def test_options_of_a_refinement() -> None:
    x, cond = batch()
    with pytest.raises(TesseraError, match="level=state"):
        Refinement(level="step")(denoiser_of("edm"), x, 1.0, cond, SeedNoise(range(4)))
    with pytest.raises(TesseraError, match="must be positive"):
        Refinement(step_size=0.0)
    with pytest.raises(TesseraError, match="number of steps"):
        Refinement(steps=-1)
    assert math.isnan(Tally().rate)


DISCRETE = DiscreteObjective(50, weight="snr", label_dropout=0.5)


def terms_of(
    model: Denoiser, terms: EnergyTerms, base: Any = DISCRETE, rows: slice = slice(None)
) -> dict[str, Tensor]:
    x, cond = batch(6)
    draws = AddressedDraws(3, torch.arange(6)[rows])
    result: dict[str, Tensor] = EnergyObjective(base, terms)(model, x[rows], cond[rows], draws)
    return result


BOTH = EnergyTerms(contrastive=0.05, refinement=0.1)


@pytest.mark.parametrize("base", [DISCRETE, EdmObjective(label_dropout=0.5)])
def test_terms_are_added_to_any_objective(base: Any) -> None:
    model = denoiser_of("edm" if base is not DISCRETE else "eps", learn_step_size=True)
    found = terms_of(model, BOTH, base)
    x, cond = batch(6)
    plain = base(model, x, cond, AddressedDraws(3, torch.arange(6)))
    assert {"contrastive", "refinement"} == found.keys() - plain.keys()
    pixels = 1 if base is DISCRETE else x[0].numel()
    extra = 0.05 * found["contrastive"] + 0.1 * found["refinement"]
    torch.testing.assert_close(found["loss"], plain["loss"] + pixels * extra)
    assert all(value.shape == (6,) for value in found.values())
    assert terms_of(model, EnergyTerms(), base).keys() == plain.keys()
    # Every image's terms are its own, in whatever batch.
    part = terms_of(model, BOTH, base, slice(2, 4))
    for name in ("loss", "contrastive", "refinement"):
        torch.testing.assert_close(part[name], found[name][2:4], atol=1e-4, rtol=1e-3)


def test_terms_teach_weights_and_step_size() -> None:
    gradients: dict[str, dict[str, Tensor | None]] = {}
    for name, terms in {
        "none": EnergyTerms(),
        "contrastive": EnergyTerms(contrastive=1.0, contrastive_steps=2),
        "all": EnergyTerms(refinement=100.0, refinement_steps=2),
        "step_size": EnergyTerms(refinement=100.0, refinement_steps=2, refines="step_size"),
    }.items():
        model = denoiser_of("eps", learn_step_size=True, step_size=0.1)
        terms_of(model, terms)["loss"].mean().backward()
        gradients[name] = {n: p.grad for n, p in model.network.named_parameters()}
    weight = "layers.0.mlp.fc1.weight"

    def differ(one: str, other: str, parameter: str) -> bool:
        a, b = gradients[one][parameter], gradients[other][parameter]
        assert a is not None
        assert b is not None
        return not torch.allclose(a, b, atol=1e-6)

    assert gradients["none"]["alpha"] == 0
    assert differ("none", "contrastive", weight)
    assert gradients["contrastive"]["alpha"] == 0
    assert differ("none", "all", weight)
    assert not differ("none", "step_size", weight)
    assert differ("none", "step_size", "alpha")
    assert not differ("all", "step_size", "alpha")


def test_the_refinement_loss_falls_with_the_energy_and_rises_with_its_unevenness() -> None:
    even = torch.tensor([[3.0], [2.0], [1.0]])
    steep = torch.tensor([[3.0], [1.5], [0.0]])
    uneven = torch.tensor([[3.0], [3.0], [1.0]])
    assert refinement_loss(steep) < refinement_loss(even) < refinement_loss(uneven)
    # What an image does after its own steps does not count.
    longer = torch.cat([even, torch.full((3, 1), 1.0)])
    torch.testing.assert_close(refinement_loss(longer, torch.tensor([2])), refinement_loss(even))


def test_the_slope_by_the_step_size() -> None:
    model = denoiser_of("eps", learn_step_size=True, step_size=0.02)
    network = model.network
    assert isinstance(network, EnergyDiT)
    x, cond = batch()
    sigma = model.levels[torch.tensor([2, 10, 30, 45])].float()

    def end(size: Tensor) -> Tensor:
        return refinement_energies(model, x, sigma, cond, step_size=size, steps=3)[-1].sum()

    size = network.step_size
    (slope,) = torch.autograd.grad(end(size), size)
    with torch.no_grad():
        h = 2e-3
        expected = (end(size + h) - end(size - h)) / (2 * h)
    torch.testing.assert_close(slope, expected, rtol=2e-2, atol=1e-2)


def test_mistakes_are_told_in_words() -> None:
    with pytest.raises(TesseraError, match="2 steps or more"):
        EnergyObjective(DISCRETE, EnergyTerms(refinement=1.0, refinement_steps=1))
    with pytest.raises(TesseraError, match="learn_step_size"):
        terms_of(denoiser_of("eps"), BOTH)
    blurred = EdmObjective(corruption=lambda x, sigma, draws: x)
    with pytest.raises(TesseraError, match="white noise"):
        EnergyObjective(blurred, BOTH)


def test_numbers_of_steps_are_bounded() -> None:
    time = torch.tensor([0.0, 0.3, 1.0])
    assert adaptive_steps(time, 5).tolist() == [5, 8, 10]
    assert adaptive_steps(time, 2).tolist() == [2, 3, 6]
    assert adaptive_steps(time, 0).tolist() == [1, 1, 1]

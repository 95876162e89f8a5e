"""Every wrapper of a denoiser keeps all that a denoiser has, but for what it is there to change."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser, Posterior, Valued, Wrapper
from tessera.diffusion.discrete import Discrete, DiscreteDenoiser
from tessera.diffusion.experts import Experts
from tessera.diffusion.guidance import Guided
from tessera.diffusion.preconditioning import Preconditioned
from tessera.diffusion.skipping import BrickSchedule, Range, Skipping
from tessera.diffusion.windows import Windows
from tessera.errors import TesseraError
from tessera.model import Model
from tessera.sampling.ddpm import clipped, ddpm_sampler
from tessera.sampling.seeds import SeedNoise

LEVELS = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
Z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
COND = Conditioning(labels=torch.tensor([1, 4]))


class Marked(Preconditioned):
    """A denoiser of which nothing is as by default; `mark` says what it was made for."""

    def __init__(self, mark: str = "", bricks: int = 7) -> None:
        nn.Module.__init__(self)
        self.shape, self.num_classes = (3, 4, 4), 5
        self.sigma_min, self.sigma_max = 0.5, 4.0
        self.guided = True
        self.network = nn.Identity()
        self.mark, self.bricks = mark, bricks

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        return Posterior(z + 1, z - self.bricks, (z + 2,))

    def for_step(self, sigma: float) -> Denoiser:
        return Marked(f"{self.mark} step {sigma:g}", self.bricks)

    @property
    def levels(self) -> Tensor | None:
        return LEVELS

    def for_levels(self, levels: Tensor) -> Denoiser:
        return Marked(f"{self.mark} levels {levels.tolist()}", self.bricks)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return LEVELS[(sigma[..., None] - LEVELS).abs().argmin(-1)]

    def time(self, sigma: Tensor) -> Tensor:
        return sigma / 10

    def value(self, z: Tensor, sigma: Tensor, cond: Conditioning, *, gradient: bool) -> Valued:
        return Valued(z.sum(dim=(1, 2, 3)), z + 1 if gradient else None)

    def energy_network(self, sigma: float = 0.0) -> Any:
        return self.network


SCHEDULE = BrickSchedule((Range(0.8, 2.0, 1),))
WRAPPERS: dict[str, Callable[[Marked], Denoiser]] = {
    "Guided": lambda d: Guided(d, 1.0),
    "Windows": lambda d: Windows(d, (4, 4)),
    "Skipping": lambda d: Skipping(d, {1: Marked(d.mark, 1)}, SCHEDULE),
    "Experts": lambda d: Experts([d, d], [1.0]),
}
every_wrapper = pytest.mark.parametrize("name", WRAPPERS)


def innermost(denoiser: Denoiser) -> Marked:
    while not isinstance(denoiser, Marked):
        inner = denoiser.experts[0] if isinstance(denoiser, Experts) else denoiser.denoiser
        assert isinstance(inner, Denoiser)
        denoiser = inner
    return denoiser


def test_every_wrapper_of_the_library_is_here() -> None:
    def below(kind: type) -> set[str]:
        return {kind.__name__} | {n for child in kind.__subclasses__() for n in below(child)}

    mine = {c for c in Wrapper.__subclasses__() if c.__module__.startswith("tessera.")}
    assert {n for c in mine for n in below(c)} == WRAPPERS.keys() - {"Experts"}


def test_every_property_of_a_denoiser_is_here() -> None:
    """Who adds a property to denoisers must say here what wrappers do with it."""
    kinds = (Denoiser, Model)
    own = {n for kind in kinds for n in vars(kind) | inspect.get_annotations(kind)}
    own = {name for name in own if not name.startswith("_")} - {"network", "networks"}
    own -= {"begin", "shortened"}  # of what is trained, and wrappers are not
    values = {"shape", "num_classes", "sigma_min", "sigma_max", "guided", "levels"}
    energies = {"value", "check_energy", "energy_network", "time"}
    assert own == values | energies | {"round_sigma", "for_step", "for_levels", "forward"}


@every_wrapper
def test_properties_are_those_of_the_inner_denoiser(name: str) -> None:
    inner = Marked()
    wrapper = WRAPPERS[name](inner)
    for value in ("shape", "num_classes", "sigma_min", "sigma_max", "guided"):
        assert getattr(wrapper, value) == getattr(inner, value), value
    assert wrapper.levels is not None
    assert torch.equal(wrapper.levels, LEVELS)
    sigma = torch.tensor([0.1, 0.9, 3.0], dtype=torch.float64)
    assert torch.equal(wrapper.round_sigma(sigma), inner.round_sigma(sigma))


@every_wrapper
def test_steps_and_levels_reach_the_inner_denoiser(name: str) -> None:
    wrapper = WRAPPERS[name](Marked())
    visited = wrapper.for_levels(LEVELS[:2])
    assert innermost(visited).mark == " levels [0.5, 1.0]"
    assert type(visited) is type(wrapper)
    stepped = wrapper.for_step(4.0)
    assert innermost(stepped).mark == " step 4"


@every_wrapper
def test_energies_are_those_of_the_inner_denoiser_or_refused(name: str) -> None:
    """Windows overlap and stacks change their number of parts: neither is one energy's gradient."""
    inner = Marked()
    wrapper, sigma = WRAPPERS[name](inner), torch.tensor([0.6, 4.0])
    assert torch.equal(wrapper.time(sigma), inner.time(sigma))
    assert wrapper.energy_network() is inner.network
    if name in ("Windows", "Skipping"):
        with pytest.raises(TesseraError, match=name):
            wrapper.check_energy()
        with pytest.raises(TesseraError, match=name):
            wrapper.value(Z, sigma, COND, gradient=True)
        return
    wrapper.check_energy()
    found = wrapper.value(Z, sigma, COND, gradient=True)
    assert found.mean is not None
    torch.testing.assert_close(found.energy, Z.sum(dim=(1, 2, 3)))
    torch.testing.assert_close(found.mean, Z + 1)
    assert wrapper.value(Z, sigma, COND, gradient=False).mean is None


@every_wrapper
def test_learned_variances_survive(name: str) -> None:
    wrapper = WRAPPERS[name](Marked())
    for sigma in (torch.tensor([4.0, 4.0]), torch.tensor([1.0, 4.0]), torch.tensor([4.0, 0.6])):
        posterior = wrapper(Z, sigma, COND)
        torch.testing.assert_close(posterior.mean, Z + 1)
        assert posterior.log_variance is not None
        removed = [SCHEDULE.bricks(s) or 7 if name == "Skipping" else 7 for s in sigma.tolist()]
        expected = Z - torch.tensor(removed)[:, None, None, None]
        torch.testing.assert_close(posterior.log_variance, expected)


def test_windows_blend_what_is_learned() -> None:
    z = torch.randn(2, 3, 6, 9, generator=torch.Generator().manual_seed(1))
    posterior = Windows(Marked(), (6, 9), batch=3)(z, torch.ones(2), Conditioning())
    assert posterior.log_variance is not None
    torch.testing.assert_close(posterior.mean, z + 1)
    torch.testing.assert_close(posterior.log_variance, z - 7)
    torch.testing.assert_close(posterior.stages[0], z + 2)


class Learning(nn.Module):
    """A network with a head for variances."""

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        labels = torch.zeros(len(x)) if cond.labels is None else cond.labels
        shift = 0.5 * (labels + 1)[:, None, None, None]
        return torch.cat([x.tanh() * 2 + shift, torch.sigmoid(x)], dim=1)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_in_one_window_is_sampling_without(guidance: float) -> None:
    """Learned variances of fewer steps, and `clip=auto`, see through the windows."""
    model = DiscreteDenoiser(Learning(), Discrete(timesteps=50, schedule="cosine"), (3, 4, 4), 5)
    plain: Denoiser = model if guidance == 1 else Guided(model, guidance)

    def sample(denoiser: Denoiser) -> Tensor:
        noise = SeedNoise([3, 4])
        start = noise.normal((3, 4, 4))
        *_, last = ddpm_sampler(steps="10")(denoiser, start, COND, noise)
        return last.x

    torch.testing.assert_close(sample(Windows(plain, (4, 4))), sample(plain))


def test_clip_auto_looks_through_experts() -> None:
    model = Marked()
    model.guided = False
    x = 3 * Z
    assert torch.equal(clipped(x, "auto", 0.995, Experts([model, model], [1.0])), x.clamp(-1, 1))
    guided = Experts([Guided(model, 2.0), model], [1.0])
    assert torch.equal(clipped(x, "auto", 0.995, guided), clipped(x, "dynamic", 0.995))

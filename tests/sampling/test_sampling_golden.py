"""Samplers against the trajectories of the released code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_cases import RecordedSteps, case, load, recorded_network, relative_error, weights
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser, Posterior
from tessera.diffusion.preconditioning import Edm, Iddpm, Preconditioned, Ve, Vp
from tessera.images import to_uint8
from tessera.sampling.ablation import ablation_sampler
from tessera.sampling.edm import edm_sampler
from tessera.sampling.seeds import SeedNoise

NAMES = {
    "num_steps": "steps",
    "S_churn": "s_churn",
    "S_min": "s_min",
    "S_max": "s_max",
    "S_noise": "s_noise",
}
TOY = case("edm", "samplers_toy")["config"]["runs"]
NETS = case("edm", "samplers_net")["config"]["runs"]
PRECONDITIONINGS = {
    "edm": Edm(),
    "vp": Vp(released_sigma_min=True),
    "ve": Ve(),
    "iddpm": Iddpm(),
}


class Toy(Denoiser):
    """D = (sd² z + σ² μ) / (sd² + σ²) in float64; remembers how it was called."""

    def __init__(self, mu: Tensor, sd: Tensor, sigma_min: float, sigma_max: float) -> None:
        super().__init__()
        self.mu, self.sd = mu, sd
        self.shape = (3, 4, 4)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.sigmas: list[float] = []
        self.inputs: list[Tensor] = []

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        assert z.dtype == torch.float64
        self.sigmas.append(sigma[0].item())
        self.inputs.append(z[0, 0])
        variance = sigma.reshape(-1, 1, 1, 1) ** 2
        return Posterior((self.sd**2 * z + variance * self.mu) / (self.sd**2 + variance))


def run(name: str, *arguments: Any, **options: Any) -> Tensor:
    options = {NAMES.get(key, key): value for key, value in options.items()}
    make = {"edm": edm_sampler, "abl": ablation_sampler}[name]
    states = list(make(**options)(*arguments))
    assert [state.step for state in states] == list(range(1, options.get("steps", 18) + 1))
    assert states[-1].sigma == 0
    return states[-1].x


@pytest.mark.parametrize("toy", TOY, ids=[toy["run"] for toy in TOY])
def test_toy(toy: dict[str, Any]) -> None:
    numbers = load("edm", "samplers_toy")
    options = dict(toy["options"])
    limits = options.pop("net.sigma_min", 0.0), options.pop("net.sigma_max", math.inf)
    denoiser = Toy(numbers["in.toy.mu"], numbers["in.toy.sd"], *limits)
    noise = RecordedSteps(numbers["in.toy.step_noise"])
    latents = numbers["in.toy.latents"]
    final = run(toy["sampler"], denoiser, latents, Conditioning(), noise, **options)

    tolerance = 1e-6 if toy["options"].get("discretization") == "iddpm" else 1e-9
    prefix = f"out.toy.{toy['run']}."
    sigmas = torch.tensor(denoiser.sigmas, dtype=torch.float64)
    assert len(sigmas) == toy["NFE"]
    assert relative_error(sigmas, numbers[prefix + "call_sigma"]) < tolerance
    if tolerance == 1e-9:  # the released iDDPM table loses digits near 0, where ours is exact
        assert ((sigmas / numbers[prefix + "call_sigma"] - 1).abs() < tolerance).all()
    assert relative_error(torch.stack(denoiser.inputs), numbers[prefix + "call_x"]) < tolerance
    assert relative_error(final, numbers[prefix + "final"]) < tolerance


@pytest.mark.parametrize("net", NETS, ids=[str(net["index"]) for net in NETS])
def test_network(net: dict[str, Any]) -> None:
    numbers, file = load("edm", "samplers_net"), net["weights"].removesuffix(".safetensors")
    config, tensors = case("edm", file)["config"], weights(load("edm", file))
    if file == "iddpm":
        del tensors["u"]
        tensors = weights(tensors, "model.")
    network = recorded_network(config, 6 if file == "iddpm" else 3).eval()
    network.load_state_dict(tensors)
    denoiser = Preconditioned(network, PRECONDITIONINGS[net["precond"]], (3, 16, 16), 3)
    sigmas: list[float] = []
    inputs: list[Tensor] = []
    denoiser.register_forward_pre_hook(
        lambda _, given: (inputs.append(given[0]), sigmas.append(given[1][0].item()))[:0] or None
    )

    own = weights(numbers, f"in.{net['index']}.")
    out = weights(numbers, f"out.{net['index']}.")
    cond = Conditioning(own["class_labels"].argmax(dim=1))
    noise = RecordedSteps(own.get("step_noise", torch.empty(0)))
    final = run(net["sampler"], denoiser, own["latents"], cond, noise, **net["options"])

    assert len(sigmas) == net["NFE"]
    called = torch.tensor(sigmas, dtype=torch.float64)
    # The released iDDPM table is float32 throughout, and the VP range starts from its σ_min.
    assert relative_error(called, out["call_sigma"]) < (1e-6 if file == "iddpm" else 1e-10)
    assert relative_error(inputs[0], out["first_denoise_input"]) < 1e-6
    assert relative_error(final, out["final"]) < 5e-4


def test_random_stream_and_pixels() -> None:
    numbers = load("edm", "rng")
    noise = SeedNoise(numbers["in.seeds"].tolist())
    assert torch.equal(noise.normal((3, 4, 4)), numbers["out.latents"])
    assert torch.equal(noise.integers(10), numbers["out.classes"])
    assert torch.equal(noise.normal((3, 4, 4), torch.float64), numbers["out.step0"])
    assert torch.equal(noise.normal((3, 4, 4), torch.float64), numbers["out.step1"])
    assert torch.equal(to_uint8(numbers["in.pixels"]), numbers["out.pixels"])

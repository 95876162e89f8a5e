"""DDPM and DDIM: recorded trajectories, with guidance, thresholds and experts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_cases import case, load, weights
from test_pdm_discrete import preconditioning
from test_pdm_network import recorded_unet
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.discrete import Discrete, DiscreteDenoiser, Process
from tessera.diffusion.experts import Experts
from tessera.diffusion.guidance import Guided
from tessera.sampling.ddpm import ddim_sampler, ddpm_sampler, encode_ddim
from tessera.sampling.edm import edm_sampler
from tessera.sampling.levels import process_levels
from tessera.sampling.seeds import SeedNoise

RUNS = [
    (name, run)
    for name in ("loops_cond_p2",)
    for run in case("pdm", name)["config"]["runs"]
    if run["sampler"] != "bpd"
]


class RecordedNoise:
    """A `NoiseSource` that hands out recorded numbers, step by step."""

    def __init__(self, steps: Tensor) -> None:
        self.steps = iter(steps)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return next(self.steps).to(dtype)

    def integers(self, high: int) -> Tensor:
        raise AssertionError


def recorded_denoiser(name: str, run: dict[str, Any]) -> Denoiser:
    """The denoiser of a recorded run: experts where it has splits, guided where it has a scale."""
    golden, config = load("pdm", name), case("pdm", name)["config"]
    options = run["diffusion"]
    thresholds = [float(part) for part in options.get("snr_splits", "").split(",") if part]
    # Samplers take the spacing; a process of its own is what the network was recorded with.
    own = preconditioning({**options, "timestep_respacing": ""})
    denoisers: list[Denoiser] = []
    for index in range(len(thresholds) + 1):
        network = recorded_unet(config["unet"])
        state = weights(golden, f"w.m{index}.")
        network.load_state_dict({k: v.float() for k, v in state.items()})
        classes = config["unet"]["num_classes"] or 0
        denoisers.append(DiscreteDenoiser(network.eval(), own, (3, 8, 8), classes))
    denoiser = Experts(denoisers, thresholds) if thresholds else denoisers[0]
    scale = run.get("guidance_scale")
    return denoiser if scale is None else Guided(denoiser, scale)


@pytest.mark.parametrize(("name", "run"), RUNS, ids=lambda value: str(value)[:20])
def test_recorded_loops(name: str, run: dict[str, Any]) -> None:
    golden, denoiser = load("pdm", name), recorded_denoiser(name, run)
    cond = Conditioning(golden.get("in.y"))
    clip: Any = "auto" if run.get("clip", True) else "none"
    if run.get("dynamic_threshold") is False:
        clip = "static"
    steps = run["diffusion"].get("timestep_respacing", "")
    options = {"clip": clip}
    if run["sampler"] == "ddim_reverse":
        # The recording encodes the same numbers that the other runs begin with.
        levels = process_levels(denoiser, steps=steps)
        states = list(encode_ddim(denoiser, golden["in.x_T"], cond, levels, **options))
    else:
        sampler: Any = ddpm_sampler
        if run["sampler"] == "ddim":
            sampler, options["eta"] = ddim_sampler, run["eta"]
        noise = RecordedNoise(golden[f"in.noises.{run['noises']}"][:])
        states = list(sampler(steps=steps, **options)(denoiser, golden["in.x_T"], cond, noise))
    samples = torch.stack(
        [s.x if math.isinf(s.sigma) else s.x / math.sqrt(1 + s.sigma**2) for s in states]
    )
    denoised = torch.stack([state.denoised for state in states])
    for key, value in (("samples", samples), ("pred_xstart", denoised)):
        expected = golden[f"out.{run['name']}.{key}"]
        atol = 1e-3 * float(expected.abs().max())
        torch.testing.assert_close(value.float(), expected, rtol=0, atol=atol, msg=key)
    pixels = ((samples[-1] + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    difference = (pixels.int() - golden[f"out.{run['name']}.uint8"].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.005


class Gaussian(nn.Module):
    """The perfect network for pixels of mean 0.2 and deviation 0.5, with the variance of DDPM."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.alpha_bar = process.alpha_bar.float()

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        left = self.alpha_bar[noise.long()][:, None, None, None]
        z, variance = x / left.sqrt(), (1 - left) / left
        mean = 0.2 + (z - 0.2) * 0.25 / (0.25 + variance)
        return torch.cat([mean, torch.zeros_like(mean)], dim=1)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (ddpm_sampler, {"steps": "250", "clip": "none"}),
        (ddpm_sampler, {"steps": "250", "clip": "none", "variance": "small"}),
        (ddim_sampler, {"steps": "250", "clip": "none"}),
        (ddim_sampler, {"steps": "250", "clip": "none", "eta": 1.0}),
        (edm_sampler, {"steps": 40}),
        (edm_sampler, {"steps": 40, "s_churn": 20}),
    ],
)
def test_all_samplers_find_the_same_distribution(sampler: Any, options: dict[str, Any]) -> None:
    own = Discrete("cosine")
    denoiser = DiscreteDenoiser(Gaussian(own.process), own, (1, 4, 4))
    noise = SeedNoise(range(600))
    *_, last = sampler(**options)(denoiser, noise.normal((1, 4, 4)), Conditioning(), noise)
    assert last.x.mean() == pytest.approx(0.2, abs=0.03)
    assert last.x.std() == pytest.approx(0.5, abs=0.03)
    assert last.step == last.steps
    assert last.sigma == 0


def test_ddim_forth_and_back() -> None:
    own = Discrete("linear")
    denoiser = DiscreteDenoiser(Gaussian(own.process), own, (1, 4, 4))
    images = 0.2 + 0.5 * SeedNoise(range(8)).normal((1, 4, 4))
    *_, encoded = encode_ddim(
        denoiser, images, Conditioning(), process_levels(denoiser), clip="none"
    )
    noise = SeedNoise([0])
    *_, decoded = ddim_sampler(clip="none")(denoiser, encoded.x, Conditioning(), noise)
    torch.testing.assert_close(decoded.x.float(), images, rtol=0, atol=0.02)


@pytest.mark.parametrize("steps", ["9", "2", "50"])
def test_ddim_with_all_noise_is_finite(steps: str) -> None:
    own = Discrete("cosine")
    denoiser = DiscreteDenoiser(Gaussian(own.process), own, (1, 4, 4))
    noise = SeedNoise([1, 2])
    latents = noise.normal((1, 4, 4))
    *_, last = ddim_sampler(steps=steps, eta=1.0)(denoiser, latents, Conditioning(), noise)
    assert last.x.isfinite().all()

"""Discrete processes: recorded tables, and posteriors of networks in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import case, load
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.diffusion.discrete import (
    Discrete,
    DiscreteDenoiser,
    Process,
    noise_betas,
    spaced_steps,
)
from tessera.diffusion.experts import sigma_range
from tessera.errors import TesseraError
from tessera.sampling.ddpm import clipped

MEANS = {"xstart": "x0", "eps": "eps", "v": "v"}


def preconditioning(config: dict[str, Any]) -> Discrete:
    """From the recorded options of a diffusion."""
    return Discrete(
        config.get("noise_schedule", "linear"),
        config.get("diffusion_steps", 1000),
        config.get("timestep_respacing", ""),
        MEANS[config.get("model_mean_type", "xstart")],  # type: ignore[arg-type]
        config.get("rescale_timesteps", False),
    )


class Constant(nn.Module):
    """A network whose output is given."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        return self.output


def exact(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_recorded_schedules() -> None:
    golden, config = load("pdm", "schedules"), case("pdm", "schedules")["config"]
    for name, steps in config["schedules"]:
        process = Process.named(name, steps)
        exact(process.betas, golden[f"out.betas.{name}.T{steps}"])
        exact(process.alpha_bar, golden[f"out.alphas_cumprod.{name}.T{steps}"])
    process = Process.named("linear")
    exact(process.posterior_variance, golden["out.posterior_variance.linear.T1000"])
    exact(process.posterior_log_variance, golden["out.posterior_log_variance_clipped.linear.T1000"])
    for number, coefficient in enumerate(process.mean_coefficients, start=1):
        exact(coefficient, golden[f"out.posterior_mean_coef{number}.linear.T1000"])
    exact(process.snr, golden["out.snrs.linear.T1000"])
    for name, schedule, steps, spacing in config["respacings"]:
        process = Process.named(schedule, steps, spacing)
        exact(process.betas, golden[f"out.respaced.{name}.betas"])
        exact(process.alpha_bar, golden[f"out.respaced.{name}.alphas_cumprod"])
        kept = torch.tensor(spaced_steps(steps, spacing))
        assert torch.equal(kept, golden[f"out.respaced.{name}.timestep_map"])


def test_recorded_owners() -> None:
    golden, config = load("pdm", "schedules"), case("pdm", "schedules")["config"]
    for index, (schedule, steps, text, spacing) in enumerate(config["splits"]):
        thresholds = [float(part) for part in text.split(",")]
        sigmas = Process.named(schedule, steps, spacing).sigmas
        owners = golden[f"out.split.{index}.model_index"]
        for expert in range(len(thresholds) + 1):
            low, high = sigma_range(thresholds, expert)
            assert torch.equal((sigmas >= low) & (sigmas < high), owners == expert)


def test_the_process_of_sigmas_is_the_same_one() -> None:
    for process in (Process.named("cosine", 50), Process.named("linear", 1000, "250")):
        again = Process.of_sigmas(process.sigmas)
        torch.testing.assert_close(again.alpha_bar, process.alpha_bar, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(again.betas, process.betas, rtol=1e-9, atol=0)


ENTRIES = [e for e in case("pdm", "diffusion_terms")["config"]["entries"] if e["kind"] == "pmv"]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_recorded_posteriors(entry: dict[str, Any]) -> None:
    golden, options = load("pdm", "diffusion_terms"), entry["diffusion"]
    own = preconditioning(options)
    output = golden["in.model_out"] if options["learn_sigma"] else golden["in.model_out"][:, :3]
    # The recorded outputs are no probabilities, and log variances are linear in them.
    denoiser = DiscreteDenoiser(Constant(output), own, (3, 4, 4))
    t = golden[f"in.t.{entry['t']}"]
    sigma = own.process.sigmas[t]
    x_t = golden[f"out.{entry['name']}.x_t"]
    scale = own.process.alpha_bar[t].sqrt()[:, None, None, None]
    posterior = denoiser(x_t / scale, sigma, Conditioning())
    x0 = clipped(posterior.mean, "static" if entry["clip"] else "none", 0.995)
    c_1, c_2 = (c[t][:, None, None, None] for c in own.process.mean_coefficients)
    fixed = (
        own.process.posterior_log_variance
        if options.get("sigma_small")
        else own.process.large_log_variance
    )
    log_variance = posterior.log_variance
    if log_variance is None:
        log_variance = fixed[t][:, None, None, None].expand_as(x0)
    found = {
        "pred_xstart": x0,
        "mean": c_1 * x0 + c_2 * x_t,
        "log_variance": log_variance,
        "variance": log_variance.exp(),
    }
    for name, value in found.items():
        expected = golden[f"out.{entry['name']}.{name}"]
        if name == "variance" and options.get("sigma_small"):
            continue  # recorded unclipped, where the log variance is clipped
        atol = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(value.float(), expected, rtol=1e-4, atol=atol, msg=name)


def test_levels_are_rounded_and_visited() -> None:
    own = Discrete("linear", spacing="250")
    process = own.process
    assert len(process) == 250
    assert own.sigma_min == pytest.approx(float(process.sigmas[0]))
    between = process.sigmas[:-1] * 1.0001
    assert torch.equal(own.round_sigma(between), process.sigmas[:-1])
    fewer = own.visit(process.sigmas[[0, 100, 249]])
    assert fewer.steps == (0, own.steps[100], 999)
    assert torch.equal(fewer.coefficients(process.sigmas[[100]].float()).noise,
                       torch.tensor([float(own.steps[100])]))  # fmt: skip
    rescaled = Discrete("cosine", 6, rescale_timesteps=True)
    labels = rescaled.coefficients(rescaled.process.sigmas.float()).noise
    torch.testing.assert_close(labels, torch.arange(6) * (1000 / 6))


@pytest.mark.parametrize(
    ("schedule", "steps"), [("linear", 20), ("linear0.025", 25), ("linearx", 1000), ("quad", 1000)]
)
def test_impossible_schedules(schedule: str, steps: int) -> None:
    with pytest.raises(TesseraError, match=schedule):
        noise_betas(schedule, steps)


def test_schedules_just_possible() -> None:
    assert noise_betas("linear", 21).max() < 1
    assert noise_betas("linear0.025", 26).max() < 1


@pytest.mark.parametrize("spacing", ["ddim999", "1001", "0", "600,600", "ten", "ddim", "5,"])
def test_impossible_spacings(spacing: str) -> None:
    with pytest.raises(TesseraError, match="steps"):
        spaced_steps(1000, spacing)


def test_one_step_is_enough() -> None:
    process = Process.named("linear", 1000, "1")
    assert process.large_log_variance.isfinite().all()
    assert process.posterior_log_variance.isfinite().all()

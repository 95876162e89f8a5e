"""The samplers of relay diffusion: recorded trajectories, and ideal denoisers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from golden_cases import RecordedSteps, load
from relay_case import recorded_denoiser, relay_case
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.blur import Blur, block_dct, block_idct
from tessera.diffusion.denoiser import Denoiser, Posterior
from tessera.diffusion.guidance import Guided
from tessera.diffusion.schedules import edm_steps
from tessera.errors import TesseraError
from tessera.sampling.core import NoiseSource, SamplerState, enlarged
from tessera.sampling.edm import sample_edm
from tessera.sampling.relay import relay_levels, sample_relay
from tessera.sampling.seeds import SeedNoise


class Calls:
    """Notes what a recorded network is called with; of a doubled batch, the conditional half."""

    def __init__(self, network: Denoiser) -> None:
        self.inputs: list[Tensor] = []
        self.sigmas: list[float] = []
        network.register_forward_pre_hook(self.note)

    def note(self, _: Any, given: tuple[Tensor, Tensor, Conditioning]) -> None:
        self.inputs.append(given[0][:2])
        self.sigmas.append(given[1][0].item())

    def check(self, golden: dict[str, Tensor], states: list[SamplerState]) -> None:
        """The calls and the result of a sampler against the recording."""
        first = golden["call_has_label"] == golden["call_has_label"][0]
        sigmas = torch.tensor(self.sigmas, dtype=torch.float64)
        torch.testing.assert_close(sigmas, golden["call_sigma"][first], rtol=1e-12, atol=0)
        expected = golden["call_x"][first]
        for found, wanted in (
            *zip(self.inputs, expected, strict=True),
            (states[-1].x, golden["out"]),
        ):
            atol = 2e-5 * max(1.0, float(wanted.abs().max()))
            torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def conditioning(golden: dict[str, Tensor]) -> Conditioning:
    labels = golden.get("labels")
    return Conditioning(None if labels is None else labels.argmax(dim=1))


def guided(network: Denoiser, scale: float) -> Denoiser:
    return network if scale == 1 else Guided(network, scale)


@pytest.mark.parametrize(
    "name", ["second_block", "second_cfg", "second_noblock", "second_ode", "second_celeba"]
)
def test_recorded_second_stage(name: str) -> None:
    golden, described = load("relay", name), relay_case(name)
    options = described["kwargs"]
    network = recorded_denoiser(described["net"])
    calls = Calls(network)
    block = options["up_scale"]
    noises = golden["noises"]
    if name == "second_celeba":  # drawn and multiplied by 0 before each first-order evaluation
        noises = noises[[i for i in range(len(noises)) if i < 2 or (i - 2) % 5]]
    denoiser = guided(network, options["cfg_scale"])
    levels = relay_levels(
        denoiser,
        steps=options["num_steps"],
        sigma_start=options["truncation_sigma"],
        **{k: options[k] for k in ("sigma_min", "sigma_max", "rho")},
    )
    blur = Blur(
        block=block,
        prob_length=options["truncation_t"],
        blur_sigma_max=options["blur_sigma_max"],
    )
    states = list(
        sample_relay(
            denoiser,
            enlarged(golden["low_res"], block),
            conditioning(golden),
            RecordedSteps(noises),
            levels,
            blur=blur,
            s_block=options["s_block"],
            s_noise=options["s_noise"],
        )
    )
    calls.check(golden, states)
    assert [s.sigma for s in states] == [*levels[1:], 0.0]
    assert [s.step for s in states] == list(range(1, len(levels) + 1))
    assert torch.equal(states[-1].x, states[-1].denoised)


def test_recorded_first_stage_with_churn() -> None:
    golden, described = load("relay", "first_churn"), relay_case("first_churn")
    options = {k.lower(): v for k, v in described["kwargs"].items()}
    network = recorded_denoiser(described["net"])
    calls = Calls(network)
    ends = (options.pop(k) for k in ("num_steps", "sigma_min", "sigma_max", "rho"))
    levels = edm_steps(*ends)
    states = list(
        sample_edm(
            guided(network, options.pop("cfg_scale")),
            golden["latents"],
            conditioning(golden),
            RecordedSteps(golden["noises"]),
            levels.tolist(),
            **options,
        )
    )
    calls.check(golden, states)


def test_recorded_first_stage_with_sde() -> None:
    golden, described = load("relay", "first_celeba_sde"), relay_case("first_celeba_sde")
    options = described["kwargs"]
    network = recorded_denoiser(described["net"])
    calls = Calls(network)
    levels = edm_steps(*(options[k] for k in ("num_steps", "sigma_min", "sigma_max", "rho")))
    # Of each step's three numbers the first was multiplied by 0, and both of the last step's.
    used = [i for i in range(15) if i % 3]
    states = list(
        sample_edm(
            network,
            golden["latents"],
            Conditioning(),
            RecordedSteps(golden["noises"][used]),
            levels.tolist(),
            sde_scale=options["sde_scale"],
        )
    )
    calls.check(golden, states)


MEAN, STD = 0.3, 0.5


class Ideal(Denoiser):
    """The ideal denoiser of blurred pixels x ~ N(MEAN, STD²) and white noise."""

    shape = (1, 8, 12)

    def __init__(self, blur: Blur) -> None:
        super().__init__()
        self.blur, self.calls, self.steps = blur, 0, list[float]()

    def for_step(self, sigma: float) -> Denoiser:
        self.steps.append(sigma)
        return self

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        assert sigma.shape == (len(z),)
        self.calls += 1
        block = self.blur.block
        alpha = self.blur.factors(sigma).repeat(1, *(n // block for n in z.shape[-2:]))[:, None]
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma.reshape(-1, 1, 1, 1) ** 2)
        prior = torch.full_like(z, MEAN)
        error = block_dct(z, block) - alpha * block_dct(prior, block)
        return Posterior(prior + block_idct(gain * error, block))


class CountedNoise(SeedNoise):
    """A `NoiseSource` that counts how often it is asked."""

    def __init__(self, seeds: Iterable[int]) -> None:
        super().__init__(list(seeds))
        self.draws = 0

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        self.draws += 1
        return super().normal(shape, dtype)


def low_resolution(count: int, block: int) -> Tensor:
    """Block means of the data, [count, 1, 8 / block, 12 / block]."""
    x = MEAN + STD * SeedNoise(range(1000, 1000 + count)).normal((1, 8, 12))
    return torch.nn.functional.avg_pool2d(x, block)


@pytest.mark.parametrize("s_noise", [0.0, 0.2])
def test_samples_have_the_distribution_of_the_data(s_noise: float) -> None:
    # So strong a blur that the first step's image is the enlarged one.
    blur = Blur(block=2, blur_sigma_max=4, min_scale=0)
    denoiser, start = Ideal(blur), low_resolution(128, 2)
    levels = edm_steps(40, 0.008, 1.5).tolist()
    *_, last = sample_relay(
        denoiser, enlarged(start, 2), Conditioning(), SeedNoise(range(128)), levels,
        blur=blur, s_block=0, s_noise=s_noise, correction="estimates",
    )  # fmt: skip
    assert last.x.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert last.x.std().item() == pytest.approx(STD, rel=0.03)
    neighbours = (last.x - MEAN) * (last.x - MEAN).roll(1, -1)
    assert neighbours.mean().item() == pytest.approx(0, abs=0.02)
    # The start is what the samples look like from afar, though noise hides some of it.
    means = torch.nn.functional.avg_pool2d(last.x, 2)
    pair = torch.stack([means.flatten(), start.double().flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.2


def test_order_of_the_corrections() -> None:
    blur, start = Blur(block=4), enlarged(low_resolution(2, 4), 4)

    def result(steps: int, **options: Any) -> Tensor:
        # All from the same noise level, to a least one so low that the last step does not count.
        levels, noise = edm_steps(steps, 1e-3, 0.9).tolist(), SeedNoise(range(2))
        *_, last = sample_relay(
            Ideal(blur), start, Conditioning(), noise, levels, blur=blur, s_noise=0, **options
        )
        return last.x

    exact = result(400, correction="estimates")
    errors = {
        (kind, steps): (result(steps, correction=kind) - exact).abs().max().item()
        for kind in ("directions", "estimates", "none")
        for steps in (30, 60)
    }
    assert errors["estimates", 30] / errors["estimates", 60] > 3
    assert 1.5 < errors["none", 30] / errors["none", 60] < 2.5
    # The released correction halves the error of the first-order step, whatever its length.
    for steps in (30, 60):
        assert 0.4 < errors["directions", steps] / errors["none", steps] < 0.7


@pytest.mark.parametrize(
    ("options", "draws", "calls"),
    [
        ({}, 2 + 4 * 5, 11),
        ({"s_block": 0.0}, 1 + 2 * 5, 11),
        ({"s_noise": 0.0}, 2, 11),
        ({"correction": "none"}, 2 + 2 * 5, 6),
        ({"correction": "estimates"}, 2 + 4 * 5, 11),
        ({"reuse_noise": True}, 2 + 2 * 5, 11),
        ({"s_churn": 3.0}, 2 + 5 * 5 + 1, 11),
    ],
)
def test_what_is_drawn_and_evaluated(options: dict[str, Any], draws: int, calls: int) -> None:
    denoiser, noise = Ideal(Blur()), CountedNoise(range(2))
    levels = edm_steps(6, 0.01, 0.8).tolist()
    start = enlarged(low_resolution(2, 4), 4)
    list(sample_relay(denoiser, start, Conditioning(), noise, levels, **options))
    assert (noise.draws, denoiser.calls) == (draws, calls)
    assert denoiser.steps == levels


def test_options_change_what_they_name() -> None:
    levels = edm_steps(6, 0.01, 0.8).tolist()

    def result(**options: Any) -> Tensor:
        denoiser, start = Ideal(Blur()), enlarged(low_resolution(2, 4), 4)
        noise = SeedNoise(range(2))
        *_, last = sample_relay(denoiser, start, Conditioning(), noise, levels, **options)
        return last.x

    plain = result()
    assert not torch.equal(result(unit_variance=True), plain)
    assert torch.equal(result(unit_variance=True, s_block=0.0), result(s_block=0.0))
    churned = result(s_churn=3.0)
    assert not torch.equal(churned, plain)
    assert not torch.equal(result(s_churn=3.0, churn_noise=0.5), churned)
    assert not torch.equal(result(s_churn=3.0, s_max=0.1), churned)
    assert not torch.equal(result(s_churn=3.0, s_min=0.1), churned)
    # Nothing is assumed of a blur that leaves the image alone: a plain sampler of its levels.
    sharp = Blur(blur_sigma_max=0)
    deterministic = result(blur=sharp, s_noise=0.0, s_block=0.0)
    denoiser, start = Ideal(Blur()), enlarged(low_resolution(2, 4), 4).double()
    x = start + levels[0] * SeedNoise(range(2)).normal((1, 8, 12), torch.float64)
    *_, heun = sample_edm(
        denoiser, x / levels[0], Conditioning(), SeedNoise([0, 1]), levels, sde_scale=0.0
    )
    torch.testing.assert_close(deterministic, heun.x, rtol=1e-9, atol=1e-12)


def test_images_do_not_depend_on_their_batch() -> None:
    levels, low = edm_steps(4, 0.01, 0.8).tolist(), low_resolution(4, 4)

    def result(seeds: list[int]) -> Tensor:
        *_, last = sample_relay(
            Ideal(Blur()), enlarged(low[seeds], 4), Conditioning(), SeedNoise(seeds), levels
        )
        return last.x

    torch.testing.assert_close(result([2, 1]), result([0, 1, 2, 3])[[2, 1]], rtol=0, atol=1e-12)


def test_refinement_after_each_step() -> None:
    levels, seen = edm_steps(3, 0.01, 0.8).tolist(), []

    def refine(
        denoiser: Denoiser, x: Tensor, sigma: float, cond: Conditioning, noise: NoiseSource
    ) -> Tensor:
        seen.append(sigma)
        return x + 1

    for sample, start in (
        (sample_relay, enlarged(low_resolution(2, 4), 4)),
        (sample_edm, None),
    ):
        seen.clear()
        latents = torch.zeros(2, 1, 8, 12) if start is None else start
        arguments: tuple[Any, ...] = (Ideal(Blur()), latents, Conditioning(), SeedNoise([0, 1]))
        *_, last = sample(*arguments, levels, refine=refine)
        assert seen == [*levels[1:], 0.0]
        torch.testing.assert_close(last.x, last.denoised + 1, rtol=0, atol=1e-2)


@pytest.mark.parametrize(("solver", "draws", "calls"), [("heun", 10, 11), ("euler", 5, 6)])
def test_first_stage_with_new_noise(solver: Any, draws: int, calls: int) -> None:
    denoiser, noise = Ideal(Blur(blur_sigma_max=0)), CountedNoise(range(2))
    levels, latents = edm_steps(6).tolist(), SeedNoise(range(2)).normal((1, 8, 12))
    *_, last = sample_edm(
        denoiser, latents, Conditioning(), noise, levels, solver=solver, sde_scale=0.05
    )
    assert (noise.draws, denoiser.calls) == (draws, calls)
    plain = CountedNoise(range(2))
    *_, ours = sample_edm(denoiser, latents, Conditioning(), plain, levels, solver=solver)
    assert plain.draws == 0
    assert not torch.allclose(last.x, ours.x)
    # The noise of a step can serve its correction, too.
    *_, reused = sample_edm(
        denoiser, latents, Conditioning(), plain, levels, solver=solver, sde_scale=0.05,
        reuse_noise=True,
    )  # fmt: skip
    assert plain.draws == 5
    assert not torch.allclose(reused.x, ours.x)


def test_levels_below_the_start() -> None:
    denoiser = Ideal(Blur())
    levels = relay_levels(denoiser, steps=20)
    assert levels == [s for s in edm_steps(20, 0.008).tolist() if s < 0.9]
    assert levels[-1] == pytest.approx(0.008)
    denoiser.sigma_min, denoiser.sigma_max = 0.05, 0.7
    levels = relay_levels(denoiser, steps=5)
    assert (levels[0], levels[-1]) == (pytest.approx(0.7), pytest.approx(0.05))
    for options in ({"steps": 1}, {"steps": 20, "sigma_start": 0.001}):
        with pytest.raises(TesseraError, match="sigma_start"):
            relay_levels(Ideal(Blur()), **options)


@pytest.mark.parametrize(
    ("options", "side", "word"),
    [({"s_noise": 1.5}, 12, "s_noise"), ({}, 10, "8x10"), ({"s_block": 0.0}, 10, "8x10")],
)
def test_errors_say_what_is_wrong(options: dict[str, Any], side: int, word: str) -> None:
    class Zero(Denoiser):
        def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
            return Posterior(torch.zeros_like(z))

    with pytest.raises(TesseraError, match=word):
        list(
            sample_relay(
                Zero(), torch.zeros(1, 1, 8, side), Conditioning(), SeedNoise([0]), [0.5, 0.1],
                **options,
            )
        )  # fmt: skip
    with pytest.raises(TesseraError, match="sde_scale"):
        list(
            sample_edm(
                Zero(), torch.zeros(1, 1, 8, 8), Conditioning(), SeedNoise([0]), [0.5],
                sde_scale=-math.inf,
            )
        )  # fmt: skip

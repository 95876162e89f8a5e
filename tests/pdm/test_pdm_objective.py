"""The discrete objective: recorded losses, choice of steps, experts, the variational bound."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_cases import RecordedDraws, case, load
from test_pdm_discrete import Constant, preconditioning
from test_pdm_sampling import recorded_denoiser

from tessera.conditioning import Conditioning
from tessera.diffusion.discrete import Discrete, DiscreteDenoiser, Process
from tessera.diffusion.discrete_objective import DiscreteObjective, LossHistory, owned
from tessera.diffusion.experts import sigma_range
from tessera.diffusion.objectives import EVERYWHERE, EdmObjective, VeObjective, VpObjective
from tessera.diffusion.preconditioning import Edm, Iddpm, Preconditioned
from tessera.diffusion.variational import Bound
from tessera.errors import TesseraError
from tessera.metrics.likelihood import bits_per_dimension
from tessera.randomness import AddressedDraws

ENTRIES = case("pdm", "diffusion_terms")["config"]["entries"]


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if e["kind"] == "loss"], ids=lambda entry: entry["name"]
)
def test_recorded_losses(entry: dict[str, Any]) -> None:
    golden, options = load("pdm", "diffusion_terms"), entry["diffusion"]
    output = golden["in.model_out"] if options["learn_sigma"] else golden["in.model_out"][:, :3]
    own = preconditioning(options)
    denoiser = DiscreteDenoiser(Constant(output), own, (3, 4, 4))
    objective = DiscreteObjective(
        len(own.process),
        weight=options.get("weight_schedule", "sqrt_snr"),
        loss="rescaled_kl" if options.get("use_kl") else "mse",
        rescale_variance=options.get("rescale_learned_sigmas", False),
    )
    draws = RecordedDraws(
        {"timestep": golden[f"in.t.{entry['t']}"], "noise": golden["in.noise"],
         "label_dropout": torch.ones(5)}
    )  # fmt: skip
    terms = objective(denoiser, golden["in.x_start"], Conditioning(), draws)
    recorded = {n: v for n, v in golden.items() if n.startswith(f"out.{entry['name']}.")}
    assert recorded
    for name, expected in recorded.items():
        found = terms[name.rpartition(".")[2]]
        atol = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol, msg=name)


def test_recorded_bound() -> None:
    golden = load("pdm", "diffusion_terms")
    own = Discrete()
    denoiser = DiscreteDenoiser(Constant(golden["in.model_out"]), own, (3, 4, 4))
    t, x = golden["in.t.full"], golden["in.x_start"]
    sigma = own.process.sigmas[t]
    z = x + sigma.float()[:, None, None, None] * golden["in.noise"]
    posterior = denoiser(z, sigma, Conditioning())
    bound = Bound(own.process, torch.device("cpu"))
    terms = bound.terms(t, x, posterior.mean.clamp(-1, 1), posterior.log_variance)
    torch.testing.assert_close(terms, golden["out.vb.xstart.sigma.clip1.vb"], rtol=1e-4, atol=1e-4)


def test_recorded_bits_per_dimension() -> None:
    name = "loops_cond_p2"
    golden = load("pdm", name)
    run = next(r for r in case("pdm", name)["config"]["runs"] if r["sampler"] == "bpd")
    denoiser = recorded_denoiser(name, run)
    noises = iter(golden["in.noises.n8"])
    found = bits_per_dimension(
        denoiser, golden["in.x_start"], Conditioning(golden["in.y"]), lambda _: next(noises),
        steps="8",
    )  # fmt: skip
    for key, value in {
        "vb": found.vb.flip(1), "mse": found.noise_mse.flip(1), "xstart_mse": found.mse.flip(1),
        "prior_bpd": found.prior, "total_bpd": found.total,
    }.items():  # fmt: skip
        expected = golden[f"out.bpd8.{key}"]
        atol = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(value.float(), expected, rtol=1e-3, atol=atol, msg=key)


def test_recorded_choice_by_past_losses() -> None:
    golden = load("pdm", "schedules")
    index, losses = golden["in.lsm_t"], golden["in.lsm_loss"]
    one_by_one, at_once = (LossHistory(6).double() for _ in range(2))
    for t, loss in zip(index, losses, strict=True):
        one_by_one.update(t[None], loss[None])
    at_once.update(index[:40], losses[:40])
    at_once.update(index[40:], losses[40:])
    expected = golden["out.lsm_weights"] / golden["out.lsm_weights"].sum()
    for history in (one_by_one, at_once):
        found = history.probabilities()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            1 / (6 * found), golden["out.lsm_loss_scale"], rtol=1e-12, atol=0
        )


def test_history_begins_uniform_and_passes_over_what_is_not_finite() -> None:
    history = LossHistory(3, length=2)
    history.update(torch.tensor([0, 1, 0, 1, 2, 2]), torch.tensor([1.0, 1, 1, 1, 5, math.nan]))
    assert torch.equal(history.probabilities(), torch.full([3], 1 / 3))
    history.update(torch.tensor([2]), torch.tensor([5.0]))
    assert history.probabilities().argmax() == 2
    assert history.probabilities().sum() == pytest.approx(1)


def tiny(schedule: str = "linear", steps: int = 100) -> DiscreteDenoiser:
    output = torch.rand(64, 6, 4, 4)
    return DiscreteDenoiser(Constant(output), Discrete(schedule, steps), (3, 4, 4), 10)


def test_steps_by_past_losses_are_drawn_in_proportion() -> None:
    denoiser = tiny(steps=30)
    objective = DiscreteObjective(30, timesteps="loss_second_moment", sigma_range=(0.5, math.inf))
    assert objective.history is not None
    first, count = owned(denoiser.levels, (0.5, math.inf))
    assert first + count == 30
    objective.history.losses[:30] = torch.arange(1, 31)[:, None].float()
    objective.history.counts.fill_(10)
    p = objective.history.probabilities()[first:]
    draws = AddressedDraws(0, torch.arange(20_000))
    index, importance = objective._draw(objective._tables_for(denoiser, draws.images.device), draws)
    share = torch.bincount(index - first, minlength=count) / 20_000
    torch.testing.assert_close(share, p / p.sum(), rtol=0.2, atol=2e-3)
    assert importance.mean() == pytest.approx(1, abs=0.02)
    before = objective.history.counts.sum()
    terms = objective(denoiser, torch.zeros(64, 3, 4, 4), Conditioning(),
                      AddressedDraws(0, torch.arange(64)))  # fmt: skip
    assert terms["loss"].isfinite().all()
    assert objective.history.counts.sum() == before + 64
    assert set(objective.state_dict()) == {"history.losses", "history.counts"}


def test_experts_see_their_own_levels_only() -> None:
    draws = AddressedDraws(0, torch.arange(4000))
    process = Process.named("linear")
    thresholds = (4.0, 0.25)
    for expert, count in enumerate((145, 251, 604)):
        interval = sigma_range(thresholds, expert)
        assert owned(process.sigmas, interval)[1] == count
        for objective in (
            EdmObjective(sigma_range=interval),
            VpObjective(sigma_range=interval),
            VeObjective(sigma_range=interval),
        ):
            sigma = objective.sigma(draws)
            assert sigma.min() >= interval[0] * (1 - 1e-5)
            assert sigma.max() <= interval[1] * (1 + 1e-5)
            # All of the interval is drawn from, as often as without experts.
            whole = type(objective)().sigma(AddressedDraws(0, torch.arange(40_000)))
            own = whole[(whole >= interval[0]) & (whole < interval[1])]
            assert sigma.log().median() == pytest.approx(float(own.log().median()), abs=0.15)
    with pytest.raises(TesseraError, match="draws none"):
        VeObjective(sigma_range=(200.0, 300.0)).sigma(draws)
    with pytest.raises(TesseraError, match="none of them"):
        owned(process.sigmas, (1e6, math.inf))
    with pytest.raises(TesseraError, match="no expert 3"):
        sigma_range(thresholds, 3)
    with pytest.raises(TesseraError, match="fall"):
        sigma_range((0.25, 4.0), 0)


@pytest.mark.parametrize("interval", [EVERYWHERE, (2.0, math.inf)])
def test_quartiles_are_those_of_the_steps_drawn(interval: tuple[float, float]) -> None:
    denoiser, objective = tiny(), DiscreteObjective(100, sigma_range=interval)
    _, count = owned(denoiser.levels, interval)
    drawn = torch.arange(64) * 7 % count  # from the first of its steps
    numbers = {"timestep": drawn, "noise": torch.zeros(64, 3, 4, 4)}
    draws = RecordedDraws({**numbers, "label_dropout": torch.ones(64)})
    terms = objective(denoiser, torch.zeros(64, 3, 4, 4), Conditioning(), draws)
    # The release logs floor(4 t / T), and knows whole processes only.
    assert torch.equal(terms["quartile"], (4 * drawn / count).floor().long())
    assert terms["quartile"].unique().tolist() == [0, 1, 2, 3]


def test_labels_are_dropped_one_time_in_ten() -> None:
    seen: list[torch.Tensor] = []

    class Watching(Constant):
        def forward(self, x, noise, cond):  # type: ignore[no-untyped-def]
            seen.append(cond.labels)
            return x.repeat(1, 2, 1, 1)

    denoiser = DiscreteDenoiser(Watching(torch.zeros(1)), Discrete(), (3, 2, 2), 5)
    cond = Conditioning(torch.zeros(5000, dtype=torch.int64))
    draws = AddressedDraws(0, torch.arange(5000))
    DiscreteObjective(1000)(denoiser, torch.zeros(5000, 3, 2, 2), cond, draws)
    assert (seen[0] < 0).float().mean() == pytest.approx(0.1, abs=0.02)


def test_other_denoisers_with_tables_and_those_without() -> None:
    network = Constant(torch.rand(4, 6, 4, 4))
    draws, x = AddressedDraws(0, torch.arange(4)), torch.zeros(4, 3, 4, 4)
    iddpm = Preconditioned(network, Iddpm(), (3, 4, 4))
    terms = DiscreteObjective(1000)(iddpm, x, Conditioning(), draws)
    assert "vb" not in terms
    assert terms["loss"].isfinite().all()
    with pytest.raises(TesseraError, match="discrete"):
        DiscreteObjective(1000)(Preconditioned(network, Edm(), (3, 4, 4)), x, Conditioning(), draws)

"""Energies against the released code: outputs, second-order gradients, losses, descent, samples."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from energy_case import column, conditioning, levels, own_names, recorded, recorded_network
from golden_cases import GOLDEN, RecordedDraws, RecordedSteps, case, load
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser, Posterior
from tessera.diffusion.discrete import Process
from tessera.diffusion.discrete_objective import DiscreteObjective
from tessera.diffusion.energy import (
    adaptive_steps,
    descend,
    energy,
    landscape,
)
from tessera.diffusion.energy_objective import contrastive, refinement_energies, refinement_loss
from tessera.diffusion.guidance import Guided
from tessera.networks.dit import DiT, EnergyDiT
from tessera.sampling.core import NoiseSource
from tessera.sampling.ddpm import sample_ddpm
from tessera.sampling.levels import process_levels
from tessera.sampling.mcmc import Refinement

PLAIN = ["dit_plain_p1", "dit_plain_p2_sigma"]
ENERGY = ["energy_mean_pool", "energy_linear_then_mean_mult"]
ATTENTION = ["recompute", "explicit", "math"]


def assert_near(actual: Tensor, expected: Tensor, atol: float, rtol: float) -> None:
    torch.testing.assert_close(actual.to(expected.dtype), expected, atol=atol, rtol=rtol)


def assert_gradients(
    network: nn.Module, golden: dict[str, Tensor], atol: float = 2e-5, rtol: float = 2e-3
) -> None:
    """Every recorded gradient, and no parameter that learns without one."""
    recorded = {k.removeprefix("grad."): v for k, v in golden.items() if k.startswith("grad.")}
    if isinstance(network, EnergyDiT):
        recorded = {k: v for k, v in recorded.items() if "final_layer" not in k}
    expected = own_names(recorded)
    # No difference and no gradient of an energy depends on its constant, which we do not train.
    constant = expected.pop("energy_layer.energy_head.2.bias", torch.zeros(1))
    assert constant.abs().max() < 1e-6
    found = {n: p.grad for n, p in network.named_parameters()}
    learning = {n for n, p in network.named_parameters() if p.requires_grad}
    assert expected.keys() <= learning
    if isinstance(network, EnergyDiT):
        assert expected.keys() == learning
    for name, value in expected.items():
        gradient = found[name]
        assert gradient is not None, name
        assert_near(gradient, value, atol, rtol)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_transformer(name: str) -> None:
    network, golden, c = recorded_network(name)
    assert isinstance(network, DiT)
    cond = conditioning(golden, c["num_classes"])
    noise = golden["in.t"].float()

    def released(x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        """Released networks put out v of the variance in [-1, 1], ours its place in [0, 1]."""
        image, *place = network(x, noise, cond).split(network.channels, dim=1)
        return torch.cat([image, *(1 - 2 * p for p in place)], dim=1)

    assert_near(network.t_embedder(noise), golden["out.t_emb"], 2e-5, 1e-4)
    output = released(golden["in.x"], noise, cond)
    assert_near(output, golden["out.eps"], 2e-5, 1e-4)
    output.square().mean().backward()
    assert_gradients(network, golden)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("channels", [None, 3])
def test_guidance(name: str, channels: int | None) -> None:
    network, golden, c = recorded_network(name)
    half = len(golden["in.cfg_x"]) // 2
    x, noise = golden["in.cfg_x"][:half], golden["in.cfg_t"][:half].float()
    cond = Conditioning(labels=golden["in.cfg_y"][:half])

    class Plain(Denoiser):
        """The network as it is, so that its outputs are guided."""

        shape, num_classes = (x.shape[1], *x.shape[2:]), c["num_classes"]

        def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Any:
            return Posterior(network(z, sigma, cond)[:, : z.shape[1]])

    guided = Guided(Plain(), 2.5, channels=channels)(x, noise, cond).mean
    expected = golden["out.cfg_all_channels" if channels is None else "out.cfg3_released"]
    assert_near(guided, expected[:half, : x.shape[1]], 5e-5, 2e-4)


@pytest.mark.parametrize("name", ENERGY)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("recompute", [False, True])
def test_energy_gradient_and_every_second_order_gradient(
    name: str, attention: str, recompute: bool
) -> None:
    network, golden, _ = recorded_network(name, attention=attention, recompute=recompute)
    arguments = golden["in.x"], golden["in.t"].float(), conditioning(golden)
    with torch.no_grad():
        assert_near(network.energy(*arguments), golden["out.energy"][:, 0], 1e-5, 1e-5)
        value, output = network.energy_and_output(*arguments)
        assert_near(value, golden["out.energy"][:, 0], 1e-5, 1e-5)
        assert_near(output, golden["out.eps"], 1e-5, 1e-4)
    loss = (golden["in.target"] - network(*arguments)).square().mean(dim=(1, 2, 3))
    assert_near(loss, golden["out.loss_per_sample"], 1e-5, 1e-5)
    loss.mean().backward()
    assert_gradients(network, golden)


@pytest.mark.parametrize("name", ["lin40_s4", "lin500_s250", "lin1000_s7"])
def test_tables(name: str) -> None:
    c = case("energy", "diffusion_tables")["config"][name]
    golden = {
        k.removeprefix(f"{name}."): v
        for k, v in load("energy", "diffusion_tables").items()
        if k.startswith(f"{name}.")
    }
    process = Process.named("linear", c["base_steps"], c["respacing"])
    close = {"atol": 1e-14, "rtol": 1e-12}
    torch.testing.assert_close(process.alpha_bar, golden["alphas_cumprod"], **close)
    torch.testing.assert_close(process.betas, golden["betas"], **close)
    torch.testing.assert_close(process.posterior_variance, golden["posterior_variance"], **close)
    torch.testing.assert_close(
        process.posterior_log_variance, golden["posterior_log_variance_clipped"], **close
    )
    for index, coefficient in enumerate(process.mean_coefficients, start=1):
        torch.testing.assert_close(coefficient, golden[f"posterior_mean_coef{index}"], **close)


def objective(denoiser: Denoiser, **options: Any) -> DiscreteObjective:
    assert denoiser.levels is not None
    settings = {"weight": "snr", "label_dropout": 0.0} | options
    return DiscreteObjective(len(denoiser.levels), **settings)


@pytest.mark.parametrize("name", ["train_loss_plain", "train_loss_energy"])
def test_training_loss(name: str) -> None:
    denoiser, golden = recorded(name)
    numbers = {"timestep": golden["in.t"], "noise": golden["in.noise"]}
    draws, cond = RecordedDraws(numbers), conditioning(golden)
    sigma = levels(denoiser, golden["in.t"])
    z = golden["in.x"] + column(sigma) * golden["in.noise"]
    assert_near(z / column((1 + sigma**2).sqrt()), golden["out.x_t"], 1e-6, 1e-5)
    loss = objective(denoiser)(denoiser, golden["in.x"], cond, draws)["loss"]
    # x̂ - x is σ times the error of the noise, which costs digits where σ is small.
    assert_near(loss, golden["out.loss_per_sample"], 1e-5, 5e-5)
    loss.mean().backward()
    assert_gradients(denoiser.network, golden)


def test_label_dropout() -> None:
    denoiser, golden = recorded("train_label_drop")
    numbers = {
        "timestep": golden["in.t"],
        "noise": golden["in.noise"],
        "label_dropout": golden["in.drop_uniform"],
    }
    loss = objective(denoiser, label_dropout=0.1)(
        denoiser, golden["in.x"], Conditioning(labels=golden["in.y"]), RecordedDraws(numbers)
    )["loss"]
    assert_near(loss.mean(), golden["out.total_loss"], 1e-5, 2e-5)


def descent(name: str, step_size: float, **options: Any) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """(where it ended, √ᾱ, tensors) of the recorded descents."""
    denoiser, golden = recorded(name)
    sigma = levels(denoiser, golden["in.t"])
    scale = column((1 + sigma**2).sqrt())
    settings: dict[str, Any] = {"steps": 4, "clamp": "clean"} | options
    with torch.no_grad():
        path = descend(
            denoiser,
            golden["in.x"] * scale,
            sigma,
            conditioning(golden),
            step_size=step_size,
            **settings,
        )
    return path, scale, golden


@pytest.mark.parametrize("size", ["small", "large"])
def test_descent_with_rejection(size: str) -> None:
    facts = case("energy", "opt_step")["facts"]
    alpha = facts[f"{size}.alpha"]
    path, scale, golden = descent("opt_step", alpha)
    assert_near(path.z / scale, golden[f"out.{size}.reject"], 5e-5, 2e-4)
    assert_near(path.energies[0], golden[f"out.{size}.energy_before"][:, 0], 1e-5, 1e-4)
    assert_near(path.energies[-1], golden[f"out.{size}.energy_after_reject"][:, 0], 1e-4, 1e-4)
    # A step that the bound undoes is a tie, which rounding decides.
    assert abs(int(path.accepted.sum()) - facts[f"{size}.accepted"]) <= 2
    free, *_ = descent("opt_step", alpha, clamp="none")
    assert_near(free.z / scale, golden[f"out.{size}.reject_noclamp"], 5e-5, 2e-4)
    assert int(free.accepted.sum()) == facts[f"{size}.noclamp_accepted"]
    early, *_ = descent("opt_step", alpha, stop_early=True)
    torch.testing.assert_close(early.z, path.z)


@pytest.mark.parametrize("size", ["small", "large"])
def test_descent_without_rejection(size: str) -> None:
    alpha = case("energy", "opt_step")["facts"][f"{size}.alpha"]
    path, scale, golden = descent("opt_step", alpha, reject=False)
    assert_near(path.z / scale, golden[f"out.{size}.always"], 5e-5, 2e-4)
    assert_near(path.energies, golden[f"out.{size}.always_energies"][..., 0], 5e-5, 2e-4)


def test_ascent() -> None:
    path, scale, golden = descent("opt_step", -0.05, reject=False)
    assert_near(path.z / scale, golden["out.ascent"], 5e-5, 2e-4)
    assert_near(path.energies, golden["out.ascent_energies"][..., 0], 5e-5, 2e-4)
    assert (path.energies[-1] > path.energies[0]).all()


def test_numbers_of_steps() -> None:
    denoiser, _ = recorded("opt_step")
    facts = case("energy", "opt_step")["facts"]
    for row in facts["adaptive_steps"]:
        time = denoiser.time(levels(denoiser, torch.tensor([row["t"]])))
        assert adaptive_steps(time, 2 if row["keep_grad"] else 5).tolist() == [row["steps"]]
    row = facts["adaptive_steps_batch"]
    time = denoiser.time(levels(denoiser, torch.tensor(row["t"]))).mean()
    assert int(adaptive_steps(time, 5)) == row["steps"]


@pytest.mark.parametrize("name", ["sample_plain", "sample_energy_no_inner"])
def test_ancestral_sampling(name: str) -> None:
    denoiser, golden = recorded(name)
    for clip, start in (("static", 5), ("none", case("energy", name)["start_index_noclip"])):
        states = sample(denoiser, golden, start, clip, None)
        expected = golden["out.traj_clip" if clip == "static" else "out.traj_noclip"]
        assert_near(states, expected, 5e-5, 2e-4)


def sample(
    denoiser: Denoiser, golden: dict[str, Tensor], start: int, clip: Any, refine: Any
) -> Tensor:
    """x_t after each step of ancestral sampling from respaced index `start`."""
    visited = process_levels(denoiser, steps="6")[5 - start :]
    states = sample_ddpm(
        denoiser,
        golden["in.x_T"],
        conditioning(golden),
        RecordedSteps(golden["in.draws"].double()),
        visited,
        variance="small",
        clip=clip,
        refine=refine,
    )
    return torch.stack([s.x / (1 + s.sigma**2) ** 0.5 for s in states])


def test_refinement_at_the_level_of_the_state() -> None:
    denoiser, golden = recorded("sample_energy_inner")
    about = case("energy", "sample_energy_inner")
    refine = Refinement(step_size=0.5)
    states = sample(denoiser, golden, about["start_index_noclip"], "none", refine)
    assert_near(states, golden["out.traj_consistent"], 1e-4, 5e-4)
    counts = about["accept_counts_per_sampling_step"]["consistent"]
    assert refine.tally.tried == sum(tried for _, tried in counts)
    assert refine.tally.rate == sum(accepted for accepted, _ in counts) / refine.tally.tried


def test_refinement_at_the_level_of_the_step() -> None:
    """As released, but told the timestep of the step and not its number."""
    denoiser, golden = recorded("sample_energy_inner")
    about = case("energy", "sample_energy_inner")
    refine = Refinement(step_size=0.5, clamp="clean", level="step")
    states = sample(denoiser, golden, about["start_index_noclip"], "none", refine)
    assert_near(states, golden["out.traj_mapped_noclip"], 1e-4, 5e-4)
    counts = about["accept_counts_per_sampling_step"]["mapped"]
    assert refine.tally.tried == sum(tried for _, tried in counts)
    assert refine.tally.rate == 0


def test_refinement_as_released() -> None:
    """The defect of the released code, made of our parts: it takes a step's number for its time."""
    denoiser, golden = recorded("sample_energy_inner")
    number = iter(range(5, -1, -1))

    def refine(
        model: Denoiser, x: Tensor, sigma: float, cond: Conditioning, noise: NoiseSource
    ) -> Tensor:
        level = levels(denoiser, torch.tensor([next(number)]).expand(len(x)))
        factor = column((1 + level**2).sqrt()) / (1 + sigma**2) ** 0.5
        steps = int(adaptive_steps(denoiser.time(level)[0], 5))
        return (
            descend(denoiser, x * factor, level, cond, step_size=0.5, steps=steps, clamp="clean").z
            / factor
        )

    states = sample(denoiser, golden, 5, "static", refine)
    assert_near(states, golden["out.traj_released"], 1e-4, 5e-4)


def test_contrastive_term() -> None:
    denoiser, golden = recorded("contrastive_fixed_alpha")
    sigma, cond = levels(denoiser, golden["in.t"]), conditioning(golden)
    scale, noise = column((1 + sigma**2).sqrt()), golden["in.noise"]
    facts = case("energy", "contrastive_fixed_alpha")["facts"]
    options: dict[str, Any] = {"step_size": facts["alpha_used"], "steps": facts["steps"]}
    start = golden["in.x"] + 3 * golden["in.perturb"] + column(sigma) * noise
    assert_near(start / scale, golden["out.neg_start"], 2e-5, 1e-4)
    with torch.no_grad():
        end = descend(denoiser, start, sigma, cond, clamp="clean", **options).z
    assert_near(end / scale, golden["out.neg_opt"], 5e-5, 2e-4)
    loss = contrastive(
        denoiser,
        golden["in.x"],
        cond,
        sigma.float(),
        noise,
        golden["in.perturb"],
        clamp="clean",
        **options,
    )
    assert_near(loss, golden["out.loss_per_sample"], 2e-5, 2e-4)
    loss.mean().backward()
    assert_gradients(denoiser.network, golden, 5e-5, 5e-3)


def released_refinement(energies: Tensor, sign: float) -> Tensor:
    """The released formula, of the whole batch, and with its sign or the right one."""
    drops = energies[:-1] - energies[1:]
    return torch.sigmoid((-drops.sum() + sign * 0.1 * drops.var()) / len(energies))


@pytest.mark.parametrize("name", ["refinement_always_accept", "refinement_reject_active"])
def test_gradients_through_a_descent(name: str) -> None:
    denoiser, golden = recorded(name)
    network = denoiser.network
    assert isinstance(network, EnergyDiT)
    sigma, cond = levels(denoiser, golden["in.t"]).float(), conditioning(golden)
    z = golden["in.x"] + column(sigma) * golden["in.noise"]
    path = descend(
        denoiser,
        z,
        sigma,
        cond,
        step_size=network.step_size,
        steps=case("energy", name)["facts"]["steps"],
        clamp="clean",
        reject=name.endswith("active"),
    )
    energies = path.energies[: len(golden["out.energies"])]
    assert_near(energies, golden["out.energies"][..., 0], 2e-5, 2e-4)
    end = path.z / column((1 + sigma**2).sqrt())
    assert_near(end, golden["out.x_refined"], 5e-5, 2e-4)
    assert_near(released_refinement(energies, 1), golden["out.loss_intended"], 2e-5, 2e-4)
    loss = released_refinement(energies, -1)
    assert_near(loss, golden["out.loss_released"], 2e-5, 2e-4)
    loss.backward()
    assert_gradients(network, golden, 5e-5, 5e-3)


def test_refinement_loss_is_the_intended_one_of_each_image() -> None:
    golden = load("energy", "refinement_always_accept")
    energies = golden["out.energies"][:, :1, 0]
    expected = released_refinement(energies, 1)
    # The released formula divides by the number of energies, not of drops.
    logit = torch.logit(expected) * len(energies) / (len(energies) - 1)
    assert_near(refinement_loss(energies), torch.sigmoid(logit)[None], 1e-6, 1e-5)


def test_all_terms_together() -> None:
    denoiser, golden = recorded("total_loss_all_terms")
    network = denoiser.network
    assert isinstance(network, EnergyDiT)
    x, cond = golden["in.x"], conditioning(golden)
    sigma = levels(denoiser, golden["in.t"]).float()
    numbers = {"timestep": golden["in.t"], "noise": golden["in.mse_noise"]}
    mse = objective(denoiser)(denoiser, x, cond, RecordedDraws(numbers))["loss"].mean()
    mean_time = denoiser.time(sigma).mean()
    energy_loss = contrastive(
        denoiser,
        x,
        cond,
        sigma,
        golden["in.contrastive_noise"],
        golden["in.contrastive_perturb"],
        step_size=network.step_size.detach(),
        steps=int(adaptive_steps(mean_time, 5)),
        clamp="clean",
    ).mean()
    steps = int(adaptive_steps(mean_time, 2))
    z = x + column(sigma) * golden["in.refine_noise"]
    path = refinement_energies(
        denoiser, z, sigma, cond, step_size=network.step_size, steps=steps, clamp="clean"
    )
    refinement = released_refinement(path[:steps], -1)
    assert_near(mse, golden["out.mse_loss"], 2e-5, 2e-4)
    assert_near(energy_loss, golden["out.energy_loss"], 2e-5, 2e-4)
    assert_near(refinement, golden["out.opt_refinement_loss"], 2e-5, 2e-4)
    total = mse + 0.05 * energy_loss + 0.1 * refinement
    assert_near(total, golden["out.total_loss"], 2e-5, 2e-4)
    total.backward()
    assert_gradients(network, golden, 5e-5, 5e-3)


def test_the_gradient_of_a_denoisers_energy_is_its_noise() -> None:
    """In one evaluation or two, guided or not."""
    denoiser, golden = recorded("opt_step")
    sigma, cond = levels(denoiser, golden["in.t"]), conditioning(golden)
    z = golden["in.x"].double() * column((1 + sigma**2).sqrt())
    for model in (denoiser, Guided(denoiser, 2.5)):
        here = landscape(model, z, sigma, cond)
        torch.testing.assert_close(here.energy, energy(model, z, sigma, cond))
        mean = model(z, sigma, cond).mean
        assert_near(here.noise, (z - mean) / column(sigma), 1e-5, 1e-4)


def test_parameters_that_decay() -> None:
    """Those of two axes or more, as in the trainer's optimiser, and so not the step size."""
    network, *_ = recorded_network("total_loss_all_terms")
    document = json.loads((GOLDEN / "energy" / "cases.json").read_text(encoding="utf-8"))
    groups = document["weight_decay_groups"]
    decayed = own_names({name: torch.empty(0) for name in groups["decay"]})
    assert decayed.keys() == {n for n, p in network.named_parameters() if p.ndim >= 2}

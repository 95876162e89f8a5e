"""Objectives against the released code: losses and gradients."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from golden_cases import (
    RecordedDraws,
    case,
    load,
    recorded_conditioning,
    recorded_network,
    relative_error,
    weights,
)
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.corruption import GaussianCorruption
from tessera.diffusion.denoiser import Denoiser, Posterior
from tessera.diffusion.objectives import (
    EVERYWHERE,
    DenoisingObjective,
    EdmObjective,
    VeObjective,
    VpObjective,
)
from tessera.diffusion.preconditioning import Edm, Preconditioned, Preconditioning, Ve, Vp
from tessera.randomness import AddressedDraws

OBJECTIVES: dict[str, tuple[DenoisingObjective, Preconditioning]] = {
    "edm": (EdmObjective(), Edm()),
    "vp": (VpObjective(), Vp()),
    "ve": (VeObjective(), Ve()),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_losses_and_gradients(kind: str) -> None:
    golden, order = load("edm", "losses"), case("edm", "losses")["parameter_order"]
    network = recorded_network(case("edm", "net_ddpmpp")["config"]).eval()
    network.load_state_dict(weights(load("edm", "net_ddpmpp")))
    objective, preconditioning = OBJECTIVES[kind]
    denoiser = Preconditioned(network, preconditioning, (3, 16, 16), num_classes=3)
    draws = RecordedDraws({"sigma": golden[f"in.{kind}.rnd"], "noise": golden[f"in.{kind}.noise"]})
    arguments = (denoiser, golden["in.images"], recorded_conditioning(golden), draws)

    expected = golden[f"out.{kind}.loss"]
    found = objective.elementwise(*arguments, objective.sigma(draws))
    assert relative_error(found, expected) <= 1e-4
    terms = objective(*arguments)
    assert terms.keys() == {"loss", "quartile"}
    assert relative_error(terms["loss"].detach(), expected.sum(dim=(1, 2, 3))) <= 1e-4

    terms["loss"].mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    assert list(gradients) == order
    for name, recorded in weights(golden, f"out.{kind}.grad.").items():
        gradient = gradients[name]
        assert gradient is not None
        assert relative_error(gradient, recorded) <= 1e-3, name
    for name, norm in zip(order, golden[f"out.{kind}.gradnorm"].tolist(), strict=True):
        gradient = gradients[name]
        if norm < 0:
            assert gradient is None, name
        else:
            assert gradient is not None
            assert gradient.norm().item() == pytest.approx(norm, rel=1e-3), name


class Recorder(Denoiser):
    """Returns z and remembers what it was asked."""

    labels: Tensor | None = None

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        self.sigma, self.labels = sigma, cond.labels
        return Posterior(z)


def test_label_dropout_drops_its_share_of_labels() -> None:
    count = 4096
    draws, labels = AddressedDraws(0, torch.arange(count)), torch.arange(count) % 5
    x, denoiser = torch.zeros(count, 1, 2, 2), Recorder()
    EdmObjective(label_dropout=0.25)(denoiser, x, Conditioning(labels), draws)
    assert denoiser.labels is not None
    dropped = denoiser.labels == -1
    assert 0.22 < dropped.float().mean() < 0.28
    assert torch.equal(denoiser.labels[~dropped], labels[~dropped])
    EdmObjective()(denoiser, x, Conditioning(labels), draws)
    assert torch.equal(denoiser.labels, labels)


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("interval", [EVERYWHERE, (0.3, 2.0)])
def test_quartiles_divide_the_noise_levels_drawn(kind: str, interval: tuple[float, float]) -> None:
    objective = replace(OBJECTIVES[kind][0], sigma_range=interval)
    draws, denoiser = AddressedDraws(0, torch.arange(8000)), Recorder()
    terms = objective(denoiser, torch.zeros(8000, 1, 1, 1), Conditioning(), draws)
    levels = [denoiser.sigma[terms["quartile"] == quarter] for quarter in range(4)]
    for lower, higher in pairwise(levels):
        assert lower.max() <= higher.min()
    assert all(len(part) == pytest.approx(2000, abs=150) for part in levels)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_loss_of_the_identity_is_known(kind: str) -> None:
    """D(z) = z leaves the noise: the loss is w(σ) σ² |n|²."""
    draws, denoiser = AddressedDraws(3, torch.arange(8)), Recorder()
    objective = OBJECTIVES[kind][0]
    loss = objective(denoiser, torch.zeros(8, 3, 4, 4), Conditioning(), draws)["loss"]
    noise = draws.normal("noise", 3, 4, 4).square().sum(dim=(1, 2, 3))
    weight = objective.weight(denoiser.sigma) * denoiser.sigma**2
    assert torch.allclose(loss, weight * noise, rtol=1e-5)


def test_gaussian_corruption_scales_the_noise_of_each_image() -> None:
    draws, x = AddressedDraws(1, torch.arange(3)), torch.full((3, 1, 4, 4), 0.5)
    sigma = torch.tensor([0.0, 1.0, 50.0])
    n = (GaussianCorruption()(x, sigma, draws) - x)[:, 0]
    assert (n[0] == 0).all()
    assert torch.allclose(n, sigma[:, None, None] * draws.normal("noise", 4, 4), atol=1e-5)

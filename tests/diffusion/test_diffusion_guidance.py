"""Guidance: its formula, where it acts, and what it costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser, Posterior
from tessera.diffusion.guidance import Guided
from tessera.errors import TesseraError


class Labelled(Denoiser):
    """D = z + σ + 10 label (label -1 for none); remembers the sizes of its batches."""

    shape = (1, 2, 2)
    sigma_min, sigma_max = 0.01, 50.0

    def __init__(self, num_classes: int = 5, factor: float = 10.0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.factor = factor
        self.batches: list[int] = []

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        self.batches.append(len(z))
        labels = torch.full((len(z),), -1) if cond.labels is None else cond.labels
        extra = (sigma + self.factor * labels).reshape(-1, 1, 1, 1)
        coords = 0 if cond.coords is None else cond.coords.mean(dim=1, keepdim=True)
        return Posterior(z + extra + coords, log_variance=z * 0 + extra)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma.round()


Z = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([1.0, 2.0, 3.0])
COND = Conditioning(
    labels=torch.tensor([0, 4, -1]),
    coords=torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(1)),
)


def test_formula_in_one_doubled_batch() -> None:
    denoiser = Labelled()
    guided = Guided(denoiser, 2.5)
    result = guided(Z, SIGMA, COND)
    assert denoiser.batches == [6]
    conditional = denoiser(Z, SIGMA, COND)
    unconditional = denoiser(Z, SIGMA, replace(COND, labels=None)).mean
    expected = unconditional + 2.5 * (conditional.mean - unconditional)
    assert torch.allclose(result.mean, expected)
    assert torch.equal(result.log_variance, conditional.log_variance)
    assert COND.labels.tolist() == [0, 4, -1]


def test_interval_is_inclusive_and_saves_calls() -> None:
    denoiser = Labelled()
    guided = Guided(denoiser, 3.0, interval=(1.0, 2.0))
    for level, size in ((0.99, 3), (1.0, 6), (2.0, 6), (2.01, 3)):
        guided(Z, torch.full((3,), level), COND)
        assert denoiser.batches.pop() == size
    # Of a batch with several levels, only those inside are guided.
    mixed = guided(Z, SIGMA, COND).mean
    assert torch.allclose(mixed[:2], Guided(denoiser, 3.0)(Z, SIGMA, COND).mean[:2])
    assert torch.allclose(mixed[2:], denoiser(Z, SIGMA, COND).mean[2:])


def test_nothing_to_guide_costs_one_call() -> None:
    denoiser = Labelled()
    Guided(denoiser, 1.0)(Z, SIGMA, COND)
    Guided(denoiser, 3.0)(Z, SIGMA, replace(COND, labels=None))
    assert denoiser.batches == [3, 3]


def test_autoguidance() -> None:
    strong, weak = Labelled(0, factor=2.0), Labelled(0, factor=1.0)
    result = Guided(strong, 3.0, weak=weak)(Z, SIGMA, COND).mean
    expected = weak(Z, SIGMA, COND).mean
    expected = expected + 3.0 * (strong(Z, SIGMA, COND).mean - expected)
    assert torch.allclose(result, expected)
    assert strong.batches == [3, 3]
    assert weak.batches == [3, 3]


def test_is_a_denoiser_and_nests() -> None:
    inner = Guided(Labelled(), 2.0)
    outer = Guided(inner, 1.5)
    assert outer.shape == (1, 2, 2)
    assert (outer.num_classes, outer.sigma_min, outer.sigma_max) == (5, 0.01, 50.0)
    assert outer.round_sigma(torch.tensor(1.4)) == 1
    unconditional = Labelled()(Z, SIGMA, replace(COND, labels=None)).mean
    difference = Labelled()(Z, SIGMA, COND).mean - unconditional
    expected = unconditional + 3.0 * difference
    assert torch.allclose(outer(Z, SIGMA, COND).mean, expected, atol=1e-5)


def test_errors() -> None:
    with pytest.raises(TesseraError, match="trained with classes"):
        Guided(Labelled(0), 2.0)
    with pytest.raises(TesseraError, match="lower noise level first"):
        Guided(Labelled(), 2.0, interval=(3.0, 1.0))
    other = Labelled()
    other.shape = (3, 2, 2)
    with pytest.raises(TesseraError, match="same shape"):
        Guided(Labelled(), 2.0, weak=other)

"""What bands minimise is what whole images at all noise levels do."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.data.views import patch_coordinates
from tessera.diffusion.bands import Band, BandedObjective, crop_weights
from tessera.diffusion.denoiser import Denoiser, Posterior
from tessera.diffusion.objectives import DenoisingObjective, EdmObjective, VeObjective, VpObjective
from tessera.randomness import AddressedDraws
from tessera.recipes.build import build_view
from tessera.recipes.loading import load_recipe
from tessera.recipes.schema import EdmObjectiveConfig

SPREAD = 0.7


class Wiener(Denoiser):
    """The best denoiser of independent pixels from N(0, SPREAD²)."""

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        gain = SPREAD**2 / (SPREAD**2 + sigma**2)
        return Posterior(gain[:, None, None, None] * z)


def losses(objective: BandedObjective, band: int | None, count: int = 20_000) -> Tensor:
    images = torch.arange(count)
    x = SPREAD * AddressedDraws(5, images).normal("latent", 1, 4, 4)
    draws = AddressedDraws(0, images, 0, band)
    return objective(Wiener(), x, Conditioning(), draws)["loss"]


def expected(objective: EdmObjective, low: float, high: float) -> float:
    """E[w(σ) 16 s² σ² / (s² + σ²); low <= σ < high] by the log-normal's quantiles."""
    levels = NormalDist(objective.p_mean, objective.p_std)
    total, steps = 0.0, 4000
    for k in range(steps):
        sigma = math.exp(levels.inv_cdf((k + 0.5) / steps))
        if low <= sigma < high:
            variance, data = SPREAD**2, objective.sigma_data**2
            weight = (sigma**2 + data) / (sigma**2 * data)
            total += weight * 16 * variance * sigma**2 / (variance + sigma**2)
    return total / steps


def test_bands_of_gaussian_data_add_up_to_the_whole_loss() -> None:
    """In closed form: the probability of a band times its mean loss is its part of the whole."""
    plain = EdmObjective(p_mean=-0.6, p_std=1.1)
    cuts = [0.0, 0.3, 1.2, math.inf]
    bands = [Band(low, high) for low, high in itertools.pairwise(cuts)]
    objective = BandedObjective(plain, bands, (4, 4))
    parts = [
        share * float(losses(objective, index).mean())
        for index, share in enumerate(objective.probabilities())
    ]
    for part, band in zip(parts, bands, strict=True):
        assert part == pytest.approx(expected(plain, band.sigma_min, band.sigma_max), rel=0.02)
    assert sum(parts) == pytest.approx(float(losses(objective, None).mean()), rel=0.02)


@pytest.mark.parametrize("plain", [EdmObjective(), VpObjective(), VeObjective()])
def test_every_band_draws_its_own_levels(plain: DenoisingObjective) -> None:
    bands = [Band(0.0, 0.5), Band(0.5, math.inf)]
    objective = BandedObjective(plain, bands, (4, 4))
    low, high = objective.probabilities()
    draws = AddressedDraws(0, torch.arange(4000))
    sigma = plain.sigma(draws)
    assert low == pytest.approx(float((sigma < 0.5).float().mean()), abs=0.03)
    assert low + high == pytest.approx(1)
    x = torch.zeros(4000, 1, 2, 2)
    quartiles = [
        objective(Wiener(), x, Conditioning(), AddressedDraws(0, draws.images, 0, band))["quartile"]
        for band in (0, 1)
    ]
    assert int(quartiles[0].max()) <= int(4 * low), "quarters of all levels, not of the band's"
    assert int(quartiles[1].min()) >= int(4 * low)


def test_without_a_band_it_is_the_plain_objective() -> None:
    plain = EdmObjective(label_dropout=0.5)
    objective = BandedObjective(plain, [Band(0.0, 1.0), Band(1.0, math.inf, 2)], (4, 4))
    draws = AddressedDraws(3, torch.arange(8))
    x, cond = torch.randn(8, 1, 4, 4), Conditioning(labels=torch.arange(8))
    ours, theirs = objective(Wiener(), x, cond, draws), plain(Wiener(), x, cond, draws)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value)


@given(st.data())
def test_all_crops_together_count_every_pixel_once(data: st.DataObject) -> None:
    size = data.draw(st.integers(3, 14))
    side = data.draw(st.integers(2, size - 1))
    halo = data.draw(st.integers(0, (side - 1) // 2))
    places = range(size - side + 1)
    rows = torch.tensor([row for row in places for _ in places])
    columns = torch.tensor([column for _ in places for column in places])
    weights = crop_weights(patch_coordinates(rows, columns, side, size), halo, (size, size))
    total = torch.zeros(size, size)
    for weight, row, column in zip(weights, rows.tolist(), columns.tolist(), strict=True):
        total[row : row + side, column : column + side] += weight / len(rows)
    torch.testing.assert_close(total, torch.ones(size, size))


def test_a_halo_counts_only_at_the_edge_of_the_image() -> None:
    rows, columns = torch.tensor([0, 2]), torch.tensor([3, 6])  # the corner at the right, then not
    weights = crop_weights(patch_coordinates(rows, columns, 6, 12), 2, (12, 12)) > 0
    assert weights[0].tolist() == [[2 <= c < 4 for c in range(6)] if r < 4 else [False] * 6
                                   for r in range(6)]  # fmt: skip
    assert weights[1].tolist() == [[c >= 2 for c in range(6)] if 2 <= r < 4 else [False] * 6
                                   for r in range(6)]  # fmt: skip


def test_the_weights_of_steps_make_up_for_their_shares() -> None:
    bands = [{"below": 0.8, "share": 0.25}, {"factor": 2, "share": 0.75}]
    recipe = load_recipe("cifar10-small", ["view.kind=bands", f"view.bands={bands}"])
    assert isinstance(recipe.objective, EdmObjectiveConfig)
    view = build_view(recipe)
    below = NormalDist(recipe.objective.p_mean, recipe.objective.p_std).cdf(math.log(0.8))
    plans = [plan for plan, _ in view.shares()]
    weights = [view.loss_weight(plan) for plan in plans]
    assert weights == pytest.approx([below / 0.25, (1 - below) / 0.75], rel=1e-6)
    assert [share for _, share in view.shares()] == [0.25, 0.75]
    assert [plan.images for plan in plans] == [recipe.training.batch, 2 * recipe.training.batch]

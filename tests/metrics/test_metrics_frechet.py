"""Feature statistics and the Fréchet distance: recorded numbers and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_cases import load, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.metrics import frechet
from tessera.metrics.frechet import frechet_distance, frechet_from_moments
from tessera.metrics.statistics import FeatureStatistics


def streamed(features: torch.Tensor, size: int = 64) -> FeatureStatistics:
    statistics = FeatureStatistics.empty(features.shape[1])
    for batch in features.split(size):
        statistics.update(batch)
    return statistics


def test_moments_match_the_recorded_ones() -> None:
    recorded = load("edm", "fid")
    for number in "12":
        statistics = streamed(recorded[f"in.features{number}"])
        assert relative_error(statistics.mu, recorded[f"out.mu{number}"]) < 1e-10
        assert relative_error(statistics.sigma, recorded[f"out.sigma{number}"]) < 1e-10


def test_distance_matches_the_recorded_one() -> None:
    recorded = load("edm", "fid")
    one, two = (streamed(recorded[f"in.features{number}"]) for number in "12")
    assert frechet_distance(one, two) == pytest.approx(float(recorded["out.fid"]), rel=1e-6)
    assert abs(frechet_distance(one, one)) < 1e-6


def test_rank_deficient_distance_matches_and_warns() -> None:
    recorded = load("edm", "fid")
    few, many = (
        streamed(recorded["in.features3_rank_deficient"]),
        streamed(recorded["in.features2"]),
    )
    with pytest.warns(UserWarning, match="16 features from 8 images .* at least 17"):
        distance = frechet_distance(few, many)
    assert distance == pytest.approx(float(recorded["out.fid_rank_deficient"]), rel=1e-4)


def test_distance_of_commuting_gaussians_is_the_closed_form() -> None:
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    mu_a, mu_b = torch.randn(2, 5, dtype=torch.float64)
    std_a, std_b = torch.rand(2, 5, dtype=torch.float64) + 0.1
    sigma_a, sigma_b = (rotation @ torch.diag(s**2) @ rotation.T for s in (std_a, std_b))
    expected = float((mu_a - mu_b).square().sum() + (std_a - std_b).square().sum())
    assert frechet_from_moments(mu_a, sigma_a, mu_b, sigma_b) == pytest.approx(expected, rel=1e-9)


def test_the_product_by_blocks_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "_COLUMNS", 3)
    lower = torch.randn(8, 8, dtype=torch.float64).tril()
    sigma = torch.randn(8, 8, dtype=torch.float64)
    sigma = sigma + sigma.T
    expected = (lower.T @ sigma @ lower).tril()
    found = frechet._triangular_product(lower, sigma).tril()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_features_far_from_zero_lose_no_digits() -> None:
    features = torch.randn(300, 4, dtype=torch.float64)
    near, far = streamed(features), streamed(features + 1e6)
    assert relative_error(far.sigma, near.sigma) < 1e-8


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
)
def test_merging_any_parts_gives_the_whole(seed: int, n: int, cuts: list[int]) -> None:
    features = torch.from_numpy(np.random.default_rng(seed).normal(3, 2, (n, 3)))
    whole, merged = FeatureStatistics.of(features), FeatureStatistics.empty(3)
    for part in torch.tensor_split(features, sorted(min(cut, n) for cut in cuts)):
        merged.merge(FeatureStatistics.of(part))
    assert merged.n == n
    torch.testing.assert_close(merged.mu, whole.mu, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.sigma, whole.sigma, rtol=1e-11, atol=1e-11)


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        _ = FeatureStatistics.of(torch.zeros(1, 3)).sigma

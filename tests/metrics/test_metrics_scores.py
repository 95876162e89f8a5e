"""FID, sFID, IS, KID, precision and recall of recorded features, against four tools' numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import load
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_metrics_inception import recorded
from torch import Tensor

from tessera.errors import DataError
from tessera.metrics import manifold
from tessera.metrics.frechet import frechet_distance, frechet_from_moments
from tessera.metrics.inception_score import SplitScore, consecutive_splits, equal_splits
from tessera.metrics.kid import kernel_distance, subsets
from tessera.metrics.manifold import precision_recall
from tessera.metrics.statistics import FeatureStatistics

pytestmark = pytest.mark.filterwarnings("ignore:a covariance of:UserWarning")
TENSORS = load("metrics", "features")
SAMPLE, REFERENCE = TENSORS["in.sample"], TENSORS["in.ref"]


def expected(tool: str) -> dict[str, float]:
    numbers: dict[str, float] = recorded(f"features_{tool}")["expected"]
    return numbers


def distance(one: Tensor, two: Tensor) -> float:
    return frechet_distance(FeatureStatistics.of(one), FeatureStatistics.of(two))


@pytest.mark.parametrize(
    ("tool", "full", "small"),
    [("rdm", 1e-7, 1e-6), ("adm", 1e-6, 1e-6), ("torch_fidelity", 1e-6, 1e-6)],
)
def test_frechet_distances(tool: str, full: float, small: float) -> None:
    numbers = expected(tool)
    assert distance(SAMPLE, REFERENCE) == pytest.approx(numbers["fid"], rel=full)
    few = distance(TENSORS["in.small_sample"], TENSORS["in.small_ref"])
    assert few == pytest.approx(numbers["fid_small"], rel=small)
    if "sfid" in numbers:
        spatial = [TENSORS[f"in.{side}_spatial"].flatten(1) for side in ("sample", "ref")]
        assert distance(*spatial) == pytest.approx(numbers["sfid"], rel=max(full, 1e-6))


def test_moments() -> None:
    statistics = FeatureStatistics.of(REFERENCE)
    for tool, tolerance in (("rdm", 1e-10), ("adm", 1e-6)):
        mu, sigma = TENSORS[f"out.{tool}.mu_ref"], TENSORS[f"out.{tool}.sigma_ref"]
        torch.testing.assert_close(statistics.mu, mu.double(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(statistics.sigma, sigma.double(), rtol=tolerance, atol=tolerance)
    spatial = TENSORS["in.ref_spatial"].permute(0, 2, 3, 1).flatten(1)
    last = FeatureStatistics.of(spatial)
    rows = TENSORS["out.adm.sigma_s_ref_trace_and_first_rows"].double()
    torch.testing.assert_close(last.mu.float(), TENSORS["out.adm.mu_s_ref"], rtol=1e-5, atol=1e-6)
    assert float(last.sigma.trace()) == pytest.approx(float(rows.flatten()[0]), rel=1e-6)
    torch.testing.assert_close(
        last.sigma[:4].flatten(), rows.flatten()[-4 * last.dim :], rtol=1e-6, atol=1e-8
    )


def test_a_singular_covariance_on_either_side_gives_the_same() -> None:
    few, many = TENSORS["in.small_sample"], SAMPLE
    assert distance(few, many) == pytest.approx(distance(many, few), rel=1e-6)
    zero = torch.zeros(4, 4, dtype=torch.float64)
    one = torch.eye(4, dtype=torch.float64)
    assert frechet_from_moments(zero[0], zero, zero[0], one) == pytest.approx(4)


def inception_score(logits: Tensor, splits: NDArray[np.int64]) -> tuple[float, float]:
    sums = SplitScore.empty(splits, logits.shape[1])
    sums.update(np.arange(len(logits)), logits)
    return sums.score()


def logits(bias: bool) -> Tensor:
    values = SAMPLE @ TENSORS["in.fc_weight"].T
    return values + TENSORS["in.fc_bias"] if bias else values


@pytest.mark.parametrize(("tool", "bias", "tolerance"), [("rdm", True, 1e-6), ("adm", False, 2e-6)])
def test_inception_score_of_consecutive_splits(tool: str, bias: bool, tolerance: float) -> None:
    for size, key in ((5000, "is_one"), (100, "is_split")):
        mean, _ = inception_score(logits(bias), consecutive_splits(len(SAMPLE), size))
        assert mean == pytest.approx(expected(tool)[key], rel=tolerance)


@pytest.mark.parametrize(("seed", "key"), [(2020, "shuffled"), (None, "unshuffled")])
def test_inception_score_of_equal_splits(seed: int | None, key: str) -> None:
    numbers = expected("torch_fidelity")
    mean, std = inception_score(
        TENSORS["out.tf.logits_unbiased"], equal_splits(len(SAMPLE), 10, seed)
    )
    assert mean == pytest.approx(numbers[f"is_mean_{key}"], rel=1e-6)
    assert std == pytest.approx(numbers[f"is_std_{key}"], rel=1e-5)


def test_equal_splits_are_the_recorded_ones() -> None:
    order = TENSORS["out.tf.is_permutation"].numpy()
    splits = equal_splits(len(order), 10, 2020)
    assert splits[order].tolist() == equal_splits(len(order), 10).tolist()
    assert np.bincount(equal_splits(23, 10)).tolist() == [2, 2, 2, 3, 2, 2, 3, 2, 2, 3]
    with pytest.raises(DataError, match="needs 10 images, got 9"):
        equal_splits(9)


def test_inception_score_of_parts_is_that_of_the_whole() -> None:
    splits = equal_splits(len(SAMPLE), 10, 2020)
    whole, merged = inception_score(logits(False), splits), SplitScore.empty(splits, 20)
    for rows in np.array_split(np.random.default_rng(0).permutation(len(SAMPLE)), 7):
        part = SplitScore.empty(splits, 20)
        part.update(rows, logits(False)[torch.from_numpy(rows)])
        merged.merge(part)
    assert merged.score() == pytest.approx(whole, rel=1e-12)


def test_kid() -> None:
    numbers, config = expected("torch_fidelity"), recorded("features_torch_fidelity")["config"]
    how = {"count": config["kid_subsets"], "size": config["kid_subset_size"]}
    drawn = list(subsets(len(SAMPLE), len(REFERENCE), **how))
    assert np.array_equal([a for a, _ in drawn], TENSORS["out.tf.kid_index_sample"].numpy())
    assert np.array_equal([b for _, b in drawn], TENSORS["out.tf.kid_index_ref"].numpy())
    found = kernel_distance(SAMPLE, REFERENCE, **how)
    assert found == pytest.approx((numbers["kid_mean"], numbers["kid_std"]), abs=1e-6)

    def gaussian(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(x, y).square() / (2 * 3**2))

    found = kernel_distance(SAMPLE, REFERENCE, kernel=gaussian, **how)
    assert found == pytest.approx((numbers["kid_rbf3_mean"], numbers["kid_rbf3_std"]), abs=1e-6)
    with pytest.raises(DataError, match="subsets of 1,000 images, but there are only 300"):
        kernel_distance(SAMPLE, REFERENCE)


def assert_within(found: float, number: float, n: int, samples: float = 1.0) -> None:
    assert abs(found - number) <= samples / n + 1e-6


def test_precision_and_recall_of_rdm_and_torch_fidelity() -> None:
    n, m = len(SAMPLE), len(REFERENCE)
    rdm = precision_recall(SAMPLE.double(), REFERENCE.double(), round_radii=True)
    assert_within(rdm.precision, expected("rdm")["precision"], n)
    assert_within(rdm.recall, expected("rdm")["recall"], m)
    numbers = expected("torch_fidelity")
    for k, suffix in ((3, ""), (5, "_k5")):
        found = precision_recall(SAMPLE, REFERENCE, k=k)
        assert found.precision == pytest.approx(numbers[f"precision{suffix}"], abs=1e-6)
        assert found.recall == pytest.approx(numbers[f"recall{suffix}"], abs=1e-6)
    f_score = precision_recall(SAMPLE, REFERENCE).f_score
    assert f_score == pytest.approx(numbers["f_score"], abs=1e-6)


def test_precision_and_recall_of_adm() -> None:
    n, m, numbers = len(SAMPLE), len(REFERENCE), expected("adm")
    found = precision_recall(SAMPLE, REFERENCE)
    assert_within(found.precision, numbers["precision"], n, 3)
    assert_within(found.recall, numbers["recall"], m, 3)
    large = precision_recall(SAMPLE * 400, REFERENCE * 400)
    assert_within(large.precision, numbers["precision_x400"], n)
    assert_within(large.recall, numbers["recall_x400"], m)


def test_radii() -> None:
    recorded_radii: dict[str, Any] = {k: v for k, v in TENSORS.items() if "rdm.radii" in k}
    assert len(recorded_radii) == 2
    for key, radii in recorded_radii.items():
        features = (SAMPLE if "sample" in key else REFERENCE).double()
        screen = manifold._screen(features, 3, features.mean(dim=0))
        found = manifold._squared_radii(screen, 3).float()
        torch.testing.assert_close(found, radii.flatten(), rtol=1e-6, atol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(4, 40), m=st.integers(4, 40))
def test_any_blocks_give_what_whole_matrices_give(seed: int, n: int, m: int) -> None:
    random = np.random.default_rng(seed)
    x, y = (torch.from_numpy(random.normal(size=(size, 5))) for size in (n, m))
    y[0] = x[0]
    before = manifold._BLOCK["cpu"]
    manifold._BLOCK["cpu"] = int(random.integers(2, 12))
    try:
        found = precision_recall(x, y)
    finally:
        manifold._BLOCK["cpu"] = before
    radii = [torch.cdist(z, z).sort(dim=1).values[:, 3] for z in (x, y)]
    across = torch.cdist(x, y)
    assert found.precision == float((across <= radii[1] + 1e-9).any(1).double().mean())
    assert found.recall == float((across <= radii[0][:, None] + 1e-9).any(0).double().mean())


def covered_by_definition(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Precision and recall from whole matrices of differences in float64."""
    x, y = x.double(), y.double()
    exact = "donot_use_mm_for_euclid_dist"
    radii = [torch.cdist(z, z, compute_mode=exact).kthvalue(4, dim=1).values for z in (x, y)]
    across = torch.cdist(x, y, compute_mode=exact)
    found, covered = across <= radii[1], across <= radii[0][:, None]
    return float(found.any(1).double().mean()), float(covered.any(0).double().mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["spread", "positive", "collapsed", "one point"])
def test_low_precision_bounds_give_exact_precision_and_recall(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kind: str
) -> None:
    monkeypatch.setattr(manifold, "fast_dtype", lambda device: dtype)
    monkeypatch.setitem(manifold._BLOCK, "cpu", 100)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(330, 24, generator=random)
    y = 0.9 * torch.randn(270, 24, generator=random) + 0.1
    if kind == "positive":
        x, y = x.abs() + 5, y.abs() + 5
    if kind == "collapsed":  # far closer to one another than half precision can tell
        x = 1e-4 * x + y[:1]
    if kind == "one point":
        x = y[:1].expand(330, -1).contiguous()
    found = precision_recall(x, y)
    assert (found.precision, found.recall) == pytest.approx(covered_by_definition(x, y), abs=1e-9)


def test_kid_in_float32_is_that_of_the_definition_in_float64() -> None:
    random = torch.Generator().manual_seed(2)
    mixing = torch.randn(32, 1024, generator=random) / 8
    x, y = ((torch.randn(n, 32, generator=random) @ mixing).abs() for n in (320, 300))
    y = 1.05 * y
    values = []
    for ours, theirs in subsets(320, 300, 4, 200):
        a, b = x[ours].double(), y[theirs].double()
        aa, bb, ab = ((p @ q.T / 1024 + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = aa.sum() - aa.trace() + bb.sum() - bb.trace()
        values.append(float(within / (200 * 199) - 2 * ab.mean()))
    found = kernel_distance(x, y, count=4, size=200)
    assert found == pytest.approx((np.mean(values), np.std(values)), abs=2e-7)


def test_sets_that_precision_and_recall_cannot_take() -> None:
    with pytest.raises(DataError, match="more than 3 images in each set, got 3"):
        precision_recall(SAMPLE[:3], REFERENCE)
    with pytest.raises(DataError, match="samples have 10 features, the reference has 64"):
        precision_recall(SAMPLE[:, :10], REFERENCE)

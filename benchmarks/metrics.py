"""Distances between features beside torch-fidelity's and SciPy's, on the same features.

Random features of Inception's size with a decaying spectrum; Fréchet distance at 2,048 numbers,
KID and precision and recall at TESSERA_BENCH_IMAGES images (10,000; 50,000 takes far longer).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import device, interleaved, markdown, record, show
from tessera.metrics.frechet import frechet_from_moments
from tessera.metrics.kid import kernel_distance
from tessera.metrics.manifold import precision_recall
from tessera.metrics.statistics import FeatureStatistics

DIM = 2048
OURS, THEIRS, SCIPY = "tessera", "torch-fidelity", "SciPy sqrtm"


def features(images: int, seed: int) -> Tensor:
    """Positive features [N, D] with strongly unequal directions, as those of Inception are."""
    random = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, DIM + 1).pow(-0.7)
    mixing = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0)))[0]
    normal = torch.randn(images, DIM, generator=random) * spectrum
    return (0.4 + normal @ mixing + 0.02 * seed).abs()


def their(part: str) -> ModuleType | None:
    """A module of torch-fidelity; None where it, or torchvision which it needs, does not load."""
    try:
        return importlib.import_module(f"torch_fidelity.{part}")
    except (ImportError, RuntimeError) as error:
        print(f"left out: {THEIRS} ({error})")
        return None


def frechet(samples: Tensor, reference: Tensor) -> dict[str, Callable[[], float]]:
    """The distance from ready statistics."""
    one, two = (FeatureStatistics.of(f) for f in (samples, reference))
    moments = [m.to(device()) for m in (one.mu, one.sigma, two.mu, two.sigma)]
    mu_a, sigma_a, mu_b, sigma_b = (m.cpu().numpy() for m in moments)
    variants: dict[str, Callable[[], float]] = {OURS: lambda: frechet_from_moments(*moments)}
    module = their("metric_fid")
    if module is not None:
        pair = [{"mu": mu_a, "sigma": sigma_a}, {"mu": mu_b, "sigma": sigma_b}]
        variants[THEIRS] = lambda: float(
            module.fid_statistics_to_metric(*pair, False)["frechet_inception_distance"]
        )
    try:
        linalg: Any = importlib.import_module("scipy.linalg")
    except ImportError:
        print("left out: SciPy is not installed")
        return variants

    def by_root() -> float:
        root = linalg.sqrtm(sigma_a @ sigma_b).real
        mean = ((mu_a - mu_b) ** 2).sum()
        return float(mean + sigma_a.trace() + sigma_b.trace() - 2 * root.trace())

    return {**variants, SCIPY: by_root}


def kid(samples: Tensor, reference: Tensor) -> dict[str, Callable[[], float]]:
    """100 subsets of 1,000, cubic kernel."""
    x, y = samples.to(device()), reference.to(device())
    variants: dict[str, Callable[[], float]] = {OURS: lambda: kernel_distance(x, y)[0]}
    module = their("metric_kid")
    if module is not None:
        options = {
            "kid_subsets": 100, "kid_subset_size": 1000, "kid_kernel": "poly", "verbose": False,
            "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None,
            "kid_kernel_poly_coef0": 1.0, "rng_seed": 2020,
        }  # fmt: skip
        variants[THEIRS] = lambda: float(
            module.kid_features_to_metric(samples, reference, **options)[
                "kernel_inception_distance_mean"
            ]
        )
    return variants


def precision(samples: Tensor, reference: Tensor) -> dict[str, Callable[[], float]]:
    """Precision and recall of 3 neighbours; the sum of both stands for the result."""
    x, y = samples.to(device()), reference.to(device())

    def ours() -> float:
        found = precision_recall(x, y)
        return found.precision + found.recall

    module = their("metric_prc")
    if module is None:
        return {OURS: ours}

    def theirs() -> float:
        found = module.prc_features_to_metric(
            x, y, prc_neighborhood=3, prc_batch_size=10_000, save_cpu_ram=len(x) > 10_000,
            verbose=False,
        )  # fmt: skip
        return float(found["precision"] + found["recall"])

    return {OURS: ours, THEIRS: theirs}


def _keep(results: dict[str, float], name: str, function: Callable[[], float]) -> None:
    results[name] = function()


def run(rounds: int, record_figures: bool) -> None:
    """Time all variants in turns, check that they agree, print the table."""
    images = int(os.environ.get("TESSERA_BENCH_IMAGES", "10000"))
    samples, reference = features(images, 1), features(images, 0)
    rows = []
    for title, make, tolerance in (
        (f"Fréchet distance, {DIM} features", frechet, 1e-6),
        (f"KID, {images:,} images", kid, 1e-5),
        (f"precision and recall, {images:,} images", precision, 4 / images),
    ):
        variants = make(samples, reference)
        results: dict[str, float] = {}
        kept = {name: partial(_keep, results, name, f) for name, f in variants.items()}
        # Without a warm-up: nothing is compiled, and SciPy's root takes minutes.
        times = interleaved(kept, rounds, warmup=0)
        for name, seconds in times.items():
            difference = abs(results[name] - results[OURS])
            if difference > tolerance * max(1.0, abs(results[OURS])):
                raise AssertionError(f"{title}: {name} gives {results[name]}, not {results[OURS]}")
            ratio = f"{seconds / times[OURS]:.1f}x"
            rows.append([title, name, f"{seconds:.2f}", ratio, f"{results[name]:.7g}"])
    columns = ["what", "by", "seconds", "against tessera", "result"]
    show("Distances between features", columns, rows)
    if record_figures:
        note = f"{torch.get_num_threads()} threads; " if device().type == "cpu" else ""
        record(
            "Distances between features",
            f"{note}median of {rounds} rounds, taken in turns.\n\n{markdown(columns, rows)}",
        )

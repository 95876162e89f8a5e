"""Distances between features beside torch-fidelity's and SciPy's, on the same features.

Random features of Inception's size with a decaying spectrum; Fréchet distance at 2,048 numbers,
KID and precision and recall at TESSERA_BENCH_IMAGES images (10,000 by default, minutes on 2 cores;
50,000 is taken in one round). Variants that need too much time or memory are left out, and said so.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

from benchmarks.harness import device, interleaved, markdown, record, seconds, show
from tessera.metrics.frechet import frechet_from_moments
from tessera.metrics.kid import kernel_distance
from tessera.metrics.manifold import precision_recall
from tessera.metrics.statistics import FeatureStatistics
from tessera.precision import fast_dtype

DIM = 2048
OURS, THEIRS, SCIPY = "tessera", "torch-fidelity", "SciPy sqrtm"
MOST_GIB, MOST_HOURS = 20, 1.0

# What each tool calls, or why it does not.
Variants = dict[str, Callable[[], float] | str]


def features(images: int, seed: int) -> Tensor:
    """Positive features [N, D] with strongly unequal directions, as those of Inception are."""
    random = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, DIM + 1).pow(-0.7)
    mixing: Tensor
    mixing, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0)))
    normal = torch.randn(images, DIM, generator=random) * spectrum
    return (0.4 + normal @ mixing + 0.02 * seed).abs()


def their(part: str) -> ModuleType | str:
    """A module of torch-fidelity, or why there is none."""
    name = f"torch_fidelity.{part}"
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError):
        # It imports torchvision, which has to match torch, for networks and data sets only.
        for stub in ("torchvision", "torchvision.transforms", "torchvision.datasets",
                     "torchvision.transforms.functional"):  # fmt: skip
            sys.modules[stub] = MagicMock()
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        return f"left out: {error}"


def _too_much(images: int) -> str | None:
    """Why torch-fidelity's precision and recall is left out; None if it can be waited for."""
    rows = min(images, 10_000)
    gib = 4 * rows * images * 4 / 2**30
    a = torch.randn(2048, 2048, device=device())
    rate = 2 * len(a) ** 3 / min(seconds(lambda: a @ a) for _ in range(3))
    hours = 4 * images**2 * 2 * DIM / rate / 3600
    if gib > MOST_GIB:
        return f"left out: needs about {gib:.0f} GiB"
    return f"left out: takes about {hours:.1f} hours" if hours > MOST_HOURS else None


def frechet(samples: Tensor, reference: Tensor) -> Variants:
    """The distance from ready statistics."""
    one, two = (FeatureStatistics.of(f) for f in (samples, reference))
    moments = [m.to(device()) for m in (one.mu, one.sigma, two.mu, two.sigma)]
    mu_a, sigma_a, mu_b, sigma_b = (m.cpu().numpy() for m in moments)
    variants: Variants = {OURS: lambda: frechet_from_moments(*moments)}
    module = their("metric_fid")
    if isinstance(module, str):
        variants[THEIRS] = module
    else:
        pair = [{"mu": mu_a, "sigma": sigma_a}, {"mu": mu_b, "sigma": sigma_b}]
        variants[THEIRS] = lambda: float(
            module.fid_statistics_to_metric(*pair, False)["frechet_inception_distance"]
        )
    try:
        linalg: Any = importlib.import_module("scipy.linalg")
    except ImportError:
        return {**variants, SCIPY: "left out: not installed"}

    def by_root() -> float:
        root = linalg.sqrtm(sigma_a @ sigma_b).real
        mean = ((mu_a - mu_b) ** 2).sum()
        return float(mean + sigma_a.trace() + sigma_b.trace() - 2 * root.trace())

    return {**variants, SCIPY: by_root}


def kid(samples: Tensor, reference: Tensor) -> Variants:
    """100 subsets of 1,000, cubic kernel."""
    x, y = samples.to(device()), reference.to(device())
    variants: Variants = {OURS: lambda: kernel_distance(x, y)[0]}
    module = their("metric_kid")
    if isinstance(module, str):
        variants[THEIRS] = module
    else:
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


def precision(samples: Tensor, reference: Tensor) -> Variants:
    """Precision and recall of 3 neighbours; the sum of both stands for the result."""
    x, y = samples.to(device()), reference.to(device())

    def ours() -> float:
        found = precision_recall(x, y)
        return found.precision + found.recall

    module = their("metric_prc")
    if isinstance(module, str):
        return {OURS: ours, THEIRS: module}
    reason = _too_much(len(x))
    if reason:
        return {OURS: ours, THEIRS: reason}

    def theirs() -> float:
        found = module.prc_features_to_metric(
            x, y, prc_neighborhood=3, prc_batch_size=10_000, save_cpu_ram=len(x) > 10_000,
            verbose=False,
        )  # fmt: skip
        return float(found["precision"] + found["recall"])

    return {OURS: ours, THEIRS: theirs}


def _timed(
    title: str, name: str, function: Callable[[], float], results: dict[str, float]
) -> Callable[[], None]:
    def call() -> None:
        start = time.perf_counter()
        results[name] = function()
        print(f"{title}: {name} {time.perf_counter() - start:.2f} s", flush=True)

    return call


def run(rounds: int, record_figures: bool) -> None:
    """Time all variants in turns, check that they agree, print the table."""
    images = int(os.environ.get("TESSERA_BENCH_IMAGES", "10000"))
    rounds = rounds if images <= 10_000 else 1
    print(f"features of 2 x {images:,} images", flush=True)
    samples, reference = features(images, 1), features(images, 0)
    rows = []
    for title, make, tolerance in (
        (f"Fréchet distance, {DIM} features", frechet, 1e-6),
        (f"KID, {images:,} images", kid, 1e-6),
        (f"precision and recall, {images:,} images", precision, 4 / images),
    ):
        results: dict[str, float] = {}
        variants = make(samples, reference)
        calls = {
            name: _timed(title, name, function, results)
            for name, function in variants.items()
            if not isinstance(function, str)
        }
        # Without a warm-up: nothing is compiled, and SciPy's root takes minutes.
        times = interleaved(calls, rounds, warmup=0)
        for name, function in variants.items():
            if isinstance(function, str):
                print(f"{title}: {name} {function}", flush=True)
                rows.append([title, name, "-", "-", function])
                continue
            difference = abs(results[name] - results[OURS])
            if difference > tolerance * max(1.0, abs(results[OURS])):
                raise AssertionError(f"{title}: {name} gives {results[name]}, not {results[OURS]}")
            ratio = f"{times[name] / times[OURS]:.1f}x"
            rows.append([title, name, f"{times[name]:.2f}", ratio, f"{results[name]:.7g}"])
    columns = ["what", "by", "seconds", "against tessera", "result"]
    show("Distances between features", columns, rows)
    if record_figures:
        threads = f"{torch.get_num_threads()} threads; " if device().type == "cpu" else ""
        turns = f"the best of {rounds} rounds, taken in turns" if rounds > 1 else "one round"
        note = (
            f"{threads}products of bounds in {fast_dtype(device())}; {turns}. "
            "torch-fidelity's Fréchet distance and KID, and SciPy's root, are "
            "NumPy on the CPU."
        )
        name = f"Distances between features of {images:,} images"
        record(name, f"{note}\n\n{markdown(columns, rows)}")

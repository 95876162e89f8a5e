"""The claim beside diffusers' training example: the whole program, at a toy's size."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_case import tiny_recipe, write_recipe

from tessera.comparing import timed
from tessera.data.dataset import open_dataset
from tessera.images import from_uint8
from tessera.metrics.reference import build_reference, save_reference

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from benchmarks import harness
from benchmarks.claims import diffusers_example, processes, tessera_vs_diffusers
from benchmarks.claims.diffusers_example import (
    Example,
    Sampler,
    nearest_width,
    parameters,
    parse_samplers,
    unet,
)
from benchmarks.claims.tessera_vs_diffusers import Line, best


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks on which every look takes a second, so that a step takes one."""
    for module in (timed, diffusers_example):
        clock = itertools.count()
        monkeypatch.setattr(module, "perf_counter", lambda clock=clock: float(next(clock)))


def example(batch: int = 2, flip: bool = False) -> Example:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8)).astype(np.uint8)
    labels = np.arange(5) % 2
    return Example(
        unet(8, 3, 2, 8), images, labels, batch=batch, flip=flip, seed=0, precision="fp32",
        device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.usefixtures("seconds")
@pytest.mark.parametrize("flip", [False, True])
def test_images_are_mirrored_where_the_recipe_mirrors_them(
    flip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, seen = example(5, flip), list[torch.Tensor]()
    add_noise = made._process.add_noise

    def watched(clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> Any:
        seen.extend(clean)
        return add_noise(clean, noise, times)

    monkeypatch.setattr(made._process, "add_noise", watched)
    for _ in made.train(4):
        pass
    whole = {tuple(image.flatten().tolist()) for image in from_uint8(made._images)}
    kept = [tuple(image.flatten().tolist()) in whole for image in seen]
    assert len(kept) == 20
    assert all(kept) != flip
    assert any(kept)
    assert all(
        tuple(x.flip(2).flatten().tolist()) in whole
        for x, k in zip(seen, kept, strict=True)
        if not k
    )


@pytest.mark.usefixtures("seconds")
def test_the_rate_warms_up_by_steps_and_falls_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers_example, "WARMUP", 2)
    made = example()
    rates = [made.optimizer.param_groups[0]["lr"] / 1e-4 for _ in made.train(6)]
    # Two steps of warm-up from nothing; then a cosine over the four seconds that are left.
    assert rates == pytest.approx([0, 0.5, 1, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert (made.steps, made.images_seen) == (6, 12)


def test_an_image_is_that_of_its_seed_and_of_averaged_weights() -> None:
    made = example()
    before = [p.clone() for p in made.network.parameters()]
    sampler = Sampler("ddim", 2)
    both, labels = made.sample(sampler, range(2), 2)
    second, _ = made.sample(sampler, range(1, 2), 2)
    assert both.shape == (2, 8, 8, 3)
    assert labels is not None
    assert labels.tolist() == [0, 1]
    assert np.abs(both[1].astype(int) - second[0]).max() <= 1  # of rounding
    with torch.no_grad():
        for parameter in made.network.parameters():
            parameter.add_(1)  # the averages do not know
    assert (made.sample(sampler, range(2), 2)[0] == both).all()
    for parameter, old in zip(made.network.parameters(), before, strict=True):
        assert torch.equal(parameter, old + 1)


def test_networks_are_of_the_nearest_size() -> None:
    width = nearest_width(32, 3, 10, 2_970_000)
    with torch.device("meta"):
        sizes = [parameters(unet(32, 3, 10, w)) for w in (width - 8, width, width + 8)]
    assert min(sizes, key=lambda size: abs(size - 2_970_000)) == sizes[1]
    with torch.device("meta"):
        large = unet(64, 3, 0, 8)
    kinds = [type(block).__name__ for block in large.down_blocks]
    assert kinds == ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"]


def test_samplers_by_name() -> None:
    assert parse_samplers("ddpm-1000,dpm-25") == [Sampler("ddpm", 1000), Sampler("dpm", 25)]
    assert parse_samplers("") == []
    for wrong in ("heun-18", "ddim", "ddim-0", "ddim-1001"):
        with pytest.raises(argparse.ArgumentTypeError, match="like ddim-50"):
            parse_samplers(wrong)


def line(arm: str, minutes: float, distance: float) -> Line:
    return Line(arm, minutes, 8, "s", 3, distance, 0.5, 0.5, None)


def test_the_best_sampler_of_each_point_counts() -> None:
    lines = [line("a", 1, 3), line("a", 1, 2), line("b", 1, 1), line("a", 2, 1), line("a", 2, 4)]
    assert [(x.minutes, x.distance) for x in best(lines, "a")] == [(1, 2), (2, 1)]


def in_this_process(
    module: str, arms: Sequence[str], options: argparse.Namespace, folder: Path
) -> tuple[list[dict[str, Any]], int]:
    """Arms in turn, without processes of their own."""
    lines = io.StringIO()
    for arm in arms:
        with contextlib.redirect_stdout(lines):
            tessera_vs_diffusers.train(
                argparse.Namespace(**{**vars(options), "arm": arm, "folder": folder})
            )
    return [json.loads(line) for line in lines.getvalue().splitlines() if line[:1] == "{"], 1


@pytest.mark.usefixtures("seconds")
def test_the_whole_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, tiny_recipe(tmp_path))
    data = tmp_path / "tiny.safetensors"
    save_reference(tmp_path / "real.npz", build_reference(open_dataset(data), training_images=60))
    (tmp_path / "README.md").write_text(
        "# a\n<!-- begin tessera_vs_diffusers -->\nstale\n"
        "<!-- end tessera_vs_diffusers -->\nafter\n"
    )
    monkeypatch.setattr(harness, "README", tmp_path / "README.md")
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(processes, "run_arms", in_this_process)
    words = [
        "--data", str(data), "--recipe", str(recipe), "--reference", str(tmp_path / "real.npz"),
        "--minutes", "0.1", "--samples", "12", "--batch", "6", "--train-batch", "4",
        "--points", "0.5,1", "--samplers", "dpm-2,ddim-2", "--final", "ddpm-2",
        "--out", str(tmp_path), "--held-out", str(data),
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["tessera_vs_diffusers", *words])
    tessera_vs_diffusers.main()

    results = (tmp_path / "RESULTS.md").read_text()
    rows = [line.split(" | ") for line in results.splitlines() if line.startswith("| ")][2:]
    # Six steps of a second each: of 8 images here, of 4 there; the last point has one sampler more.
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("| tessera", "0.05", "24"), ("| tessera", "0.1", "48"),
        *[("| diffusers", "0.05", "12")] * 2, *[("| diffusers", "0.1", "24")] * 3,
        ("| held-out images", "–", "–"),
    ]  # fmt: skip
    distances = [float(row[5]) for row in rows]
    assert distances[-1] <= min(distances[:-1])  # real images are the nearest
    readme = (tmp_path / "README.md").read_text()
    assert "stale" not in readme
    assert readme.startswith("# a\n<!-- begin")
    assert readme.endswith("-->\nafter\n")
    sampled = r"(DPM-Solver\+\+|DDIM|DDPM), 2 steps"
    assert re.search(rf"^\| 0\.1 \| \d\.\d\d \| \d\.\d\d \| {sampled} \| ", readme, re.M)
    # Kept again, nothing is trained, and the same is written.
    monkeypatch.setattr(tessera_vs_diffusers, "measured", None)
    again = ["--data", str(data), "--again", str(tmp_path / "tessera_vs_diffusers.json")]
    monkeypatch.setattr("sys.argv", ["tessera_vs_diffusers", *again, "--out", str(tmp_path)])
    tessera_vs_diffusers.main()
    assert (tmp_path / "README.md").read_text() == readme
    assert (tmp_path / "RESULTS.md").read_text() == results
    for what in ("curves", "tessera", "diffusers"):
        assert (tmp_path / f"tessera_vs_diffusers-{what}.png").is_file()

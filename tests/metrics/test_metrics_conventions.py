"""`tessera eval` with Inception features, whose weights come from a formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_metrics_eval import evaluate, refused, write_images
from test_metrics_inception import formula_weights
from typer.testing import CliRunner

from tessera.cli import app
from tessera.images import save_png
from tessera.metrics.dinov2 import DinoV2, VisionTransformer
from tessera.metrics.features import with_float64
from tessera.metrics.formats import read_measured
from tessera.metrics.images import ArrayImages
from tessera.metrics.measure import data_source

pytestmark = pytest.mark.slow

N = 6
SAMPLES = ("samples", "samples.npz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, features of two small sets and a reference file."""
    path = tmp_path_factory.mktemp("inception")
    torch.save(formula_weights(), path / "weights.pth")
    for name, count in (("real", N), ("samples", N + 1)):
        write_images(path / name, count, size=16, channels=3)
        result = evaluate(
            "features", path / name, path / f"{name}.npz", "--weights", path / "weights.pth"
        )
        assert result.exit_code == 0, result.output
    return path


def scores(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["eval", "score", *map(str, arguments), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_feature_files_hold_what_images_give(folder: Path) -> None:
    found = read_measured(folder / "real.npz")
    assert found.features is not None
    assert found.spatial is not None
    assert (found.n, found.extractor) == (N, "inception")
    assert found.features.shape == (N, 2048)
    assert found.spatial.shape == (N, 2023)


def test_a_line_for_each_convention(folder: Path) -> None:
    document = scores(
        folder / "samples.npz", folder / "real.npz", "--metrics", "fid,sfid,pr", "--convention",
        "all",
    )  # fmt: skip
    found = [(r["metric"], r["convention"]) for r in document["results"]]
    assert found == [
        ("fid", "edm"), ("fid", "adm"), ("fid", "rdm"), ("fid", "torch-fidelity"),
        ("sfid", "adm"), ("sfid", "rdm"), ("pr", "adm"), ("pr", "rdm"), ("pr", "torch-fidelity"),
    ]  # fmt: skip
    assert document["samples"]["n"] == N + 1
    assert document["reference"]["n"] == N
    assert document["features"]["dim"] == 2048
    table = evaluate("score", folder / "samples.npz", folder / "real.npz", "--metrics", "fid,pr")
    assert table.exit_code == 0, table.output
    assert "recall" in table.output
    assert "at least 2049 images" in table.output


def test_images_and_stored_features_give_the_same(folder: Path) -> None:
    weights = ("--weights", folder / "weights.pth")
    reference = folder / "real.ref.npz"
    made = evaluate("reference", folder / "real", reference, "--features", "inception", *weights)
    assert made.exit_code == 0, made.output
    what = ("--metrics", "sfid,is", *weights)
    one = scores(folder / "samples", reference, "--batch", 4, *what)["results"]
    two = scores(folder / "samples.npz", folder / "real.npz", *what)["results"]
    assert [r["metric"] for r in one] == ["sfid", "is"]
    for a, b in zip(one, two, strict=True):
        assert a["values"][a["metric"]] == pytest.approx(b["values"][b["metric"]], rel=1e-4)
    with np.load(reference) as file:
        assert set(file.files) == {"mu", "sigma", "mu_s", "sigma_s", "n", "tessera"}
    lacking = refused("score", folder / "samples.npz", reference, "--metrics", "kid")
    assert "does not hold the features of each image" in lacking


def test_an_inception_score_needs_no_reference(folder: Path) -> None:
    weights = ("--weights", folder / "weights.pth")
    document = scores(folder / "samples.npz", "--metrics", "is", *weights)
    assert document["results"][0]["values"]["is"] > 1
    assert document["reference"] is None
    for metrics in ((), ("--metrics", "is,fid")):
        assert "name a REFERENCE" in refused("score", folder / "samples.npz", *metrics)


def test_what_cannot_be_scored(folder: Path, tmp_path: Path) -> None:
    one, two = folder / "samples.npz", folder / "real.npz"
    assert "--metrics 'speed'" in refused("score", one, two, "--metrics", "speed")
    assert "--convention 'x'" in refused("score", one, two, "--convention", "x")
    message = refused("score", one, two, "--metrics", "kid", "--convention", "adm")
    assert "kid has no convention 'adm'" in message
    assert "only 6" in refused("score", one, two, "--metrics", "kid")
    # No network is needed to see that there are too few, and none is there.
    weights = ("--weights", tmp_path / "absent.pth")
    few = refused("score", folder / "samples", two, "--metrics", "kid", *weights)
    assert "kid needs at least 1,000 images, there are 7" in few
    assert "needs 10 images, got 7" in refused(
        "score", one, two, "--metrics", "is", "--convention", "torch-fidelity",
        "--weights", folder / "weights.pth",
    )  # fmt: skip
    wrong = refused("score", one, two, "--metrics", "fid", "--features", "dinov2")
    assert "distance on other features is called fd" in wrong
    np.savez(tmp_path / "dino.npz", mu=np.zeros(1024), sigma=np.eye(1024))
    assert "2048 features" in refused(
        "score", one, tmp_path / "dino.npz", "--metrics", "fd", "--features", "inception"
    )
    assert "--features 'vgg'" in refused("features", folder / "real", tmp_path / "a.npz",
                                         "--features", "vgg")  # fmt: skip
    save_png(tmp_path / "single" / "0.png", np.zeros((8, 8, 3), np.uint8))
    assert "at least 2 images" in refused("features", tmp_path / "single", tmp_path / "a.npz")


def test_a_subset_of_stored_features_is_that_of_the_images(folder: Path) -> None:
    options = ("--metrics", "sfid,pr", "--num", 5, "--seed", 3, "--weights", folder / "weights.pth")
    one, two = (scores(folder / name, folder / "real.npz", *options) for name in SAMPLES)
    assert one["samples"]["n"] == two["samples"]["n"] == 5
    for a, b in zip(one["results"], two["results"], strict=True):
        assert a["values"] == pytest.approx(b["values"], rel=1e-4)
    whole = refused("score", folder / "samples.npz", folder / "real.npz", "--num", 8)
    assert "8 images asked for, there are 7" in whole
    np.savez(folder / "stat.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    message = refused("score", folder / "stat.npz", folder / "real.npz", "--num", 5)
    assert "statistics of all of its images" in message


def test_other_weights_are_refused_before_the_images_are_read(folder: Path, tmp_path: Path) -> None:
    other = formula_weights() | {"fc.bias": torch.zeros(1008)}
    torch.save(other, tmp_path / "other.pth")
    images = write_images(tmp_path / "images", 4, size=16, channels=3)
    (images / "dark" / "002.png").write_bytes(b"")
    message = refused("score", images, folder / "real.npz", "--weights", tmp_path / "other.pth")
    assert "other inception weights" in message


def test_a_subset_is_the_one_that_edms_tool_draws() -> None:
    images = np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(1, axis=1)
    source = data_source(ArrayImages("set", images), num=7, seed=3, batch=2)
    found = torch.cat([batch for _, batch, _ in source.batches]).flatten().tolist()
    order = np.arange(20)
    np.random.RandomState(3).shuffle(order)
    assert found == sorted(order[:7].tolist())


def test_dinov2_resizes_its_positions_and_reads_published_names() -> None:
    network = VisionTransformer(width=16, depth=2, heads=2, grid=37)
    torch.nn.init.normal_(network.pos_embed)
    state = {**network.state_dict(), "mask_token": torch.zeros(1, 16)}
    assert "blocks.1.ls2.gamma" in state
    assert state["patch_embed.proj.weight"].shape == (16, 3, 14, 14)
    again = VisionTransformer(width=16, depth=2, heads=2, grid=37)
    again.load(state)
    assert network._positions(16, 16).shape == (1, 257, 16)
    assert network._positions(37, 37) is network.pos_embed
    images = torch.randint(0, 256, (2, 1, 30, 20), dtype=torch.uint8)
    one, two = (DinoV2(n, "0")(images) for n in (network, again))
    assert one.shape == (2, 16)
    assert torch.equal(one, two)


def test_devices_without_float64_leave_distances_to_the_cpu() -> None:
    assert with_float64("mps") == torch.device("cpu")
    assert with_float64(torch.device("cuda", 1)) == torch.device("cuda", 1)

"""Energies of given images: what they are, and the command that prints them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from energy_pipeline import energy_pipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_pipeline import tiny_pipeline
from typer.testing import CliRunner

from tessera.cli import app
from tessera.conditioning import Conditioning
from tessera.data.codec import PixelCodec
from tessera.diffusion.energy import landscape
from tessera.errors import TesseraError
from tessera.metrics.energies import Energies, auroc, image_energies
from tessera.metrics.images import ArrayImages
from tessera.randomness import AddressedDraws

SIGMAS = [0.2, 1.0]


def pictures(seed: int, count: int = 6, low: int = 0, high: int = 256) -> ArrayImages:
    generator = np.random.default_rng(seed)
    images = generator.integers(low, high, (count, 3, 8, 8), dtype=np.uint8)
    return ArrayImages(f"set {seed}", images, np.arange(count) % 3)


def found(data: ArrayImages, **options: Any) -> Energies:
    pipe = energy_pipeline()
    return image_energies(
        pipe.denoiser, data, np.arange(len(data)), SIGMAS, PixelCodec(), **options
    )


def test_the_gradient_is_minus_the_score() -> None:
    """By finite differences along the estimate of the noise: E rises by (z - D) / σ² · dz."""
    pipe, data = energy_pipeline(), pictures(0, 1)
    z = torch.from_numpy(data.images).double() / 127.5 - 1
    noise = AddressedDraws(0, torch.tensor([0])).normal("energy.0.0", 3, 8, 8)
    sigma, step = SIGMAS[0], 1e-3
    here = landscape(
        pipe.denoiser, z + sigma * noise, torch.tensor([sigma], dtype=torch.float64), Conditioning()
    )
    score = -here.noise / sigma
    # The command reads the same place; its noise is the address's.
    value = found(data).values[0, 0]
    assert value == pytest.approx(here.energy.item() * (1 + sigma**2) ** 0.5 / sigma, rel=1e-5)
    ends = [
        landscape(
            pipe.denoiser, z + sigma * noise + sign * step * score,
            torch.tensor([sigma], dtype=torch.float64), Conditioning(),
        ).energy.item()
        for sign in (-1, 1)
    ]  # fmt: skip
    rise = (ends[1] - ends[0]) / (2 * step) * (1 + sigma**2) ** 0.5 / sigma
    assert rise == pytest.approx(-score.square().sum().item(), rel=2e-2)


def test_no_batch_changes_an_energy() -> None:
    data = pictures(1)
    whole, parts = found(data, batch=6), found(data, batch=4)
    np.testing.assert_allclose(whole.values, parts.values, rtol=1e-5)
    other = found(data, seed=1)
    assert not np.allclose(whole.values, other.values, rtol=1e-5)


def test_classes_and_repeats_count() -> None:
    data = pictures(2)
    plain = found(data).values
    assert not np.allclose(plain, found(data, labels=data.labels).values, rtol=1e-6)
    assert not np.allclose(plain, found(data, repeats=2).values, rtol=1e-6)


def test_other_shapes_and_models_are_refused() -> None:
    data = ArrayImages("large", np.zeros((1, 3, 16, 16), np.uint8))
    with pytest.raises(TesseraError, match=r"large have shape \(3, 16, 16\).*the model's"):
        found(data)
    with pytest.raises(TesseraError, match="no energy"):
        image_energies(tiny_pipeline().denoiser, pictures(0), np.arange(1), SIGMAS, PixelCodec())


@given(st.lists(st.integers(0, 5), min_size=1), st.lists(st.integers(0, 5), min_size=1))
def test_auroc_counts_pairs(first: list[int], second: list[int]) -> None:
    pairs = [(a < b) + 0.5 * (a == b) for a in first for b in second]
    expected = sum(pairs) / len(pairs)
    assert auroc(np.array(first, float), np.array(second, float)) == pytest.approx(expected)


def test_standardised_by_the_first_set() -> None:
    first = Energies((1.0, 2.0), np.array([[0.0, 10.0], [2.0, 30.0]]))
    second = Energies((1.0, 2.0), np.array([[3.0, 40.0]]))
    np.testing.assert_allclose(first.standardised(), [-1, 1])
    np.testing.assert_allclose(second.standardised(first), [2])


def run(*arguments: object) -> str:
    """The command's output; errors are raised."""
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A pipeline, and two folders of pictures."""
    energy_pipeline().save(tmp_path / "pipe")
    for name, high in (("dark", 60), ("any", 256)):
        (tmp_path / name).mkdir()
        for index, image in enumerate(pictures(3, 12, 0, high).images):
            Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / name / f"{index:02}.png")
    return tmp_path / "pipe", tmp_path / "dark", tmp_path / "any"


def test_the_table_and_the_grid(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pipe, dark, others = folders
    picture = tmp_path / "sorted.png"
    text = run("energy", pipe, dark, others, "--noise", "0.2,1", "--grid", picture)
    assert "AUROC" in text
    assert "dark" in text
    assert Image.open(picture).size == (10 * 66 - 2, 2 * 66 - 2)
    with pytest.raises(TesseraError, match="--overwrite"):
        run("energy", pipe, dark, "--grid", picture)
    assert "AUROC" not in run("energy", pipe, dark, "--num", "2", "--noise", "0.5")


def test_json_holds_every_energy(folders: tuple[Path, Path, Path]) -> None:
    pipe, dark, others = folders
    report = json.loads(run("energy", pipe, dark, others, "--noise", "0.2,1", "--json"))
    assert report["noise"] == SIGMAS
    first, second = (np.array(part["energies"]) for part in report["sets"])
    assert first.shape == second.shape == (12, 2)
    assert report["auroc"]["1"] == auroc(first[:, 1], second[:, 1])
    assert set(report["auroc"]) == {"0.2", "1", "all, standardised"}


def test_errors_name_the_option(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pipe, dark, _ = folders
    with pytest.raises(TesseraError, match="--noise 1,x"):
        run("energy", pipe, dark, "--noise", "1,x")
    with pytest.raises(TesseraError, match="--noise 0"):
        run("energy", pipe, dark, "--noise", "0")
    with pytest.raises(TesseraError, match=r"--classes: .*have none"):
        run("energy", pipe, dark, "--classes")
    tiny_pipeline().save(tmp_path / "plain")
    with pytest.raises(TesseraError, match="no energy"):
        run("energy", tmp_path / "plain", dark)

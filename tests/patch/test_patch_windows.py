"""Sampling a part of the picture: noise, coordinates, classes, the command, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_case import tiny_recipe
from typer.testing import CliRunner

import tessera
from tessera.cli import app
from tessera.conditioning import full_grid
from tessera.errors import TesseraError
from tessera.pipelines.base import Pipeline
from tessera.pipelines.canvas import choose_canvas
from tessera.pipelines.loading import build_pipeline
from tessera.recipes.build import build_denoiser
from tessera.recipes.schema import CanvasConfig
from tessera.sampling.seeds import SeedNoise


def pipeline(folder: Path, **changes: Any) -> Pipeline:
    """8x8 RGB, two classes, trained on patches; random weights that do not begin at zero."""
    view = {"view": {"kind": "patches", "sizes": [4, 8]}}
    recipe = tiny_recipe(folder, **{**view, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = build_denoiser(recipe)
        for parameter in denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return build_pipeline(recipe, denoiser)


class Seen:
    """Remembers what the network was called with."""

    def __init__(self, pipe: Pipeline) -> None:
        self.calls: list[tuple[Any, ...]] = []
        pipe.denoiser.network.register_forward_pre_hook(lambda _, inputs: self.calls.append(inputs))


def test_whole_pictures_need_no_option(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    whole = pipe.sample("0-2")
    assert whole.shape == (3, 8, 8, 3)
    assert np.array_equal(pipe.sample("0-2", window=(0, 0, 8, 8)), whole)
    assert np.array_equal(pipe.sample("0-2", resolution=8), whole)


def test_a_window_has_its_coordinates_and_the_pictures_noise(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    seen = Seen(pipe)
    options = {"s_churn": 1.0, "window": (2, 4, 6, 4)}
    part = pipe.sample([5, 6], **options)
    assert part.shape == (2, 4, 6, 3)
    grid = full_grid((8, 8))[:, 4:8, 2:8]
    for _, _, cond in seen.calls:
        assert torch.equal(cond.coords, grid.expand(2, -1, -1, -1))
    canvas = choose_canvas(pipe.recipe, CanvasConfig(window=(2, 4, 6, 4)))
    cropped, whole = canvas.noise(SeedNoise([5])), SeedNoise([5])
    for dtype in (torch.float32, torch.float64):
        noise = whole.normal((3, 8, 8), dtype)
        assert torch.equal(cropped.normal((3, 4, 6), dtype), noise[:, :, 4:8, 2:8])
    assert np.array_equal(pipe.labels([5, 6], window=(2, 4, 6, 4)), pipe.labels([5, 6]))
    # One seed, one window: the same in any batch.
    assert np.array_equal(pipe.sample([6], **options)[0], part[1])


def test_own_noise_repeats_the_released_windows(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    canvas = choose_canvas(pipe.recipe, CanvasConfig(window=(2, 4, 6, 4), window_noise="own"))
    own = canvas.noise(SeedNoise([5])).normal((3, 4, 6))
    assert torch.equal(own, SeedNoise([5]).normal((3, 4, 6)))
    options: dict[str, Any] = {"window": (2, 4, 6, 4), "window_noise": "own"}
    assert not np.array_equal(pipe.sample([5], **options), pipe.sample([5], window=(2, 4, 6, 4)))
    batch = next(pipe.sample_batches(range(20), **options))
    assert batch.labels is not None
    assert np.array_equal(pipe.labels(range(20), **options), batch.labels)


def test_other_canvases(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    seen = Seen(pipe)
    assert pipe.sample([0], resolution=16).shape == (1, 16, 16, 3)
    assert torch.equal(seen.calls[-1][2].coords[0], full_grid((16, 16)))
    assert pipe.sample([0], window=(-4, 0, 16, 8)).shape == (1, 8, 16, 3)
    coords = seen.calls[-1][2].coords[0]
    assert coords[0, 0, 4:12].tolist() == full_grid((8, 8))[0, 0].tolist()
    assert coords[0].min() < -1
    assert coords[0].max() > 1
    pipe.sample([0], mask_coords=True)
    assert not seen.calls[-1][2].coords.any()


def test_guidance_composes(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    options: dict[str, Any] = {"labels": 1, "window": (0, 0, 4, 8)}
    plain, guided = pipe.sample([0], **options), pipe.sample([0], guidance=3.0, **options)
    assert plain.shape == guided.shape == (1, 8, 4, 3)
    assert not np.array_equal(plain, guided)


def test_the_command(tmp_path: Path) -> None:
    pipeline(tmp_path).save(tmp_path / "pipe")
    arguments = ["sample", str(tmp_path / "pipe"), "--seeds", "0-1", "--out", str(tmp_path / "out")]
    window = ["window=2,4,6,4"]
    result = CliRunner().invoke(app, [*arguments, *window])
    assert result.exit_code == 0, result.output
    image = np.asarray(Image.open(tmp_path / "out" / "000001.png"))
    expected = tessera.load(tmp_path / "pipe", device="cpu").sample([1], window=(2, 4, 6, 4))[0]
    assert np.abs(image.astype(int) - expected).max() <= 1
    # The folder's images are of that window; another one is a mistake.
    assert isinstance(CliRunner().invoke(app, arguments).exception, TesseraError)
    npz = [*arguments[:-1], str(tmp_path / "out.npz"), *window, "window_noise=own"]
    assert CliRunner().invoke(app, npz).exit_code == 0
    assert np.load(tmp_path / "out.npz")["arr_0"].shape == (2, 4, 6, 3)


def refusal(pipe: Pipeline, **options: Any) -> str:
    with pytest.raises(TesseraError) as caught:
        pipe.sample([0], **options)
    return str(caught.value)


def test_refusals(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    assert "a multiple of 2" in refusal(pipe, window=(0, 0, 3, 4))
    assert "`window.2=0`" in refusal(pipe, window=(0, 0, 0, 4))
    assert "'crop' or 'own'" in refusal(pipe, window=(0, 0, 4, 4), window_noise="other")
    plain = pipeline(tmp_path, view={"kind": "full"})
    assert "does not know where" in refusal(plain, window=(0, 0, 4, 4))
    result = CliRunner().invoke(app, ["sample", "nowhere", "window"])
    assert "KEY=VALUE" in str(result.exception)

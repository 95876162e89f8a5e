"""What is measured on sets of images and latents, and what is proposed for them."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from data_files import random_images, write_archive, write_folder, write_packed
from typer.testing import CliRunner

from tessera.cli import app
from tessera.data.latent_formats.base import LatentInfo, LatentPlan
from tessera.data.latent_formats.registry import choose_format, latent_sink
from tessera.diffusion.bands import Band
from tessera.diffusion.blur import dct_matrix
from tessera.errors import DataError, RecipeError, TesseraError
from tessera.planning.linear import PixelCovariance, PowerSpectrum, SeenError
from tessera.planning.proposal import bands_for, planned_bands, propose
from tessera.planning.sample import Reading, open_sample
from tessera.planning.spectrum import MeasuredSet, measure_set
from tessera.planning.study import (
    DataStudy,
    Sight,
    coarse_factors,
    sampling_range,
    study_set,
    training_levels,
)
from tessera.recipes.loading import dump_recipe, load_recipe, parse_recipe
from tessera.recipes.overrides import merge
from tessera.recipes.schema import EdmObjectiveConfig, Recipe
from tessera.recipes.text import read_yaml


def smooth_images(count: int, side: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Of which neighbours are alike, as in photographs; uint8 [N, C, H, W]."""
    place = np.arange(side)
    fall = 1.5 / (np.hypot(place[:, None], place) + 0.5) ** 1.5
    noise = np.random.default_rng(seed).normal(size=(count, channels, side, side))
    noise[:, 1:] = 0.8 * noise[:, :1] + 0.3 * noise[:, 1:]
    cosines = dct_matrix(side).numpy()
    values = cosines.T @ (noise * fall * side / 4) @ cosines
    return np.clip(127.5 + 60 * values, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    return write_archive(folder / "photos.zip", smooth_images(200, 16))


def studied(spectrum: np.ndarray, **changes: Any) -> DataStudy:
    """Of images with this power spectrum, [K, H, W]."""
    told: dict[str, Any] = {
        "name": "made", "shape": spectrum.shape, "total": 9, "images": 9, "skipped": (),
        "of_pixels": True, "covariance": PowerSpectrum(spectrum), "planes": "all", "exact": False,
    }  # fmt: skip
    return study_set(MeasuredSet(**{**told, **changes}))


def falling(side: int, power: float = 3.0) -> np.ndarray:
    place = np.arange(side)
    values = (np.hypot(place[:, None], place) + 0.5) ** -power
    return cast(np.ndarray, 0.25 * values[None] / values.mean())


# ------------------------------------------------------------------------------ what is measured


def test_the_covariance_of_small_images(tmp_path: Path) -> None:
    images = smooth_images(530, 8, 1)
    measured = measure_set(write_packed(tmp_path / "grey.safetensors", images))
    assert (measured.images, measured.total, measured.exact) == (530, 530, True)
    values = images.reshape(530, -1) / 127.5 - 1
    covariance = cast(PixelCovariance, measured.covariance)
    expected = np.cov(values.T, bias=True)
    np.testing.assert_allclose(covariance._values[0], expected, atol=1e-6)
    assert covariance.mean_square == pytest.approx((values.mean(0) ** 2).sum(), rel=1e-5)
    assert measured.covariance.std == pytest.approx(values.var(0).mean() ** 0.5, rel=1e-5)


def test_the_spectrum_of_larger_images_keeps_what_colours_have(photos: Path) -> None:
    measured = measure_set(photos)
    assert (measured.shape, measured.exact) == ((3, 16, 16), False)
    assert len(measured.covariance.variances) == 3 * 16 * 16
    values = batches_of(open_sample(photos))[0].numpy()
    # Axes at right angles and the DCT leave the squares what they are.
    assert measured.covariance.variances.sum() == pytest.approx(values.var(0).sum(), rel=1e-4)
    luma = measure_set(photos, planes="luma").covariance
    grey = np.einsum("c,nchw->nhw", [0.299, 0.587, 0.114], values)
    assert luma.variances.sum() == pytest.approx(grey.var(0).sum(), rel=1e-4)


def batches_of(opened: Any) -> list[torch.Tensor]:
    with opened as sample:
        return list(sample.batches)


def test_a_sample_is_chosen_by_its_seed(photos: Path) -> None:
    one, again, other = (
        torch.cat(batches_of(open_sample(photos, Reading(images=40, seed=seed))))
        for seed in (3, 3, 4)
    )
    assert one.shape == (40, 3, 16, 16)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    reading = Reading(images=40)
    assert bands_for(photos, reading) == bands_for(photos, reading)


def test_images_of_any_size_by_a_resolution(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        f"{index}.png": image.transpose(1, 2, 0)[: 20 + index % 3]
        for index, image in enumerate(smooth_images(6, 24))
    }
    files["grey.png"] = random_images(1, 1, 24)[0, 0]
    files["bad.png"] = b"no image"
    folder = write_folder(tmp_path / "folder", files)
    with pytest.raises(DataError, match="`resolution` brings all"):
        measure_set(folder)
    measured = measure_set(folder, Reading(resolution=16))
    assert (measured.shape, measured.total, measured.images) == ((3, 16, 16), 8, 7)
    assert len(measured.skipped) == 1
    assert "bad.png" in measured.skipped[0]
    shrunk = measure_set(folder, Reading(resolution=16, shrink=2))
    assert shrunk.shape == (3, 8, 8)


def test_what_cannot_be_measured_is_said(tmp_path: Path, photos: Path) -> None:
    flat = write_packed(tmp_path / "flat.safetensors", np.full((5, 3, 8, 8), 7, np.uint8))
    with pytest.raises(DataError, match="are the same"):
        measure_set(flat)
    tiny = write_packed(tmp_path / "tiny.safetensors", random_images(9, 3, 4))
    with pytest.raises(DataError, match="too small"):
        study_set(measure_set(tiny))
    with pytest.raises(DataError, match="whole blocks"):
        measure_set(photos, Reading(shrink=3))
    two = write_packed(tmp_path / "two.safetensors", random_images(9, 2, 8))
    with pytest.raises(DataError, match="luma"):
        measure_set(two, planes="luma")


LATENTS = (4, 8, 8)


def latents_at(path: Path, info: LatentInfo) -> Path:
    """Nine means of 1 ± 2 in posteriors of variance 5: in all 1 ± 3."""
    form = choose_format(path, "packed", True)
    plan = LatentPlan(
        name=path.stem, count=200, shape=LATENTS, info=info, mirrored=False, labels=None,
        class_names=None, precision="float32", shard=200,
    )  # fmt: skip
    means = 1 + 2 * torch.randn(200, *LATENTS, generator=torch.Generator().manual_seed(0))
    with latent_sink(path, form, plan, seed=5) as put:
        put(0, torch.cat([means, torch.full_like(means, math.log(5))], 1), None)
    return path


def test_latents_are_measured_as_they_are_trained_on(tmp_path: Path) -> None:
    told = latents_at(tmp_path / "told.safetensors", LatentInfo(scale=0.5, shift=1.0))
    measured = measure_set(told)
    assert not measured.of_pixels
    assert measured.shape == LATENTS
    assert measured.covariance.std == pytest.approx(1.5, rel=0.02)
    assert measure_set(told, Reading(scale=1.0)).covariance.std == pytest.approx(3, rel=0.02)
    unknown = latents_at(tmp_path / "unknown.safetensors", LatentInfo())
    assert measure_set(unknown).covariance.std == pytest.approx(1)
    with pytest.raises(DataError, match="leave out `resolution`"):
        measure_set(told, Reading(resolution=8))


# ------------------------------------------------------------------------------ what is proposed


def test_noise_levels_of_white_images() -> None:
    """The divergence of n numbers of variance v from noise is about n v² / (4 σ⁴)."""
    white = PowerSpectrum(np.full((1, 16, 16), 0.25))
    low, high = sampling_range(white, of_pixels=True)
    assert low == pytest.approx(2 / 255 / 12**0.5)
    assert high == pytest.approx((256 * 0.25**2 / 4 / 0.01) ** 0.25, rel=0.02)
    moved = PowerSpectrum(np.full((1, 16, 16), 0.25), mean_square=100.0)
    assert sampling_range(moved, of_pixels=True)[1] == pytest.approx((50 / 0.01) ** 0.5, rel=0.02)
    assert training_levels(white)[0] == pytest.approx(math.log(0.5))


def test_training_moves_with_the_scale_of_the_data() -> None:
    images = PowerSpectrum(falling(32))
    (mean, std), (moved, same) = training_levels(images), training_levels(images.scaled(3))
    assert moved == pytest.approx(mean + math.log(3), abs=1e-3)
    assert same == pytest.approx(std, abs=1e-3)


def test_bands_have_no_gaps_and_keep_the_bound() -> None:
    study = studied(falling(32))
    for bound in (1.01, 1.03, 1.2):
        bands = planned_bands(study, bound)
        assert bands[0].sigma_min == 0
        assert bands[-1].sigma_max == math.inf
        for low, high in itertools.pairwise(bands):
            assert low.sigma_max == high.sigma_min
            assert low.factor < high.factor
        for band in bands:
            inside = (study.sigmas >= band.sigma_min) & (study.sigmas < band.sigma_max)
            seen = study.curves.get(Sight(band.factor, band.crop, band.halo))
            if seen is not None:
                assert seen.relative[inside].max() <= bound + 2e-3
    starts = [planned_bands(study, bound)[-1].sigma_min for bound in (1.01, 1.03, 1.2)]
    assert starts == sorted(starts, reverse=True)
    assert planned_bands(study, crops=False)[0].crop is None
    with pytest.raises(DataError, match="above 1"):
        planned_bands(study, 1.0)


def test_images_without_detail_are_seen_coarsely_at_all_levels() -> None:
    power = np.zeros((1, 32, 32))
    power[0, :2, :2] = 1.0
    (band,) = planned_bands(studied(power))
    assert band == Band(0.0, math.inf, 4)


def test_of_white_images_means_suffice_where_next_to_nothing_is_known() -> None:
    """The full image tells a share q = v / (v + σ²) of the variance, and means a quarter of it."""
    study = studied(np.full((1, 32, 32), 0.25))
    bands = planned_bands(study, 1.005)
    assert (bands[0].crop, bands[0].halo) == (16, 0)
    share = 0.005 / (1.005 - 0.25)
    assert bands[1].sigma_min == pytest.approx((0.25 / share - 0.25) ** 0.5, rel=0.01)
    view = propose(study).recipe["view"]
    assert view == {"kind": "patches", "sizes": [16, 32]}
    assert merged("cifar10-small", {"view": view}).patch_sizes == (16, 32)
    assert coarse_factors((32, 32)) == [2, 4]
    assert coarse_factors((28, 28)) == [2]


def merged(base: str, section: Any) -> Recipe:
    return parse_recipe(merge(dump_recipe(load_recipe(base)), section))


def test_everything_that_is_proposed_fits_to_recipes() -> None:
    proposal = propose(studied(falling(32, 2.0)))
    bases = {
        "cifar10-small": [proposal.recipe, proposal.others["experts"]],
        "cifar10-small-relay-second": [proposal.others["relay"]],
        "cifar10-small-lego": [proposal.others["lego"]],
    }
    for base, sections in bases.items():
        for section in sections:
            made = merged(base, section)
            for name, value in section.items():
                got = dump_recipe(made)[name]
                if isinstance(value, dict):
                    lists = {"bricks", "bands"}  # whose entries get further keys
                    assert all(got[k] == v for k, v in value.items() if k not in lists)
                    assert lists & {*value} <= {*got}
                else:
                    assert got == value
    names = [advice.name for advice in proposal.advice]
    assert {"noise levels", "spread of the data", "training levels", "patches", "experts",
            "relay", "LEGO bricks"} <= set(names)  # fmt: skip
    assert all(advice.why for advice in proposal.advice)
    assert len(names) == 7 + len(proposal.bands)


def test_large_crops_are_told_from_smaller_ones() -> None:
    """What a crop of 32 knows inside of a halo, one of 64 knows, too."""
    sigmas, one = np.array([0.1, 1.0, 10.0]), np.ones(3)
    curves = {
        Sight(crop=32): SeenError(np.array([1.1, 1.2, 1.3]), one, one),
        Sight(crop=32, halo=8): SeenError(np.array([1.01, 1.01, 1.2]), one, one),
        Sight(2): SeenError(np.array([2.0, 1.01, 1.0]), one, one),
    }
    measured = studied(np.ones((1, 8, 8)), shape=(1, 128, 128)).measured
    bands = planned_bands(DataStudy(measured, sigmas, curves))
    assert (bands[0].crop, bands[0].halo, bands[1].factor) == (64, 8, 2)


# ---------------------------------------------------------------------------------- the command


def run(*words: object, code: int = 0) -> str:
    ran = CliRunner().invoke(app, ["plan", *map(str, words)], catch_exceptions=True)
    if code:
        assert isinstance(ran.exception, TesseraError), ran.output
        return str(ran.exception)
    assert ran.exit_code == 0, ran.output
    return ran.output


def test_the_command(photos: Path, tmp_path: Path) -> None:
    save, plot = tmp_path / "mine.yaml", tmp_path / "plan.svg"
    shown = run(photos, "--images", 120, "--base", "cifar10-small", "--save", save, "--plot", plot)
    assert "120 of 200 images of photos" in " ".join(shown.split())
    assert "crop of 8, loss on all of it" in shown
    assert f"written to {save}" in " ".join(shown.split())
    recipe = load_recipe(str(save))
    assert recipe.data.path == str(photos)
    assert recipe.network == load_recipe("cifar10-small").network
    plain = json.loads(run(photos, "--images", 120, "--json"))
    assert isinstance(recipe.objective, EdmObjectiveConfig)
    assert plain["recipe"]["objective"]["p_mean"] == recipe.objective.p_mean
    assert plain["bands"][-1]["sigma_max"] is None
    assert plain["bands"][0]["sigma_min"] == 0
    curve = plain["curves"][0]
    assert len(curve["relative"]) == len(plain["sigmas"])
    assert min(curve["relative"]) >= 1 - 1e-9
    picture = plot.read_text()
    assert picture.startswith("<svg xmlns=")
    assert "href" not in picture
    assert picture.count("<polyline") == 3
    assert len(picture) < 30_000


def test_plots_as_a_page_and_as_png(photos: Path, tmp_path: Path) -> None:
    for name in ("plan.html", "plan.png"):
        if name.endswith("png"):
            pytest.importorskip("matplotlib")
        run(photos, "--images", 60, "--plot", tmp_path / name, "--luma")
    html = (tmp_path / "plan.html").read_text()
    assert "For a recipe" in html
    assert "luma" in html
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_png_is_refused_before_anything_is_read(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert ".svg and .html need nothing" in run(photos, "--plot", tmp_path / "a.png", code=2)


def test_mistakes_are_told_before_anything_is_written(photos: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken.yaml"
    taken.write_text("mine")
    assert "taken.yaml" in run(photos, "--save", taken, code=2)
    assert taken.read_text() == "mine"
    assert ".svg" in run(photos, "--plot", tmp_path / "plan.gif", code=2)
    assert "NAME.yaml" in run(photos, "--save", tmp_path / "plan.json", code=2)
    assert "--bound" in run(photos, "--images", 20, "--bound", 1, code=2)
    new = tmp_path / "new.yaml"
    text = run(photos, "--images", 20, "--base", "cifar10-small-mar", "--save", new, code=2)
    assert "the plan for cifar10-small-mar" in text
    assert not new.exists()


def test_keys_are_those_of_the_base(photos: Path) -> None:
    printed = run(photos, "--images", 20)
    section = read_yaml(printed[printed.index("data:\n") :], "printed")
    assert section["data"] == {"path": str(photos), "resolution": 16, "channels": 3}
    assert set(section) == {"data", "preconditioning", "objective", "view", "sampling"}
    with pytest.raises(RecipeError, match="network"):
        parse_recipe(section)  # a part of a recipe, for a base

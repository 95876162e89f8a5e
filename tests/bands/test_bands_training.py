"""Recipes with bands: what a step trains on, and runs, costs and pipelines of such models."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import write_packed
from processes_case import in_processes
from safetensors.torch import load_file
from training_case import read_metrics, tiny_recipe

from tessera.diffusion.bands import BandedDenoiser
from tessera.errors import RecipeError
from tessera.pipelines.loading import estimate, load
from tessera.recipes.build import build_view
from tessera.recipes.loading import dump_recipe, parse_recipe
from tessera.recipes.overrides import apply_overrides
from tessera.recipes.schema import BandConfig, BandsViewConfig, Recipe
from tessera.recipes.views import with_bands_told
from tessera.training.feed import Feed
from tessera.training.run_folder import read_recipe
from tessera.training.trainer import Trainer

SLOW = pytest.mark.slow
COARSE = [{"below": 0.5, "share": 0.5}, {"factor": 2, "share": 0.5}]
CROPS = [{"below": 0.5, "crop": 4, "halo": 1}, {"below": 2}, {"factor": 2}]


def banded(folder: Path, bands: list[dict[str, Any]], **changes: Any) -> Recipe:
    return tiny_recipe(folder, view={"kind": "bands", "bands": bands}, **changes)


def one_colour_each(path: Path, side: int = 8) -> None:
    """Images of which there is much to learn in a few steps."""
    colours = np.random.default_rng(0).integers(0, 256, (30, 3, 1, 1), dtype=np.uint8)
    images = np.broadcast_to(colours, (30, 3, side, side)).copy()
    write_packed(path, images, labels=[i % 2 for i in range(30)])


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(next((run_dir / "pipeline").glob("*.safetensors")))


def train(folder: Path, run_dir: Path, bands: list[dict[str, Any]], **changes: Any) -> Path:
    Trainer(banded(folder, bands, **changes), run_dir).run()
    return run_dir


def test_a_step_trains_on_what_its_band_sees(tmp_path: Path) -> None:
    recipe = banded(tmp_path, CROPS, training={"images": 2000, "micro_batch": 4})
    feed, kinds = Feed(recipe, torch.device("cpu")), Counter[int]()
    with feed.batches(0) as batches:
        for batch in batches:
            band = batch.plan.band
            assert band is not None
            kinds[band] += 1
            side, multiplier = ((4, 2), (8, 1), (8, 2))[band]
            assert batch.plan.images == 8 * multiplier
            for micro in feed.micro_batches(batch):
                assert micro.x.shape == (4 * multiplier, 3, side, side)
                assert micro.draws.band == band
                assert (micro.cond.coords is None) == (band > 0)
    assert len(kinds) == 3
    view = build_view(recipe)
    shares = [share for _, share in view.shares()]
    assert sum(shares) == pytest.approx(1)
    for band, share in enumerate(shares):
        assert kinds[band] / kinds.total() == pytest.approx(share, abs=0.12)


def test_one_band_of_whole_images_is_the_full_view_bit_for_bit(tmp_path: Path) -> None:
    ours = train(tmp_path, tmp_path / "bands", [{}], training={"images": 32})
    Trainer(tiny_recipe(tmp_path, training={"images": 32}), tmp_path / "full").run()
    theirs = weights(tmp_path / "full")
    assert all(torch.equal(theirs[name], tensor) for name, tensor in weights(ours).items())
    assert read_metrics(ours) == read_metrics(tmp_path / "full")


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    size = {"training": {"images": 96}, "run": {"checkpoint_every_images": 16}}
    whole = train(tmp_path, tmp_path / "whole", CROPS, **size)
    steps = Trainer(banded(tmp_path, CROPS, **size), tmp_path / "broken").steps()
    for _ in range(4):
        next(steps)
    steps.close()
    Trainer(resume=tmp_path / "broken").run()
    broken = weights(tmp_path / "broken")
    assert all(torch.equal(broken[name], tensor) for name, tensor in weights(whole).items())


def _train_here(folder: Path, run_dir: Path) -> None:
    train(folder, run_dir, CROPS, training={"images": 64, "micro_batch": 2},
          optimizer={"eps": 1e-2})  # fmt: skip


@SLOW
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    banded(tmp_path, CROPS)
    for world in (1, 2):
        in_processes(world, _train_here, tmp_path, tmp_path / str(world))
    two = weights(tmp_path / "2")
    for name, tensor in weights(tmp_path / "1").items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_loss_on_other_images_is_that_of_all_noise_levels(tmp_path: Path) -> None:
    """The same weights have the same validation loss, however the steps are shared out."""
    found = []
    for shares in ((0.5, 0.5), (0.1, 0.9)):
        bands = [{**band, "share": share} for band, share in zip(COARSE, shares, strict=True)]
        run = train(tmp_path, tmp_path / str(shares[0]), bands, data={"held_out": 0.3},
                    optimizer={"lr": 1e-12}, training={"images": 32})  # fmt: skip
        lines = [line for line in read_metrics(run) if "validation/loss" in line]
        found.append(lines[-1]["validation/loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_pipeline_of_bands_samples_as_its_run_and_on_small_images(tmp_path: Path) -> None:
    run = train(tmp_path, tmp_path / "run", COARSE, training={"images": 32})
    pipeline = load(run)
    assert isinstance(pipeline.model, BandedDenoiser)
    images = pipeline.sample(seeds=range(3), labels=[0, 1, 0], steps=4)
    pipeline.save(tmp_path / "saved")
    again = load(tmp_path / "saved").sample(seeds=range(3), labels=[0, 1, 0], steps=4)
    assert (images == again).all()
    sides: list[int] = []
    hook = pipeline.model.network.register_forward_pre_hook(
        lambda _, inputs: sides.append(inputs[0].shape[-1])
    )
    pipeline.sample(seeds=[0], steps=4, guidance=2.0)
    hook.remove()
    assert set(sides) == {4, 8}
    assert sides == sorted(sides), "small ones first"


def test_cost_counts_what_is_seen(tmp_path: Path) -> None:
    # As far as the network is convolutions, cost goes with the pixels.
    shape = {"data": {"resolution": 16},
             "network": {"attn_resolutions": [], "channel_mult": [1, 1]}}  # fmt: skip
    full = estimate(tiny_recipe(tmp_path, coords={"frequencies": 0}, **shape))
    coarse = estimate(banded(tmp_path, COARSE, **shape))
    assert coarse.train_flops / full.train_flops == pytest.approx((1 + 2 / 4) / 3, rel=0.05)
    assert coarse.sample_flops < 0.95 * full.sample_flops
    crops = estimate(banded(tmp_path, [{"crop": 4, "multiplier": 1}], **shape))
    assert crops.train_flops / full.train_flops == pytest.approx(1 / 16, rel=0.1)
    assert crops.activation_bytes < 0.1 * full.activation_bytes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bands": []}, r"view\.bands: .*at least 1"),
        ({"bands": [{"below": -1}, {}]}, r"view\.bands\.0\.below: must be greater"),
        ({"bands": [{"below": 1.0}]}, "every band but the last"),
        ({"bands": [{"below": 2.0}, {"below": 1.0}, {}]}, "these rise"),
        ({"bands": [{}, {"factor": 2}]}, "every band but the last"),
        ({"bands": [{"below": 1, "share": 0.5}, {}]}, "all bands a share"),
        ({"bands": [{"below": 1, "share": 0.5}, {"share": 0.4}]}, "add up to 0.9"),
        ({"bands": [{"crop": 4, "factor": 2}]}, "not both"),
        ({"bands": [{"halo": 1}]}, "set crop"),
        ({"bands": [{"crop": 4, "halo": 2}]}, "nothing inside"),
        ({"bands": [{"crop": 8}]}, "the images have 8 pixels"),
        ({"bands": [{"factor": 3}]}, "must divide"),
        ({"bands": [{"factor": 8}]}, "the network sees 1 pixels"),
    ],
)
def test_bands_that_do_not_fit_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        banded(tmp_path, changes["bands"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": {"kind": "discrete"}, "preconditioning": {"kind": "discrete"}},
         "objective.kind=discrete"),
        ({"objective": {"kind": "blur", "block": 2}, "sampling": {"kind": "relay"}},
         "objective.kind=blur"),
        ({"preconditioning": {"kind": "iddpm"}}, "preconditioning.kind=iddpm"),
        ({"low_resolution": 4}, "low_resolution"),
        ({"network": {"kind": "energy_dit"}}, "energy of means"),
    ],
)  # fmt: skip
def test_methods_that_bands_do_not_go_with_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        banded(tmp_path, COARSE, **changes)


def test_a_band_without_noise_levels_of_the_objective_is_refused(tmp_path: Path) -> None:
    bands = [{"below": 1e-3, "share": 0.5}, {"share": 0.5}]
    recipe = banded(tmp_path, bands, objective={"kind": "ve"})
    with pytest.raises(RecipeError, match="objective draws none"):
        build_view(recipe)


NETWORKS: dict[str, dict[str, Any]] = {
    "patched_unet": {
        "kind": "patched_unet", "patch_size": 2, "model_channels": 32, "channel_mult": [1],
        "num_blocks": 1, "attn_resolutions": [4],
    },
    "lego": {
        "kind": "lego", "width": 16, "heads": 2,
        "bricks": [{"size": 4, "patch": 2, "depth": 1}, {"size": 8, "patch": 2, "depth": 1}],
    },
    "adm_unet": {
        "kind": "adm_unet", "model_channels": 32, "channel_mult": [1], "num_blocks": 1,
        "attn_resolutions": [4], "dropout": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "process"),
    [
        ("patched_unet", "edm"),
        pytest.param("patched_unet", "vp", marks=SLOW),
        pytest.param("patched_unet", "ve", marks=SLOW),
        pytest.param("lego", "edm", marks=SLOW),
        pytest.param("adm_unet", "edm", marks=SLOW),
    ],
)
def test_bands_teach_every_network_and_process(kind: str, process: str, tmp_path: Path) -> None:
    """The loss on other images, at all noise levels, falls by steps that each see one band."""
    data = tiny_recipe(tmp_path).model_dump(mode="json")
    one_colour_each(Path(data["data"]["path"]))
    data |= {"network": NETWORKS[kind], "view": {"kind": "bands", "bands": COARSE}}
    data |= {"objective": {"kind": process}, "preconditioning": {"kind": process}}
    data["data"]["held_out"] = 0.3
    data["optimizer"] |= {"lr": 2e-3, "rampup_images": 0}
    data["ema"] = [{"halflife_images": 1}]
    data["training"] |= {"images": 240}
    data["validation"] = {"every_images": 24, "images": 9}
    Trainer(parse_recipe(data), tmp_path / "run").run()
    lines = [line for line in read_metrics(tmp_path / "run") if "validation/loss" in line]
    losses = [line["validation/loss"] for line in lines]
    assert losses[-1] < 0.98 * losses[0]


def test_the_images_choose_the_bands(tmp_path: Path) -> None:
    """`view=auto`: what `tessera plan` proposes, as far as the network takes it."""
    tiny = tiny_recipe(tmp_path, training={"images": 16}, data={"resolution": 32})
    one_colour_each(Path(str(tiny.data.path)), 32)
    plain = apply_overrides(dump_recipe(tiny), ["view=auto"])
    trainer = Trainer(parse_recipe(plain), tmp_path / "run")
    assert trainer.recipe.view == BandsViewConfig(bands=(BandConfig(factor=4),))
    trainer.run()
    assert read_recipe(tmp_path / "run").view == trainer.recipe.view


def test_bands_of_images_that_are_not_there(tmp_path: Path) -> None:
    plain = dump_recipe(tiny_recipe(tmp_path)) | {"view": "auto"}
    recipe = parse_recipe(plain | {"data": {"resolution": 8}})
    with pytest.raises(RecipeError, match=r"data\.path names none"):
        with_bands_told(recipe)
    with pytest.raises(RecipeError, match="decided by the images"):
        build_view(recipe)

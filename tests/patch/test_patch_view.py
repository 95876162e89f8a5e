"""Random patches: coordinates, sizes, the schedule, and what reaches the network in training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import random_images, write_packed
from hypothesis import given
from hypothesis import strategies as st
from training_case import tiny_recipe

from tessera.conditioning import Conditioning, full_grid
from tessera.cost import estimate
from tessera.data.loader import StepPlan
from tessera.data.views import PatchView, crop, patch_coordinates, patch_sizes
from tessera.errors import RecipeError
from tessera.images import from_uint8
from tessera.randomness import AddressedDraws
from tessera.recipes.build import build_denoiser, build_view
from tessera.recipes.loading import load_recipe
from tessera.training.feed import Feed
from tessera.training.trainer import Trainer

CPU = torch.device("cpu")


@given(st.data())
def test_coordinates_are_the_crop_of_the_full_grid(data: st.DataObject) -> None:
    resolution = data.draw(st.integers(2, 512))
    side = data.draw(st.integers(1, resolution))
    offsets = st.lists(st.integers(0, resolution - side), min_size=1, max_size=3)
    rows = torch.tensor(data.draw(offsets))
    columns = torch.tensor(data.draw(st.permutations(rows.tolist())))
    grid = full_grid((resolution, resolution)).expand(len(rows), -1, -1, -1)
    expected = crop(grid, rows, columns, side)
    assert torch.equal(patch_coordinates(rows, columns, side, resolution), expected)
    corners = grid[0, :, [0, -1], [0, -1]]
    assert corners.tolist() == [[-1, 1], [-1, 1]]


@given(st.integers(0, 2**31), st.integers(1, 16), st.sampled_from([torch.uint8, torch.float32]))
def test_patch_is_cut_where_its_coordinates_say(seed: int, side: int, dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (5, 3, 16, 16)).to(dtype)
    view = PatchView(16, 5, patch_sizes(16, (side,), 1.0), seed=0)
    draws = AddressedDraws(seed, torch.arange(5))
    patch, coords = view.apply(images, draws, StepPlan(0, 5, side))
    assert patch.dtype == dtype
    assert patch.shape == (5, 3, side, side)
    if side == 16:
        assert coords is None
        assert patch is images
        return
    assert coords is not None
    first = ((coords[:, :, 0, 0] + 1) / 2 * 15).round().to(torch.int64).tolist()
    for image, part, (x, y) in zip(images, patch, first, strict=True):
        assert torch.equal(part, image[:, y : y + side, x : x + side])


def test_offsets_reach_every_place_and_differ_between_images() -> None:
    draws = AddressedDraws(0, torch.arange(2000))
    images = torch.arange(25).reshape(1, 1, 5, 5).expand(2000, -1, -1, -1)
    view = PatchView(5, 2000, patch_sizes(5, (2, 5), 0.0), seed=0)
    patch, _ = view.apply(images, draws, StepPlan(0, 2000, 2))
    counts = Counter(patch[:, 0, 0, 0].tolist())
    assert sorted(counts) == [r * 5 + c for r in range(4) for c in range(4)]
    assert min(counts.values()) > 80


def sizes_of(view: PatchView, steps: int) -> list[StepPlan]:
    plans, seen = [], 0
    for _ in range(steps):
        plans.append(view.plan(seen))
        seen += plans[-1].images
    return plans


def test_stochastic_sizes_have_their_probabilities_and_batches() -> None:
    view = PatchView(32, 10, patch_sizes(32, (8, 16, 32), 0.5), seed=1)
    plans = sizes_of(view, 3000)
    shares = Counter(plan.patch for plan in plans)
    for side, share in ((8, 0.2), (16, 0.3), (32, 0.5)):
        assert shares[side] / 3000 == pytest.approx(share, abs=0.03)
    assert {(p.patch, p.images) for p in plans} == {(8, 40), (16, 20), (32, 10)}
    # A pure function of seed and images seen.
    assert plans[77] == view.plan(plans[77].first_image)
    again = PatchView(32, 10, patch_sizes(32, (8, 16, 32), 0.5), seed=2)
    assert [p.patch for p in sizes_of(again, 50)] != [p.patch for p in plans[:50]]


@pytest.mark.parametrize(("real_p", "expected"), [(0.0, {8, 16}), (1.0, {32})])
@pytest.mark.parametrize("progressive", [False, True])
def test_extreme_probabilities(real_p: float, expected: set[int], progressive: bool) -> None:
    view = PatchView(
        32, 1, patch_sizes(32, (8, 16, 32), real_p), seed=0, progressive=progressive,
        total_images=100,
    )  # fmt: skip
    assert {plan.patch for plan in sizes_of(view, 100)} == expected


def test_progressive_goes_from_small_to_large() -> None:
    view = PatchView(
        32, 1, patch_sizes(32, (8, 16, 32), 0.5), seed=0, progressive=True, total_images=1000
    )
    assert [view.size(n).side for n in (0, 199, 200, 499, 500, 999, 5000)] == [
        8, 8, 16, 16, 32, 32, 32,
    ]  # fmt: skip


def test_cost_counts_the_sizes(tmp_path: Path) -> None:
    # Without attention, and as far as the network is convolutions, cost goes with the pixels.
    network = {"network": {"attn_resolutions": [], "channel_mult": [1, 1]}}
    options = {"data": {"resolution": 32}, "coords": {"frequencies": 0}, **network}
    full = estimate(tiny_recipe(tmp_path, **options))
    patch = estimate(tiny_recipe(tmp_path, view={"kind": "patches", "real_p": 0.5}, **options))
    assert patch.parameters == full.parameters
    assert patch.forward_flops == full.forward_flops
    # (0.2 · 4/16 + 0.3 · 2/4 + 0.5) / (0.2 · 4 + 0.3 · 2 + 0.5)
    assert patch.train_flops / full.train_flops == pytest.approx(0.70 / 1.9, rel=0.05)
    assert patch.activation_bytes == full.activation_bytes


def patch_recipe(folder: Path, **changes: Any):
    view = {"kind": "patches", "sizes": [2, 4, 8], **changes.pop("view", {})}
    return tiny_recipe(folder, view=view, **changes)


def test_training_feeds_patches_of_one_size_a_step(tmp_path: Path) -> None:
    recipe = patch_recipe(tmp_path, training={"micro_batch": 2, "images": 800})
    feed = Feed(recipe, CPU)
    seen = set()
    with feed.batches(0) as batches:
        for batch in batches:
            side, rounds = batch.plan.patch, list(feed.micro_batches(batch))
            assert side is not None
            seen.add(side)
            assert batch.plan.images == 8 * 8 // side
            assert len(rounds) == 4, "small patches come more at a time, not in more rounds"
            start = 0
            for micro in rounds:
                assert micro.x.dtype == torch.float32
                assert micro.x.shape == (2 * 8 // side, 3, side, side)
                coords = micro.cond.coords
                for index, image in enumerate(micro.x):
                    whole = from_uint8(batch.images[start])
                    x = y = 0
                    if coords is not None:
                        x, y = (
                            ((coords[index, :, 0, 0] + 1) / 2 * 7).round().to(torch.int64).tolist()
                        )
                    assert torch.equal(image, whole[:, y : y + side, x : x + side])
                    start += 1
    assert seen == {2, 4, 8}


def test_augmentation_sees_whole_images(tmp_path: Path) -> None:
    recipe = patch_recipe(
        tmp_path,
        view={"sizes": [4], "probabilities": [1.0]},
        augment={"p": 1.0, "xflip": 0, "scale": 0, "rotate_frac": 0, "aniso": 0,
                 "translate_frac": 0, "yflip": 1e8},
    )  # fmt: skip
    feed = Feed(recipe, CPU)
    with feed.batches(0) as batches:
        batch = next(batches)
    (micro,) = feed.micro_batches(batch)
    assert micro.cond.augment is not None
    assert micro.cond.coords is not None
    flips = 0
    for index in range(len(batch.images)):
        x, y = ((micro.cond.coords[index, :, 0, 0] + 1) / 2 * 7).round().to(torch.int64).tolist()
        image = from_uint8(batch.images[index])
        if micro.cond.augment[index].any():
            flips += 1
            image = image.flip(1)
        assert torch.allclose(micro.x[index], image[:, y : y + 4, x : x + 4], atol=1e-5)
    assert 0 < flips < len(batch.images)


def test_weight_of_patches(tmp_path: Path) -> None:
    plain = build_view(patch_recipe(tmp_path))
    mean = build_view(patch_recipe(tmp_path, view={"per_pixel": True}))
    plan = StepPlan(0, 16, 4)
    assert plain.loss_weight(plan) == 1
    assert mean.loss_weight(plan) == 4
    assert mean.loss_weight(StepPlan(0, 8, 8)) == 1


@pytest.mark.parametrize("per_pixel", [False, True])
def test_patches_weigh_the_same_whether_the_loss_is_a_sum_or_a_mean(
    tmp_path: Path, per_pixel: bool
) -> None:
    view = {"per_pixel": per_pixel}
    summed = build_view(patch_recipe(tmp_path, view=view))
    discrete = {
        "preconditioning": {"kind": "discrete"},
        "objective": {"kind": "discrete", "label_dropout": 0},
    }
    averaged = build_view(patch_recipe(tmp_path, view=view, **discrete))
    for side in (2, 4, 8):
        plan = StepPlan(0, 8, side)
        expected = summed.loss_weight(plan) * (side / 8) ** 2
        assert averaged.loss_weight(plan) == pytest.approx(expected)
    # Of whole images nothing changes.
    assert averaged.loss_weight(StepPlan(0, 8, 8)) == 1


@pytest.mark.parametrize("preconditioning", ["edm", "vp", "ve", "iddpm"])
def test_every_preconditioning_trains_on_patches(tmp_path: Path, preconditioning: str) -> None:
    recipe = patch_recipe(
        tmp_path,
        view={"real_p": 0.2},
        training={"images": 40},
        preconditioning={"kind": preconditioning},
        objective={"kind": {"iddpm": "edm"}.get(preconditioning, preconditioning)},
        run={"dir": str(tmp_path / "run")},
    )
    trainer = Trainer(recipe, tmp_path / "run")
    reports = list(trainer.steps())
    assert {report.images for report in reports} != set(range(8, 41, 8))
    assert all(bool(report.update.bad == 0) for report in reports)
    assert torch.isfinite(reports[-1].update.terms["loss"])


@pytest.mark.parametrize("kind", ["song_unet", "adm_unet"])
@pytest.mark.parametrize("frequencies", [0, 3])
def test_networks_use_coordinates(tmp_path: Path, kind: str, frequencies: int) -> None:
    network: dict[str, Any] = {"kind": kind, "attn_resolutions": []}
    if kind == "song_unet":
        network |= {"embedding": "fourier", "encoder": "residual"}
    recipe = tiny_recipe(tmp_path, coords={"frequencies": frequencies}, network=network)
    denoiser = build_denoiser(recipe).eval()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    z, sigma = torch.randn(2, 3, 8, 8), torch.tensor(1.0)
    whole = full_grid((8, 8)).expand(2, -1, -1, -1)
    with torch.no_grad():
        default = denoiser(z, sigma, Conditioning()).mean
        same = denoiser(z, sigma, Conditioning(coords=whole)).mean
        other = denoiser(z, sigma, Conditioning(coords=-whole)).mean
        scaled = denoiser(z, torch.tensor(3.0), Conditioning(coords=torch.zeros_like(whole))).mean
    assert torch.equal(default, same)
    assert not torch.allclose(default, other, atol=1e-4)
    assert scaled.isfinite().all()


def refusal(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe("cifar10-small-patch", overrides)
    return str(caught.value)


def test_what_cannot_work_is_refused() -> None:
    assert "multiple of 8" in refusal("network.channel_mult=1,2,2,2", "view.sizes=4,16,32")
    assert "their side must be a multiple of 16" in refusal("network.channel_mult=1,2,2,2,2")
    assert "64 pixels, but the images have 32" in refusal("view.sizes=16,64")
    assert "rise" in refusal("view.sizes=16,8,32")
    assert "2 entries" in refusal("view.probabilities=0.5,0.5")
    assert "must make 1" in refusal("view.probabilities=0.5,0.5,0.5")
    assert "up to 3" in refusal("view.sizes=8,12,16,32")
    assert "implicit_mlp" in refusal("network={kind: adm_unet, implicit_mlp: true}")
    assert "halved twice" in refusal("data.resolution=18", "network.channel_mult=1,2")


def test_custom_sizes() -> None:
    recipe = load_recipe(
        "cifar10-small-patch",
        ["view.sizes=16,24", "view.probabilities=0.25,0.75", "view.multipliers=3,1"],
    )
    view = build_view(recipe)
    assert isinstance(view, PatchView)
    assert [(s.side, s.probability, s.multiplier) for s in view.sizes] == [
        (16, 0.25, 3), (24, 0.75, 1),
    ]  # fmt: skip


def test_a_packed_set_larger_than_a_batch(tmp_path: Path) -> None:
    """Steps of small patches take more images than the batch, and none twice in an epoch."""
    path = tmp_path / "large.safetensors"
    write_packed(path, random_images(64), labels=[0, 1] * 32)
    recipe = patch_recipe(tmp_path, data={"path": str(path)}, training={"images": 64})
    numbers: list[int] = []
    with Feed(recipe, CPU).batches(0) as batches:
        for batch in batches:
            numbers += batch.numbers.tolist()
    assert numbers == list(range(len(numbers)))

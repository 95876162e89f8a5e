"""Bands of noise levels that belong to the first bricks of a stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes_case import in_processes
from safetensors.torch import load_file
from training_case import read_metrics, tiny_recipe

from tessera.conditioning import Conditioning
from tessera.diffusion.bands import BandedDenoiser
from tessera.diffusion.linear import LinearDenoiser
from tessera.diffusion.skipping import cut_bricks, parse_schedule
from tessera.errors import RecipeError
from tessera.pipelines.bricks import brick_picture
from tessera.pipelines.loading import estimate, load
from tessera.recipes.build import build_denoiser
from tessera.recipes.schema import Recipe
from tessera.training.trainer import Trainer

STACK = {
    "kind": "lego", "width": 16, "heads": 2,
    "bricks": [
        {"size": 2, "patch": 2, "depth": 1}, {"size": 4, "patch": 2, "depth": 1},
        {"size": 8, "patch": 2, "depth": 1},
    ],
}  # fmt: skip
OWNED = [{"below": 0.3, "bricks": 1}, {"below": 1.0, "bricks": 2}, {}]


def stacked(folder: Path, bands: list[dict[str, Any]], **changes: Any) -> Recipe:
    view = {"kind": "bands", "bands": bands}
    return tiny_recipe(folder, **({"network": STACK, "view": view} | changes))


def given(sigma: float) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return z, torch.full((2,), sigma), Conditioning(torch.tensor([0, 1]))


def stirred(recipe: Recipe) -> BandedDenoiser:
    """The recipe's denoiser, of whose weights none are zero."""
    torch.manual_seed(0)
    denoiser = build_denoiser(recipe)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert isinstance(denoiser, BandedDenoiser)
    return denoiser.eval()


@torch.no_grad()
def test_each_band_is_made_by_its_bricks(tmp_path: Path) -> None:
    banded = stirred(stacked(tmp_path, OWNED))
    whole = banded._by_bricks[None]
    for sigma, bricks in ((0.01, 1), (0.3, 2), (0.99, 2), (1.0, 3), (80.0, 3)):
        prefix = whole.around(whole.network.prefix(bricks))
        expected = prefix(*given(sigma)).mean
        assert torch.equal(banded(*given(sigma)).mean, expected)
        assert torch.equal(banded.for_step(sigma)(*given(5.0)).mean, prefix(*given(5.0)).mean)
    z, _, cond = given(0.1)
    mixed = banded(z, torch.tensor([0.1, 5.0]), cond).mean
    for row, sigma in enumerate((0.1, 5.0)):
        alone = banded(*given(sigma)).mean[row]
        torch.testing.assert_close(mixed[row], alone, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_skipping_leaves_out_more_but_never_asks_for_bricks_that_a_band_has_not(
    tmp_path: Path,
) -> None:
    banded = stirred(stacked(tmp_path, OWNED))
    whole = banded._by_bricks[None]
    cut = cut_bricks(banded, parse_schedule("0-0.1:2,0.5-2:1"))
    for sigma, bricks in ((0.05, 1), (0.2, 1), (0.4, 2), (0.7, 1), (1.5, 1), (3.0, 3)):
        prefix = whole.around(whole.network.prefix(bricks))
        assert torch.equal(cut(*given(sigma)).mean, prefix(*given(sigma)).mean)


def test_a_step_trains_the_bricks_of_its_band_only(tmp_path: Path) -> None:
    recipe = stacked(tmp_path, [{"bricks": 2}], training={"images": 32})
    trainer = Trainer(recipe, tmp_path / "run")
    before = {k: v.clone() for k, v in trainer.learner.step.model.network.state_dict().items()}
    trainer.run()
    after = trainer.learner.step.model.network.state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("model.0.") for name in moved)
    assert any(name.startswith("model.1.") for name in moved)
    assert not any(name.startswith("model.2.") for name in moved)


def test_all_bricks_in_all_bands_are_the_full_view_bit_for_bit(tmp_path: Path) -> None:
    size = {"images": 32}
    Trainer(stacked(tmp_path, [{"bricks": 3}], training=size), tmp_path / "bands").run()
    Trainer(tiny_recipe(tmp_path, network=STACK, training=size), tmp_path / "full").run()
    ours, theirs = (
        load_file(next((tmp_path / name / "pipeline").glob("*.safetensors")))
        for name in ("bands", "full")
    )
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    assert read_metrics(tmp_path / "bands") == read_metrics(tmp_path / "full")


def test_a_linear_start_learns_band_by_band_stops_and_goes_on(tmp_path: Path) -> None:
    """Both together: the loss falls below that of the start, and a resumed run ends as another."""
    changes = {
        "preconditioning": {"kind": "linear"}, "data": {"held_out": 0.3},
        "training": {"images": 240}, "optimizer": {"lr": 2e-3, "rampup_images": 0},
        "run": {"checkpoint_every_images": 80}, "validation": {"every_images": 80, "images": 9},
    }  # fmt: skip
    recipe = stacked(tmp_path, OWNED, **changes)
    Trainer(recipe, tmp_path / "whole").run()
    losses = [
        line["validation/loss"]
        for line in read_metrics(tmp_path / "whole")
        if "validation/loss" in line
    ]
    assert losses[-1] < losses[0]
    steps = Trainer(recipe, tmp_path / "broken").steps()
    for _ in range(13):
        next(steps)
    steps.close()
    Trainer(resume=tmp_path / "broken").run()
    pipelines = [load(tmp_path / name) for name in ("whole", "broken")]
    assert isinstance(pipelines[0].model._by_bricks[None], LinearDenoiser)
    one, other = (p.sample(range(3), labels=[0, 1, 0], steps=4) for p in pipelines)
    assert (one == other).all()
    pipelines[0].save(tmp_path / "saved")
    again = load(tmp_path / "saved").sample(range(3), labels=[0, 1, 0], steps=4)
    assert (np.asarray(one) == np.asarray(again)).all()
    assert brick_picture(pipelines[0], 0, None, rows=2, steps=4).ndim == 3


def test_a_stack_with_a_linear_start_can_skip(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, network=STACK, preconditioning={"kind": "linear"},
                         training={"images": 64})  # fmt: skip
    Trainer(recipe, tmp_path / "run").run()
    pipeline = load(tmp_path / "run")
    short, whole = (pipeline.sample(range(2), steps=4, skip=skip) for skip in (0.5, 0.0))
    assert (short != whole).any()


def test_less_is_computed(tmp_path: Path) -> None:
    full = estimate(tiny_recipe(tmp_path, network=STACK))
    owned = estimate(stacked(tmp_path, OWNED))
    assert owned.parameters == full.parameters
    assert owned.train_flops < 0.8 * full.train_flops
    assert owned.sample_flops < 0.9 * full.sample_flops
    assert owned.evaluations == full.evaluations


@pytest.mark.parametrize(
    ("bricks", "network", "words"),
    [
        (4, STACK, r"view\.bands\.0\.bricks=4: this network has 3 bricks"),
        (1, STACK | {"joint": False}, "network.joint=true"),
        (2, {}, "set network.kind=lego"),
        (0, STACK, r"view\.bands\.0\.bricks: must be"),
    ],
)
def test_bricks_that_are_not_there_are_refused(
    bricks: int, network: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        stacked(tmp_path, [{"below": 1, "bricks": bricks}, {}], network=network)


def _train_here(folder: Path, run_dir: Path, mode: str) -> None:
    recipe = stacked(folder, OWNED, optimizer={"eps": 1e-2},
                     training={"images": 96, "micro_batch": 2, "parallel": mode})  # fmt: skip
    Trainer(recipe, run_dir).run()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_train_as_one(mode: str, tmp_path: Path) -> None:
    stacked(tmp_path, OWNED)
    for world in (1, 2):
        in_processes(world, _train_here, tmp_path, tmp_path / str(world), mode)
    one, two = (
        load_file(next((tmp_path / str(world) / "pipeline").glob("*.safetensors")))
        for world in (1, 2)
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)

"""Skipping bricks, windows, larger pictures, through pipelines and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lego_case import tiny_pipeline
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from tessera.cli import app
from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser, Posterior
from tessera.diffusion.guidance import Guided
from tessera.diffusion.skipping import (
    BrickSchedule,
    Range,
    cut_bricks,
    last_brick_schedule,
    parse_schedule,
)
from tessera.diffusion.windows import Windows
from tessera.errors import TesseraError
from tessera.pipelines.base import Pipeline
from tessera.pipelines.bricks import brick_picture
from tessera.pipelines.experts import ExpertsPipeline
from tessera.pipelines.generate import Job, generate_folder
from tessera.recipes.build import build_denoiser, build_sampler
from tessera.recipes.loading import load_recipe
from tessera.recipes.schema import AblationSamplerConfig, EdmSamplerConfig

LEVELS = [80.0, 20.0, 5.0, 1.0, 0.1]


@pytest.mark.parametrize(
    ("sizes", "ratio", "skipped"),
    [
        ((4, 16, 64), 0.4, [3, 4]),  # PG: the global brick, at low noise
        ((64, 16, 4), 0.4, [0, 1]),  # PR: the local brick, at high noise
        ((64, 16, 4, 16, 64), 0.2, [4]),  # U: as PG
        ((4, 16), 0.0, []),
        ((16, 4), 1.0, [0, 1, 2, 3, 4]),
        ((64, 16, 4), 0.09, []),
    ],
)
def test_direction_follows_from_the_bricks(
    sizes: tuple[int, ...], ratio: float, skipped: list[int]
) -> None:
    schedule = last_brick_schedule(sizes, ratio, LEVELS)
    prefixes = [schedule.bricks(level) for level in LEVELS]
    assert [i for i, prefix in enumerate(prefixes) if prefix is not None] == skipped
    assert {p for p in prefixes if p is not None} <= {len(sizes) - 1}


@pytest.mark.parametrize("sizes", [(16,), (8, 8), (4, 16, 8)])
def test_no_rule_for_other_stacks(sizes: tuple[int, ...]) -> None:
    with pytest.raises(TesseraError, match="no last brick"):
        last_brick_schedule(sizes, 0.4, LEVELS)


def test_schedule_as_text() -> None:
    schedule = parse_schedule("0-0.5:2, 20-inf:1")
    assert [schedule.bricks(s) for s in (0, 0.49, 0.5, 19, 20, 1e9)] == [2, 2, None, None, 1, 1]
    small = BrickSchedule((Range(0.0, 2e-5, 1),))
    assert all(parse_schedule(str(given)) == given for given in (schedule, small))
    for text in ("0-0.5", "0.5-0:1", "a-1:1", "0-1:x", ""):
        with pytest.raises(TesseraError, match="bricks"):
            parse_schedule(text)


@pytest.mark.parametrize(
    "section", [EdmSamplerConfig(steps=5), AblationSamplerConfig(steps=5, alpha=0.5)]
)
def test_steps_of_a_sampler(section: EdmSamplerConfig | AblationSamplerConfig) -> None:
    levels = build_sampler(section).levels(tiny_pipeline().denoiser)
    assert len(levels) == 5
    assert levels == sorted(levels, reverse=True)
    assert levels[0] == pytest.approx(80)
    assert levels[-1] == pytest.approx(0.002)


def prefixes_of(pipe: Pipeline, **options: Any) -> list[tuple[int, int | None]]:
    """(images, bricks) of each call of the network while sampling two images."""
    calls: list[tuple[int, int | None]] = []
    plan = pipe.plan([0, 1], labels=3, **options)
    handles = [
        network.register_forward_pre_hook(
            lambda network, inputs: calls.append((len(inputs[0]), getattr(network, "bricks", None)))
        )
        for network in plan.networks()
    ]
    list(pipe.run(plan, [0, 1]))
    for handle in handles:
        handle.remove()
    return calls


def test_both_evaluations_of_late_steps_skip_also_under_guidance() -> None:
    pipe = tiny_pipeline()
    assert prefixes_of(pipe) == [(2, None)] * 9
    assert prefixes_of(pipe, skip=0.4) == [(2, None)] * 6 + [(2, 1)] * 3
    assert prefixes_of(pipe, skip=0.4, guidance=2.0) == [(4, None)] * 6 + [(4, 1)] * 3
    limited = prefixes_of(pipe, skip=0.4, guidance=2.0, guidance_interval=(0.01, 1.0))
    assert [count for count, _ in limited] == [2, 2, 2, 2, 2, 4, 4, 2, 2]
    assert [bricks for _, bricks in limited] == [None] * 6 + [1] * 3
    assert prefixes_of(pipe, bricks="50-inf:1") == [(2, 1)] * 2 + [(2, None)] * 7


def test_skipped_bricks_compute_nothing() -> None:
    pipe = tiny_pipeline()
    images = [0, 0]
    for index, brick in enumerate(pipe.denoiser.network.model):

        def count(_module: Any, inputs: tuple[Tensor, ...], index: int = index) -> None:
            images[index] += len(inputs[0])

        brick.register_forward_pre_hook(count)
    pipe.sample([0, 1], 3, skip=0.4)
    assert images == [9 * 2, 6 * 2]
    images[:] = 0, 0
    pipe.sample([0, 1], 3, skip=0.4, guidance=2.0)
    assert images == [9 * 4, 6 * 4]


def test_experts_of_bricks_skip_and_show() -> None:
    pipe = ExpertsPipeline([tiny_pipeline(), tiny_pipeline()], [1.0])
    assert prefixes_of(pipe, skip=0.4) == [(2, None)] * 6 + [(2, 1)] * 3
    assert brick_picture(pipe, 0, 3, rows=2).shape[2] == 3


@pytest.mark.slow
def test_experts_of_different_stacks_skip_by_their_own_sizes(tmp_path: Path) -> None:
    """The clean one leaves out its largest brick at the end, the noisy one its smallest first."""
    clean, noisy = (
        tiny_pipeline(
            "network.bricks="
            + json.dumps([{"size": size, "patch": size // 4, "depth": 1} for size in sizes])
        )
        for sizes in ((4, 8, 16), (16, 4))
    )
    pipe = ExpertsPipeline([clean, noisy], [1.0])
    sigmas = build_sampler(pipe.recipe.sampling).levels(pipe.denoiser)
    assert [sigma >= 1 for sigma in sigmas] == [True] * 3 + [False] * 2
    kept = prefixes_of(pipe, skip=0.4)
    assert kept == [(2, 1)] * 4 + [(2, None)] * 2 + [(2, 2)] * 3
    # Savings are counted on the networks that ran.
    job = Job(pipe, [0, 1], 3, 2, {"skip": 0.4})
    saved = generate_folder(job, tmp_path / "s").saved_flops
    cost = [pipe.cost(skip=skip).sample_flops for skip in (0.0, 0.4)]
    assert saved == pytest.approx(1 - cost[1] / cost[0])
    # Numbers of bricks are those of the expert whose noise levels they are for.
    assert prefixes_of(pipe, bricks="0-0.1:2")[-1] == (2, 2)
    with pytest.raises(TesseraError, match="cannot run 3 bricks"):
        pipe.sample([0], 3, bricks="20-inf:3")
    with pytest.raises(TesseraError, match="no picture of bricks in common"):
        brick_picture(pipe, 0, 3)


def test_labels_of_the_picture_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(
        "PIL.ImageDraw.ImageDraw.text", lambda _self, _place, text, *_: written.append(text)
    )
    brick_picture(tiny_pipeline(), 0, 3, rows=2)
    assert written[:3] == ["noisy image", "brick 1: 4 px", "brick 2: 16 px"]
    # Pillow's own font draws a box for any other letter.
    assert all(text.isascii() for text in written)
    assert written[-1] == "noise 0.002"


def test_skipping_changes_the_picture_and_nothing_else() -> None:
    pipe = tiny_pipeline()
    plain, skipped = pipe.sample([0, 1], 3), pipe.sample([0, 1], 3, skip=0.4)
    assert not np.array_equal(plain, skipped)
    assert np.array_equal(skipped[1:], pipe.sample([1], 3, skip=0.4))
    assert np.array_equal(plain, pipe.sample([0, 1], 3, skip=0.0))


def test_images_at_different_noise_levels() -> None:
    denoiser = tiny_pipeline().denoiser
    skipping = cut_bricks(denoiser, BrickSchedule((Range(0, 1, 1),)))
    short = denoiser.around(denoiser.network.prefix(1))
    z, sigma = torch.randn(3, 1, 16, 16), torch.tensor([0.5, 2.0, 0.9])
    cond = Conditioning(labels=torch.tensor([1, 2, 3]))
    with torch.no_grad():
        mean = skipping(z, sigma, cond).mean
        for row, own in enumerate((short, denoiser, short)):
            one = slice(row, row + 1)
            alone = own(z[one], sigma[one], cond[one]).mean
            torch.testing.assert_close(mean[one], alone, atol=1e-5, rtol=1e-5)


def test_what_cannot_skip() -> None:
    last_only = tiny_pipeline("network.joint=false")
    with pytest.raises(TesseraError, match=r"network\.joint=false"):
        last_only.sample([0], skip=0.4)
    pipe = tiny_pipeline()
    with pytest.raises(TesseraError, match="cannot run 3 bricks: the stack has 2"):
        pipe.sample([0], bricks="0-1:3")
    with pytest.raises(TesseraError, match="give one of them"):
        pipe.sample([0], bricks="0-1:1", skip=0.4)
    with pytest.raises(TesseraError, match=r"`skip=1\.5`"):
        pipe.sample([0], skip=1.5)


def test_cost_counts_what_runs() -> None:
    pipe = tiny_pipeline()
    full, short = pipe.cost().sample_flops // 9, pipe.cost(bricks="0-inf:1").sample_flops // 9
    assert 0 < short < full
    plain = pipe.cost()
    assert (plain.evaluations, plain.forward_flops) == (9, full)
    assert plain.sample_flops == 9 * full
    assert pipe.cost(skip=0.4, guidance=2.0).sample_flops == 2 * (6 * full + 3 * short)


class Field(Denoiser):
    """Puts out the mean colour of what it sees."""

    shape = (1, 4, 4)

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        assert z.shape[1:] == self.shape
        assert len(sigma) == len(z)
        assert cond.labels is None or len(cond.labels) == len(z)
        return Posterior(z.float().mean(dim=(1, 2, 3), keepdim=True).expand_as(z))


@pytest.mark.parametrize("size", [(4, 4), (4, 9), (7, 6), (11, 17)])
def test_windows_cover_and_blend(size: tuple[int, int]) -> None:
    windows = Windows(Field(), size, overlap=0.5, batch=3)
    cond = Conditioning(labels=torch.tensor([1, 2]))
    constant = torch.full((2, 1, *size), 0.7, dtype=torch.float64)
    mean = windows(constant, torch.ones(2), cond).mean
    torch.testing.assert_close(mean, constant.float())
    ramp = torch.arange(size[1]).expand(2, 1, *size).double()
    row = windows(ramp, torch.ones(2), cond).mean[0, 0, 0]
    assert (row.diff() >= 0).all()
    # Windows blend: no jump is as large as that between neighbouring windows' colours.
    if size[1] > 4:
        assert row.diff().max() < 2


def test_windows_of_one_size_are_the_denoiser_itself() -> None:
    pipe = tiny_pipeline()
    z, cond = torch.randn(2, 1, 16, 16), Conditioning(labels=torch.tensor([1, 2]))
    with torch.no_grad():
        alone = pipe.denoiser(z, torch.ones(2), cond).mean
        same = Windows(Guided(pipe.denoiser, 1.0), (16, 16))(z, torch.ones(2), cond).mean
    torch.testing.assert_close(same, alone)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"size": (16, 32)}, (16, 32)),
        ({"size": (20, 30), "layout": "pad"}, (20, 30)),
        ({"size": (19, 37), "layout": "windows", "skip": 0.4, "guidance": 2.0}, (19, 37)),
    ],
)
def test_larger_pictures(options: dict[str, Any], shape: tuple[int, int]) -> None:
    pipe = tiny_pipeline()
    images = pipe.sample([0, 1], labels=3, **options)
    assert images.shape == (2, *shape, 1)
    # A seed's picture does not depend on its batch.
    alone = pipe.sample([1], labels=3, **options)
    assert np.abs(alone[0].astype(int) - images[1]).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"size": (20, 32)},
            "must be a multiple of 16 or 2, 4, 8, 12.*windows` or `layout=pad`",
        ),
        ({"size": (8, 32), "layout": "windows"}, "do not fit into 8x32"),
        ({"size": (32, 32), "resolution": 32}, "give either"),
        ({"size": (32, 32), "layout": "mosaic"}, "'tiles', 'pad' or 'windows'"),
        ({"size": (32, 32), "layout": "windows", "overlap": 1.0}, "overlap"),
    ],
)
def test_pictures_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TesseraError, match=message):
        tiny_pipeline().sample([0], **options)


def test_patch_wise_training_of_bricks_is_a_recipe() -> None:
    recipe = load_recipe("quickstart-digits-lego", ["view.kind=patches", "view.sizes=4,8,16"])
    with torch.device("meta"):
        denoiser = build_denoiser(recipe).train()
    for size in recipe.patch_sizes:
        x = torch.zeros(2, 1, size, size, device="meta")
        coords = torch.zeros(2, 2, size, size, device="meta")
        posterior = denoiser(x, x.new_ones(2), Conditioning(coords=coords))
        assert posterior.mean.shape == x.shape
        assert len(posterior.stages) == 1


def test_command(tmp_path: Path) -> None:
    tiny_pipeline().save(tmp_path / "pipe")
    arguments = ["sample", str(tmp_path / "pipe"), "--seeds", "0-2", "--class", "3"]
    run = CliRunner().invoke(app, [*arguments, "skip=0.4", "--out", str(tmp_path / "a.png")])
    assert run.exit_code == 0, run.output
    assert "of the network's FLOPs" in run.output
    assert "of its time" in run.output
    full, short = tiny_pipeline().cost(), tiny_pipeline().cost(bricks="0-inf:1")
    saved = 3 / 9 * (1 - short.sample_flops / full.sample_flops)
    assert f"saved {saved:.1%}" in run.output
    shown = [str(tmp_path / "pipe"), str(tmp_path / "a-bricks.png"), "--class", "3", "skip=0.4"]
    run = CliRunner().invoke(app, ["bricks", *shown])
    assert run.exit_code == 0, run.output
    picture = Image.open(tmp_path / "a-bricks.png")
    assert picture.width > 3 * 112
    assert picture.height > 4 * 112

    for alone in ("layout=windows", "overlap=0.4", "window_noise=own"):
        run = CliRunner().invoke(app, [*arguments, alone, "--out", str(tmp_path / "none")])
        assert isinstance(run.exception, TesseraError)
        assert ", too" in str(run.exception)
    assert not (tmp_path / "none").exists()

    run = CliRunner().invoke(
        app,
        [*arguments, "size=16x40", "layout=windows", "--out", str(tmp_path / "wide")],
    )
    assert run.exit_code == 0, run.output
    assert Image.open(tmp_path / "wide" / "000002.png").size == (40, 16)
    assert "FLOPs" not in run.output

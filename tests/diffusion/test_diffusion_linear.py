"""The best linear denoiser of the training images, and a network for what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import write_packed
from safetensors.torch import load_file
from torch import Tensor
from training_case import read_metrics, tiny_recipe

from tessera.conditioning import Conditioning
from tessera.diffusion.blur import block_idct
from tessera.diffusion.linear import LinearDenoiser, LinearStatistics
from tessera.diffusion.means import block_means, enlarge_means
from tessera.diffusion.preconditioning import Edm
from tessera.errors import RecipeError, TesseraError
from tessera.pipelines.loading import load
from tessera.recipes.build import build_denoiser
from tessera.recipes.loading import parse_recipe
from tessera.training.feed import Feed
from tessera.training.trainer import Trainer

SIDE = 8


def gaussian(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of a known mean and covariance, which is diagonal in the cosine transform of colours
    along turned axes; and that covariance, [3 · 64, 3 · 64]."""
    generator = torch.Generator().manual_seed(seed)
    axes, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(9)))
    k = torch.arange(SIDE)
    falling = 1 / (1 + k[:, None] ** 2 + k[None] ** 2).sqrt()
    std = torch.stack([falling, 0.5 * falling, 0.2 * falling])

    def images(y: Tensor) -> Tensor:
        return torch.einsum("cd,bdhw->bchw", axes, block_idct(std * y, SIDE))

    x = images(torch.randn(count, 3, SIDE, SIDE, generator=generator))
    basis = images(torch.eye(3 * SIDE**2).reshape(-1, 3, SIDE, SIDE)).reshape(-1, 3 * SIDE**2)
    return x + 0.3, basis.T @ basis


def test_it_is_the_conditional_mean_of_a_gaussian_and_knows_its_error() -> None:
    """Against the matrix formula μ + C (C + σ² I)⁻¹ (z - μ) with the true mean and covariance."""
    x, covariance = gaussian(20_000)
    statistics = LinearStatistics((3, SIDE, SIDE), 0)
    statistics.measure([(part, None) for part in x.split(1000)])
    test, _ = gaussian(2000, seed=1)
    for level in (0.05, 0.5, 5.0):
        z = test + level * torch.randn(test.shape, generator=torch.Generator().manual_seed(2))
        found, error = statistics(z, torch.full((len(z),), level), None)
        gain = covariance @ torch.linalg.inv(covariance + level**2 * torch.eye(len(covariance)))
        exact = 0.3 + ((z - 0.3).reshape(len(z), -1) @ gain).reshape(z.shape)
        assert (found - exact).square().mean() < 0.01 * (exact - test).square().mean()
        assert float(error[0]) == pytest.approx(
            float((exact - test).square().mean().sqrt()), rel=0.03
        )


def test_classes_have_means_of_their_own_and_few_images_do_not_make_one() -> None:
    x, _ = gaussian(1003)
    labels = torch.arange(1000) % 2
    x[:1000] += (labels[:, None, None, None] * 2 - 1) * 0.5
    statistics = LinearStatistics((3, SIDE, SIDE), 4)
    known = torch.cat([labels, torch.full((3,), 2)])
    statistics.measure([(x, known)])
    apart = statistics.mean[1] - statistics.mean[0]
    assert float(apart.mean()) == pytest.approx(1, abs=0.1)
    plain = x[1000:].mean(0) - statistics.mean[-1]
    own = statistics.mean[2] - statistics.mean[-1]
    assert own.square().mean() < 0.5 * plain.square().mean(), "the mean of three images is noise"
    assert torch.allclose(statistics.mean[3], statistics.mean[-1], atol=1e-5), "there are none"
    assert statistics.power[0].sum() < 0.9 * statistics.power[1].sum()
    z, sigma = torch.zeros(3, 3, SIDE, SIDE), torch.full((3,), 50.0)
    estimate, error = statistics(z, sigma, torch.tensor([0, 1, -1]))
    assert torch.allclose(estimate[:2], statistics.mean[:2], atol=0.01)
    assert torch.allclose(estimate[2], statistics.mean[-1], atol=0.01)
    assert error[0] < error[2], "who knows the class knows more"


@pytest.mark.parametrize("count", [1, 2])
def test_very_few_images_leave_finite_numbers(count: int) -> None:
    statistics = LinearStatistics((1, SIDE, SIDE), 2)
    statistics.measure([(torch.zeros(count, 1, SIDE, SIDE), torch.zeros(count).long())])
    estimate, error = statistics(torch.randn(2, 1, SIDE, SIDE), torch.tensor([1e-3, 80.0]), None)
    assert estimate.isfinite().all()
    assert error.isfinite().all()


LINEAR: dict[str, Any] = {"preconditioning": {"kind": "linear"}}


def recipe(folder: Path, **changes: Any):
    """Smooth images of two classes, to which there is a linear structure."""
    if not (folder / "tiny.safetensors").exists():
        x, _ = gaussian(60)
        images = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).numpy()
        write_packed(folder / "tiny.safetensors", images, labels=[i % 2 for i in range(60)])
    return tiny_recipe(folder, **{**LINEAR, **changes})


def test_a_run_begins_with_the_linear_estimate(tmp_path: Path) -> None:
    plan = recipe(tmp_path, data={"held_out": 0.2}, validation={"every_images": 8},
                  training={"images": 16}, optimizer={"lr": 1e-12})  # fmt: skip
    Trainer(plan, tmp_path / "linear").run()
    plain = plan.model_copy(update={"preconditioning": tiny_recipe(tmp_path).preconditioning})
    Trainer(plain, tmp_path / "plain").run()
    ours, theirs = (
        next(x["validation/loss"] for x in read_metrics(tmp_path / run) if "validation/loss" in x)
        for run in ("linear", "plain")
    )
    assert ours < 0.5 * theirs


def test_statistics_are_saved_and_stay_as_they_are(tmp_path: Path) -> None:
    plan = recipe(tmp_path, training={"images": 32})
    trainer = Trainer(plan, tmp_path / "run")
    expected = LinearStatistics((3, SIDE, SIDE), 2)
    expected.measure(Feed(plan, torch.device("cpu")).examples())
    trainer.run()
    pipeline = load(tmp_path / "run")
    assert isinstance(pipeline.model, LinearDenoiser)
    for name, buffer in expected.named_buffers():
        assert torch.equal(getattr(pipeline.model.statistics, name), buffer)
    (file,) = (tmp_path / "run" / "pipeline").glob("*.safetensors")
    assert {"statistics.mean", "statistics.axes", "statistics.power"} <= {*load_file(file)}
    images = pipeline.sample([0, 1], labels=[0, -1], steps=3)
    pipeline.save(tmp_path / "saved")
    assert np.array_equal(load(tmp_path / "saved").sample([0, 1], labels=[0, -1], steps=3), images)
    guided = pipeline.sample([0], steps=3, guidance=3.0)
    assert guided.shape == (1, 8, 8, 3)


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    plan = recipe(tmp_path, training={"images": 64})
    Trainer(plan, tmp_path / "whole").run()
    steps = Trainer(plan, tmp_path / "broken").steps()
    for _ in range(5):
        next(steps)
    steps.close()
    Trainer(resume=tmp_path / "broken").run()
    whole, broken = (
        load_file(next((tmp_path / run / "pipeline").glob("*.safetensors")))
        for run in ("whole", "broken")
    )
    assert all(torch.equal(broken[name], tensor) for name, tensor in whole.items())


def test_classes_can_be_left_out(tmp_path: Path) -> None:
    plan = recipe(tmp_path, preconditioning={"kind": "linear", "classes": False},
                  training={"images": 8})  # fmt: skip
    trainer = Trainer(plan, tmp_path / "run")
    model = trainer.learner.step.model
    assert isinstance(model, LinearDenoiser)
    assert model.statistics.mean.shape == (1, 3, SIDE, SIDE)
    trainer.run()
    assert load(tmp_path / "run").sample([0], labels=[1], steps=2).shape == (1, 8, 8, 3)


COARSE = {"kind": "bands", "bands": [{"below": 0.5}, {"factor": 2}]}


@torch.no_grad()
def test_of_means_only_what_the_network_adds_is_coarse(tmp_path: Path) -> None:
    denoiser = build_denoiser(recipe(tmp_path, view=COARSE)).eval()
    x, _ = gaussian(40)
    denoiser.begin([(x, torch.arange(40) % 2)])
    z, sigma = torch.randn(4, 3, SIDE, SIDE), torch.full((4,), 2.0)
    cond = Conditioning(torch.tensor([0, 1, -1, 0]))
    estimate, error = denoiser.network.statistics(z, sigma, cond.labels)
    torch.testing.assert_close(denoiser(z, sigma, cond).mean, estimate)  # it begins with zeros
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    seen: list[torch.Tensor] = []
    hook = denoiser.network.register_forward_hook(
        lambda _, inputs, out: seen.extend((*inputs, out))
    )
    found = denoiser(z, sigma, cond).mean
    hook.remove()
    shown, noise, told, output = seen
    small = Edm().coefficients(sigma / 2)
    torch.testing.assert_close(shown[:, :3], small.input[:, None, None, None] * block_means(z, 2))
    torch.testing.assert_close(shown[:, 3:], block_means(estimate, 2) / 0.5)
    torch.testing.assert_close(noise, small.noise)
    assert told.coords is not None
    assert told.coords.shape[-2:] == (SIDE // 2, SIDE // 2)
    expected = estimate + error[:, None, None, None] * enlarge_means(output, 2)
    torch.testing.assert_close(found, expected)


def test_coarse_views_teach_a_linear_start(tmp_path: Path) -> None:
    """The loss of whole images at all noise levels falls; what is saved samples alike."""
    plan = recipe(tmp_path, view=COARSE, data={"held_out": 0.2}, training={"images": 320},
                  optimizer={"lr": 4e-3, "rampup_images": 0}, ema=[{"halflife_images": 20}],
                  validation={"every_images": 160, "images": 12})  # fmt: skip
    Trainer(plan, tmp_path / "run").run()
    lines = [line for line in read_metrics(tmp_path / "run") if "validation/loss" in line]
    assert lines[-1]["validation/loss"] < lines[0]["validation/loss"]
    pipeline = load(tmp_path / "run")
    images = pipeline.sample([0, 1], labels=[0, 1], steps=3)
    pipeline.save(tmp_path / "saved")
    assert np.array_equal(load(tmp_path / "saved").sample([0, 1], labels=[0, 1], steps=3), images)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"view": {"kind": "patches", "sizes": [4, 8]}}, "view.kind=full"),
        ({"view": {"kind": "bands", "bands": [{"crop": 4}]}}, "bands without crops"),
        ({"objective": {"kind": "blur", "block": 2}, "sampling": {"kind": "relay"}}, "white noise"),
        ({"network": {"kind": "external"}}, "own parts"),
        ({"data": {"resolution": 256, "num_classes": 1000}}, r"preconditioning\.classes=false"),
    ],
)
def test_what_it_does_not_go_with_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    data = tiny_recipe(tmp_path).model_dump(mode="json") | LINEAR | changes
    with pytest.raises(RecipeError, match=words):
        parse_recipe(data)


def test_other_sizes_are_refused_in_words(tmp_path: Path) -> None:
    plan = recipe(tmp_path, training={"images": 8})
    Trainer(plan, tmp_path / "run").run()
    model = load(tmp_path / "run").model
    with pytest.raises(TesseraError, match="linear estimate of 8x8"):
        model(torch.zeros(1, 3, 16, 16), torch.ones(1), Conditioning())


@pytest.mark.slow
def test_training_adds_to_the_linear_estimate(tmp_path: Path) -> None:
    """Of images that are black or white, of which no linear estimate knows that."""
    images = np.repeat(np.array([0, 255], np.uint8), 30 * 3 * 8 * 8).reshape(60, 3, 8, 8)
    write_packed(tmp_path / "tiny.safetensors", images, labels=[0] * 60)
    data = tiny_recipe(tmp_path).model_dump(mode="json") | LINEAR
    data["objective"] = {"kind": "edm", "p_mean": 2.3, "p_std": 0.3}
    data["data"] |= {"held_out": 0.3, "num_classes": 0}
    data["optimizer"] |= {"lr": 5e-3, "rampup_images": 0}
    data["ema"] = [{"halflife_images": 1}]
    data["training"] |= {"images": 3200, "batch": 16}
    data["validation"] = {"every_images": 320, "images": 18}
    Trainer(parse_recipe(data), tmp_path / "run").run()
    lines = [x for x in read_metrics(tmp_path / "run") if "validation/loss" in x]
    losses = [line["validation/loss"] for line in lines]
    assert losses[-1] < 0.9 * losses[0]

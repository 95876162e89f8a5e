"""Experts, super-resolution and likelihoods from recipe to images, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import random_images, write_packed
from test_pdm_network import numbers
from torch import Tensor, nn
from training_case import BASE
from typer.testing import CliRunner

import tessera
from tessera.cli import app
from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser, Posterior
from tessera.diffusion.discrete import Discrete, DiscreteDenoiser, Process
from tessera.diffusion.experts import Experts
from tessera.errors import CheckpointError, RecipeError, TesseraError
from tessera.pipelines.base import Pipeline
from tessera.pipelines.experts import ExpertsPipeline, assemble
from tessera.pipelines.loading import build_pipeline, estimate
from tessera.recipes.build import build_denoiser
from tessera.recipes.loading import load_recipe, parse_recipe
from tessera.recipes.overrides import merge
from tessera.recipes.schema import Recipe
from tessera.training.trainer import Trainer

PDM: dict[str, Any] = {
    "network": {
        "kind": "patched_unet", "patch_size": 2, "model_channels": 32, "channel_mult": [1, 1],
        "num_blocks": 1, "attn_resolutions": [4], "heads": 2, "learn_variance": True,
    },
    "preconditioning": {"kind": "discrete", "timesteps": 60},
    "objective": {"kind": "discrete"},
    "sampling": {"kind": "ddpm", "steps": "5"},
}  # fmt: skip


def recipe(folder: Path | None = None, pdm: bool = True, **changes: Any) -> Recipe:
    base = {k: v for k, v in BASE.items() if not pdm or k not in PDM}
    document = merge(merge(base, PDM if pdm else {}), changes)
    if folder is not None:
        path = folder / "tiny.safetensors"
        if not path.exists():
            write_packed(path, random_images(30), labels=[i % 2 for i in range(30)])
        document = merge(document, {"data": {"path": str(path)}})
    return parse_recipe(document)


def pipeline(seed: int, **changes: Any) -> Pipeline:
    made = recipe(**changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = build_denoiser(made)
        for parameter in denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    return build_pipeline(made, denoiser, images_seen=10 * seed)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if isinstance(result.exception, TesseraError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


class Marked(Denoiser):
    """Answers with its own number."""

    def __init__(self, number: float, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        super().__init__()
        self.number, self.shape = number, (1, 2, 2)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma * 0 + self.number

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        assert len(sigma) == len(z) == len(cond.labels)  # type: ignore[arg-type]
        return Posterior(torch.full_like(z, self.number) + cond.labels[:, None, None, None])  # type: ignore[index]


def test_each_image_goes_to_the_owner_of_its_noise_level() -> None:
    experts = Experts([Marked(10), Marked(20), Marked(30)], [4, 0.25])
    assert (experts.sigma_min, experts.sigma_max) == (0.01, 50)
    # An SNR that is a threshold belongs to the noisier expert.
    sigma = torch.tensor([0.1, 3.0, 0.5, 1.999, 2.0, 40.0, 0.4999])
    cond = Conditioning(torch.arange(7))
    mean = experts(torch.zeros(7, 1, 2, 2), sigma, cond).mean[:, 0, 0, 0]
    assert mean.tolist() == [10, 31, 22, 23, 34, 35, 16]
    assert experts.round_sigma(sigma).tolist() == [10, 30, 20, 20, 30, 30, 10]
    assert experts.levels is None
    with pytest.raises(TesseraError, match="need 2 experts"):
        Experts([Marked(1)], [0.5])
    with pytest.raises(TesseraError, match="fall"):
        Experts([Marked(1)] * 3, [0.25, 4])


def test_experts_are_saved_loaded_and_sampled_by_every_sampler(tmp_path: Path) -> None:
    parts = [pipeline(k, snr_splits=[0.25], expert=k) for k in range(2)]
    for index, part in enumerate(parts):
        part.save(tmp_path / str(index))
    output = run("experts", tmp_path / "e", tmp_path / "0", tmp_path / "1")
    assert "2 experts, SNR thresholds 0.25, written to" in " ".join(output.split())
    with pytest.raises(TesseraError, match="exists already"):
        run("experts", tmp_path / "0", tmp_path / "0", tmp_path / "1")
    pipe = tessera.load(tmp_path / "e", device="cpu")
    assert pipe.recipe.snr_splits == (0.25,)
    assert pipe.recipe.expert is None
    assert pipe.images_seen == 10
    made = pipe.sample("0-2", guidance=1.5)
    assert np.array_equal(made, assemble(parts).sample("0-2", guidance=1.5))
    pipe.save(tmp_path / "again")
    assert np.array_equal(
        tessera.load(tmp_path / "again", device="cpu").sample("0-2", guidance=1.5), made
    )
    single = [pipeline(k, snr_splits=[0.25]).sample("0-2") for k in range(2)]
    both = pipe.sample("0-2")
    assert not np.array_equal(both, single[0])
    assert not np.array_equal(both, single[1])
    for sampler, options in {"edm": {"steps": 3}, "ddim": {"steps": "ddim4", "eta": 0.5}}.items():
        assert pipe.sample("0-2", sampler=sampler, **options).shape == (3, 8, 8, 3)
    with pytest.raises(TesseraError, match="trained as expert"):
        assemble(parts[::-1])
    with pytest.raises(TesseraError, match="was trained for all noise levels"):
        assemble([pipeline(0), pipeline(1)])
    with pytest.raises(TesseraError, match="`sampler=euler`: there is none"):
        pipe.sample("0", sampler="euler")
    (tmp_path / "e" / "expert-1").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="expert-1"):
        tessera.load(tmp_path / "e")


def test_an_expert_alone_makes_no_images(tmp_path: Path) -> None:
    alone = pipeline(0, snr_splits=[4, 0.25], expert=1)
    words = (
        r"expert 1 of 0 to 2.*from 0\.5 to 2 only.*tessera experts NAME EXPERT-0 EXPERT-1 EXPERT-2"
    )
    with pytest.raises(TesseraError, match=words):
        alone.sample("0")
    with pytest.raises(TesseraError, match=words):
        alone.encode(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(TesseraError, match=words):
        pipeline(0).sample("0", guidance=2.0, guide=alone)
    alone.save(tmp_path / "1")
    with pytest.raises(TesseraError, match=words):
        run("sample", tmp_path / "1", "--out", tmp_path / "s", "--device", "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_what_is_no_expert_becomes_one_by_thresholds_only(tmp_path: Path) -> None:
    clean, full = pipeline(0, snr_splits=[0.25], expert=0), pipeline(1)
    with pytest.raises(TesseraError, match=r"number 1 \(tiny\) is no expert.*--thresholds"):
        assemble([clean, full])
    assert assemble([clean, full], [0.25]).recipe.snr_splits == (0.25,)
    with pytest.raises(TesseraError, match=r"trained for noise levels 0 to 2, and .* 0 to 10\."):
        assemble([clean, full], [0.01])
    assert assemble([clean, full], [4]).recipe.snr_splits == (4,)  # a part of what it knows
    clean.save(tmp_path / "0")
    full.save(tmp_path / "1")
    text = run("experts", tmp_path / "e", tmp_path / "0", tmp_path / "1", "--thresholds", "0.25")
    assert f"{tmp_path / '1'} was trained for all noise levels" in text.replace("\n", "")
    assert f"{tmp_path / '0'} was trained" not in text.replace("\n", "")


@pytest.mark.slow
def test_experts_cost_what_all_of_them_cost() -> None:
    small, large = pipeline(0), pipeline(1, network={"model_channels": 64})
    costs = [pipe.cost() for pipe in (small, large)]
    both = ExpertsPipeline([small, large], [0.25]).cost()
    assert both.parameters == sum(c.parameters for c in costs)
    assert both.parameters == sum(
        p.numel() for m in (small, large) for p in m.denoiser.parameters()
    )
    assert both.run_flops == sum(c.run_flops for c in costs)
    assert both.evaluations == costs[0].evaluations
    assert costs[0].sample_flops < both.sample_flops < costs[1].sample_flops
    assert both.train_bytes == max(c.train_bytes for c in costs)
    same = ExpertsPipeline([small, small], [0.25]).cost()
    assert (same.sample_flops, same.forward_flops) == (
        costs[0].sample_flops,
        costs[0].forward_flops,
    )
    nested = ExpertsPipeline([ExpertsPipeline([small, small], [4]), large], [0.25]).cost()
    assert nested.parameters == 2 * costs[0].parameters + costs[1].parameters


def test_experts_of_another_network_by_the_command(tmp_path: Path) -> None:
    for index in range(2):
        pipeline(index, pdm=False).save(tmp_path / str(index))
    run("experts", tmp_path / "e", tmp_path / "0", tmp_path / "1", "--thresholds", "4")
    out = run("sample", tmp_path / "e", "--seeds", "0-3", "--out", tmp_path / "s.npz",
              "--device", "cpu", "--steps", "3")  # fmt: skip
    assert "5 network evaluations per image" in out
    run("sample", tmp_path / "e", "--seeds", "0-3", "--out", tmp_path / "d.npz", "--device", "cpu",
        "sampler=ddim", "--steps", "6", "eta=0.3", "noise_schedule=cosine",
        "clip=dynamic", "quantile=0.9")  # fmt: skip
    for v in ("large", "small"):
        run("sample", tmp_path / "0", "--seeds", "0-1", "--out", tmp_path / f"{v}.npz", "--device",
            "cpu", "sampler=ddpm", "--steps", "4", f"variance={v}",
            "noise_schedule=linear")  # fmt: skip
    large, small = (np.load(tmp_path / f"{v}.npz")["arr_0"] for v in ("large", "small"))
    assert not np.array_equal(large, small)
    with pytest.raises(TesseraError, match="noise_schedule"):
        tessera.load(tmp_path / "e").sample("0", sampler="ddpm")
    with pytest.raises(TesseraError, match="numbers like"):
        run("experts", tmp_path / "f", tmp_path / "0", tmp_path / "1", "--thresholds", "a")


@pytest.mark.parametrize("kind", ["edm", "discrete"])
def test_an_expert_trains_and_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"snr_splits": [0.25], "expert": 1, "training": {"images": 64}}
    if kind == "discrete":
        changes["objective"] = {"timesteps": "loss_second_moment"}
    made = recipe(tmp_path, pdm=kind == "discrete", **changes)
    whole = Trainer(made, tmp_path / "whole")
    whole.run()
    half = Trainer(made, tmp_path / "half")
    for report in half.steps():
        if report.images == 40:
            break
    again = Trainer(resume=tmp_path / "half")
    assert again.images_seen == 32
    again.run()
    expected = whole.learner.tensors()
    if kind == "discrete":
        # Each step is a level of the noisy expert's.
        assert expected["model/objective.history.counts"].sum() == 64
    for name, tensor in again.learner.tensors().items():
        assert torch.equal(tensor, expected[name]), name


def test_super_resolution_trains_previews_and_samples(tmp_path: Path) -> None:
    made = recipe(
        tmp_path, low_resolution=4, training={"images": 16},
        run={"preview": {"every_images": 16, "rows": 1, "columns": 2}},
    )  # fmt: skip
    trainer = Trainer(made, tmp_path / "run")
    trainer.run()
    pipe = tessera.load(tmp_path / "run")
    low = random_images(3, size=4)
    low = np.ascontiguousarray(low.transpose(0, 2, 3, 1)) if low.shape[1] == 3 else low
    images = pipe.sample("0-4", start_from=low)
    assert images.shape == (5, 8, 8, 3)
    with torch.no_grad():
        for parameter in pipe.denoiser.parameters():
            parameter.add_(0.05)
    one, other = pipe.sample("0", start_from=low), pipe.sample("0", start_from=255 - low)
    assert not np.array_equal(one, other)
    np.savez(tmp_path / "low.npz", arr_0=low)
    run("sample", tmp_path / "run", "--seeds", "0-1", "--out", tmp_path / "s", "--device", "cpu",
        "--start-from", tmp_path / "low.npz", "--steps", "2")  # fmt: skip
    assert json.loads((tmp_path / "s" / "sampling.json").read_text())["start_from"]
    with pytest.raises(TesseraError, match="none were given"):
        pipe.sample("0")
    large = pipe.sample("0-2", start_from=low)
    encoded = [pipe.encode(large, steps="5", start_from=small) for small in (low, low[::-1].copy())]
    assert not torch.allclose(*encoded)
    with pytest.raises(TesseraError, match="none were given"):
        pipe.encode(large)
    with pytest.raises(TesseraError, match="starts from noise, not from pictures"):
        pipeline(0).sample("0", start_from=low)


def test_bits_per_dimension_by_the_command(tmp_path: Path) -> None:
    write_packed(tmp_path / "d.safetensors", random_images(6), labels=[i % 2 for i in range(6)])
    for index in range(2):
        pipeline(index, snr_splits=[0.25], expert=index).save(tmp_path / str(index))
    run("experts", tmp_path / "e", tmp_path / "0", tmp_path / "1")
    found = []
    for batch, out in ((6, "a.npz"), (2, "b.npz")):
        text = run("eval", "nll", tmp_path / "e", tmp_path / "d.safetensors", "--batch", batch,
                   "--steps", "10", "--out", tmp_path / out, "--json")  # fmt: skip
        found.append(json.loads(text[text.index("{") :]))
    assert found[0]["bits_per_dimension"] == pytest.approx(found[1]["bits_per_dimension"], rel=1e-4)
    assert (found[0]["images"], found[0]["steps"]) == (6, 10)
    terms = np.load(tmp_path / "a.npz")
    assert terms["vb"].shape == (6, 10)
    total = (terms["vb"].sum(axis=1) + terms["prior"]).mean()
    assert total == pytest.approx(found[0]["bits_per_dimension"], rel=1e-5)
    with pytest.raises(TesseraError, match="is expert 0 of 0 to 1"):
        run("eval", "nll", tmp_path / "0", tmp_path / "d.safetensors", "--device", "cpu")
    with pytest.raises(TesseraError, match=r"terms\.txt"):
        run("eval", "nll", tmp_path / "0", tmp_path / "d.safetensors", "--out", "terms.txt")
    pipeline(0, low_resolution=4).save(tmp_path / "sr")
    assert "bits per dimension" in run("eval", "nll", tmp_path / "sr", tmp_path / "d.safetensors",
                                       "--steps", "3", "--num", "2")  # fmt: skip


@pytest.mark.slow
def test_costs_of_discrete_models_and_experts() -> None:
    changes: dict[str, Any]
    for changes in (
        {"low_resolution": 4, "training": {"precision": "bf16"}},
        {"snr_splits": [0.25], "expert": 1, "objective": {"timesteps": "loss_second_moment"}},
    ):
        cost = estimate(recipe(**changes), guidance=2.0)
        assert cost.evaluations == 10
        assert cost.train_flops > 2 * cost.forward_flops
        assert cost.activation_bytes > 0
    vp = {"snr_splits": [0.25], "objective": {"kind": "vp"}, "preconditioning": {"kind": "vp"}}
    assert estimate(recipe(pdm=False, **vp, expert=1)).activation_bytes > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert": 1}, "set some"),
        ({"expert": 2, "snr_splits": [0.25]}, "experts 0 to 1"),
        ({"snr_splits": [0.25, 4]}, "must fall"),
        ({"preconditioning": {"kind": "edm"}}, "discrete noise levels"),
        ({"objective": {"kind": "edm"}}, "objective.kind=discrete"),
        ({"data": {"resolution": 10}}, "multiple of 4"),
        ({"low_resolution": 3}, "low_resolution"),
        ({"low_resolution": 4, "view": {"kind": "patches"}}, "whole images of pixels only"),
        ({"low_resolution": 2, "codec": {"kind": "vae", "downsample": 2}}, "of pixels only"),
        ({"sampling": {"clip": "both"}}, "clip"),
    ],
)
def test_recipes_that_do_not_fit_together(changes: dict[str, Any], message: str) -> None:
    changes = {**changes}
    if changes.get("preconditioning") == {"kind": "edm"}:
        base = merge({k: v for k, v in BASE.items() if k not in PDM}, PDM)
        base["preconditioning"] = {"kind": "edm"}
        with pytest.raises(RecipeError, match=message):
            parse_recipe(base)
        return
    with pytest.raises(RecipeError, match=message):
        recipe(**changes)


@pytest.mark.parametrize(("text", "splits"), [("0.25", (0.25,)), ("4,0.25", (4, 0.25))])
def test_thresholds_on_a_command_line(text: str, splits: tuple[float, ...]) -> None:
    made = load_recipe("cifar10-small-pdm", [f"snr_splits={text}", "expert=1"])
    assert (made.snr_splits, made.expert) == (splits, 1)
    wide: Any = load_recipe("cifar10-small-pdm", ["network.channel_mult=1.5"]).network
    assert wide.channel_mult == (1.5,)


def test_list_options_may_have_blanks_and_quotes() -> None:
    assert recipe(network={"channel_mult": " '1, 1' "}).network.channel_mult == (1, 1)  # type: ignore[union-attr]
    assert numbers("1,1.5") == [1, 1.5]


class Ideal(nn.Module):
    """The perfect network for pixels of deviation 0.4 about 0.2 for class 1, 0 for others."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.alpha_bar = process.alpha_bar.float()

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        left = self.alpha_bar[noise.long()][:, None, None, None]
        middle = 0.2 * (cond.labels == 1).float()[:, None, None, None]  # type: ignore[union-attr]
        return middle + (x / left.sqrt() - middle) * 0.16 / (0.16 + (1 - left) / left)


@pytest.mark.parametrize("options", [{}, {"guidance": 1.5}, {"steps": "ddim150", "clip": "none"}])
def test_images_are_encoded_and_made_again(options: dict[str, Any]) -> None:
    scaling = Discrete(timesteps=300)
    made = recipe(network={"learn_variance": False}, preconditioning={"timesteps": 300})
    denoiser = DiscreteDenoiser(Ideal(scaling.process), scaling, (3, 8, 8), 2)
    pipe = ExpertsPipeline([build_pipeline(made, denoiser)] * 2, [0.25])
    images = random_images(3).transpose(0, 2, 3, 1) // 2 + 70
    latents = pipe.encode(images, 1, batch=2, **options)
    assert latents.shape == (3, 3, 8, 8)
    again = pipe.sample("0-2", 1, sampler="ddim", latents=latents, **options)
    assert np.abs(again.astype(int) - images).max() <= 4
    # Seeds choose among the latents; images do not depend on their batch, but on their class.
    other = pipe.sample("5", 1, sampler="ddim", latents=latents, **options)
    assert np.abs(other[0].astype(int) - again[2]).max() <= 1
    torch.testing.assert_close(pipe.encode(images[1:2], 1, **options)[0], latents[1])
    without = options | {"guidance": 1.0}  # which has no class to act on
    assert not torch.allclose(pipe.encode(images, **without), latents, atol=0.1)


def test_what_cannot_be_encoded_is_named() -> None:
    pipe, images = pipeline(0), np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(TesseraError, match=r"eta=0\.5"):
        pipe.encode(images, eta=0.5)
    with pytest.raises(TesseraError, match=r"\[N, 8, 8, 3\]"):
        pipe.encode(images[:, :4])
    with pytest.raises(TesseraError, match="uint8"):
        pipe.encode(images.astype(np.float32))
    with pytest.raises(TesseraError, match="2 classes were given for"):
        pipe.encode(images[:1], [0, 1])
    with pytest.raises(TesseraError, match="no option `s_churn`"):
        pipe.encode(images, s_churn=1)
    with pytest.raises(TesseraError, match="N, 3, 8, 8"):
        pipe.sample("0", latents=torch.zeros(1, 3, 4, 4))

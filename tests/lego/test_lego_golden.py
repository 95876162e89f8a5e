"""LEGO bricks against the released code: outputs, losses, gradients, trajectories, tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import RecordedDraws, RecordedSteps, case, load, recorded_conditioning
from lego_case import recorded
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.guidance import Guided
from tessera.diffusion.objectives import EdmObjective
from tessera.diffusion.skipping import cut_bricks, last_brick_schedule
from tessera.networks.layers import PositionalEmbedding
from tessera.networks.lego import Grid, pixel_coordinates
from tessera.networks.transformer import sincos_table
from tessera.recipes.schema import EmaConfig, OptimizerConfig
from tessera.sampling.edm import edm_sampler
from tessera.training.ema import decay
from tessera.training.optimizers import learning_rate

FORWARD = [
    "forward_pr_cond_aug",
    "forward_u_cond",
    "forward_pg_rect_corrected",
]
SAMPLERS = ["sampler_pg", "sampler_skip_cfg_corrected", "sampler_pr_skip_early_corrected"]


def assert_near(actual: Tensor, expected: Tensor, atol: float = 2e-5, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(actual.to(expected.dtype), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("name", FORWARD)
def test_outputs(name: str) -> None:
    denoiser, golden, about = recorded(name)
    network, x, noise = denoiser.network, golden["in.x"], golden["in.c_noise"]
    cond, joint = recorded_conditioning(golden), about["config"]["joint"]
    with torch.no_grad():
        assert_near(network(x, noise, cond), golden["out.eval"])
        stages = [key for key in golden if key.startswith("out.eval_stage.")]
        assert len(stages) == (len(network.specs) if joint else 0)
        for key in stages:
            count = int(key.rsplit(".", 1)[1]) + 1
            assert_near(network.prefix(count)(x, noise, cond), golden[key])
        if "out.eval_zero_labels" in golden:
            plain = Conditioning(augment=cond.augment)
            assert_near(network(x, noise, plain), golden["out.eval_zero_labels"])
        if "out.eval_no_augment_labels" in golden:
            plain = Conditioning(labels=cond.labels)
            assert_near(network(x, noise, plain), golden["out.eval_no_augment_labels"])
        dropped = cond
        if "in.label_drop_u" in golden:
            dropped = cond.drop_labels(golden["in.label_drop_u"][:, 0] < 0.1)
        outputs = network.train()(x, noise, dropped)
    assert isinstance(outputs, tuple) == joint
    for index, output in enumerate(outputs if joint else [outputs]):
        assert_near(output, golden[f"out.train.{index}"])


@pytest.mark.parametrize("name", ["forward_pg_rect_corrected"])
def test_inside_a_brick(name: str) -> None:
    denoiser, golden, _ = recorded(name)
    network = denoiser.network
    seen: dict[str, Any] = {}

    def keep(key: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _m, i, o: seen.update({key: (i, o)}))

    first = network.model[0]
    keep("features", network.t_embedder.features)
    keep("time", network.t_embedder)
    keep("tokens", first.x_embedder)
    keep("block", first.blocks[0])
    keep("final", first.final_layer)
    keep("second", network.model[1])
    with torch.no_grad():
        network(golden["in.x"], golden["in.c_noise"], recorded_conditioning(golden))

    def by_patch(value: Tensor) -> Tensor:
        """[B, T, D] as [B patches, tokens of a patch, D]."""
        return value.reshape(-1, 4, value.shape[-1])

    assert_near(seen["features"][1], golden["out.t_frequency_features"])
    assert_near(seen["time"][1], golden["out.t_embedding"])
    assert_near(by_patch(seen["tokens"][1]), golden["out.brick0_tokens_before_pos_embed"])
    assert_near(by_patch(seen["block"][1]), golden["out.brick0_after_block0"])
    assert_near(by_patch(seen["final"][1]), golden["out.brick0_final_layer_tokens"])
    patches = len(golden["out.brick0_cond"]) // len(golden["in.x"])
    vector = seen["block"][0][1].repeat_interleave(patches, dim=0)
    assert_near(vector, golden["out.brick0_cond"])
    canvas = seen["second"][0][0]
    cut = Grid(*canvas.shape[2:], size=8, token=8).cut(canvas).reshape(-1, 8, 8, 8)
    assert_near(cut, golden["out.brick1_patches"])


@pytest.mark.parametrize("name", ["precond_pg_cond"])
def test_denoised_and_guided(name: str) -> None:
    denoiser, golden, about = recorded(name)
    x, sigma, cond = golden["in.x"], golden["in.sigma"], recorded_conditioning(golden)
    with torch.no_grad():
        assert_near(denoiser(x, sigma, cond).mean, golden["out.D"], atol=5e-5)
        none = denoiser(x, sigma, Conditioning()).mean
        assert_near(none, golden["out.D_labels_none"], atol=5e-5)
        for index in range(len(denoiser.network.specs)):
            stage = denoiser.around(denoiser.network.prefix(index + 1))(x, sigma, cond).mean
            assert_near(stage, golden[f"out.D_stage.{index}"], atol=5e-5)
        for variant in about["cfg_variants"]:
            channels = None if variant["guided_channels"] == "all" else 3
            guided = Guided(denoiser, variant["cfg_scale"], channels=channels)
            expected = golden[f"out.D_cfg.{variant['index']}"]
            # Guidance multiplies the rounding of both evaluations.
            assert_near(guided(x, sigma, cond).mean, expected, atol=5e-5)
        denoiser.train()
        posterior = denoiser(x, sigma, cond)
    for index, stage in enumerate([*posterior.stages, posterior.mean]):
        assert_near(stage, golden[f"out.D_stage.{index}"], atol=5e-5)


@pytest.mark.parametrize("name", ["loss_pg_joint"])
def test_loss_and_every_gradient(name: str) -> None:
    denoiser, golden, about = recorded(name, positions="learned")
    denoiser.train()
    numbers = {"sigma": golden["in.sigma_normal"], "noise": golden["in.noise_unit"]}
    dropout = 0.0
    if "in.label_drop_u" in golden:
        numbers["label_dropout"], dropout = golden["in.label_drop_u"], 0.1
    objective = EdmObjective(label_dropout=dropout)
    arguments = golden["in.images"], recorded_conditioning(golden), RecordedDraws(numbers)
    sigma = objective.sigma(arguments[-1])
    elementwise = objective.elementwise(denoiser, *arguments, sigma)
    assert_near(elementwise, golden["out.loss_elementwise"], rtol=2e-4)
    loss = objective(denoiser, *arguments)["loss"].mean()
    assert loss.item() == pytest.approx(about["loss_scalar"], rel=2e-5)
    loss.backward()

    found = {f"model.{n}": p.grad for n, p in denoiser.network.named_parameters()}
    gradients = {k.removeprefix("grad."): v for k, v in golden.items() if k.startswith("grad.")}
    assert found.keys() == gradients.keys()
    for key, expected in gradients.items():
        gradient = found[key]
        assert gradient is not None
        floor = 1e-5 * expected.abs().max().item() + 1e-6 * about["grad_absmax"]
        assert_near(gradient, expected, atol=floor, rtol=5e-4)


class Watched(Denoiser):
    """Notes the estimate at the first evaluation of each step."""

    def __init__(self, inner: Denoiser, estimates: list[Tensor]) -> None:
        super().__init__()
        self.inner, self.estimates = inner, estimates
        self.fresh = False

    def for_step(self, sigma: float) -> Denoiser:
        step = Watched(self.inner.for_step(sigma), self.estimates)
        step.fresh = True
        return step

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Any:
        posterior = self.inner(z, sigma, cond)
        if self.fresh:
            self.estimates.append(posterior.mean)
            self.fresh = False
        return posterior


@pytest.mark.parametrize("name", SAMPLERS)
def test_trajectories(name: str) -> None:
    model, golden, about = recorded(name)
    settings, levels = about["sampler"], golden["out.t_steps"].tolist()
    steps = settings["num_steps"]
    sizes = about["config"]["brick_resolutions"]
    for variant, options in about["variants"].items():
        early = options["steps_with_early_exit"]
        schedule = last_brick_schedule(sizes, len(early) / steps, levels[:steps])
        assert [i for i in range(steps) if schedule.bricks(levels[i])] == early
        denoiser: Denoiser = cut_bricks(model, schedule) if early else model
        if options["cfg_scale"] is not None:
            denoiser = Guided(denoiser, options["cfg_scale"])
        churn = {k.lower(): v for k, v in (options["churn"] or {}).items()}
        noise = RecordedSteps(golden["in.churn_noise"] if churn else None)
        estimates: list[Tensor] = []
        states = list(
            edm_sampler(steps=steps, **churn)(
                Watched(denoiser, estimates),
                golden["in.latents"],
                recorded_conditioning(golden),
                noise,
            )
        )
        trajectory = torch.stack([golden["in.latents"] * levels[0], *(s.x for s in states)])
        expected = golden[f"out.{variant}.x_steps"]
        assert_near(trajectory, expected, atol=2e-4, rtol=1e-5)
        assert_near(states[-1].x, expected[-1], atol=1e-4, rtol=0)
        denoised = golden[f"out.{variant}.denoised"]
        assert_near(torch.stack(estimates), denoised, atol=1e-4, rtol=1e-4)


def test_tables() -> None:
    golden = load("lego", "tables")
    features = PositionalEmbedding(256)(golden["in.c_noise"])
    assert_near(features, golden["out.t_features_256"], atol=1e-6, rtol=1e-6)
    for key, expected in golden.items():
        if key.startswith("out.pos_embed."):
            width, side = (int(part.strip("dimgr")) for part in key.split(".")[2:])
            table = sincos_table(width, side, side).reshape(expected.shape)
            assert_near(table, expected, atol=1e-6, rtol=1e-6)
        elif key.startswith("out.coords."):
            side = int(key.rsplit(".", 1)[1])
            place = pixel_coordinates(torch.zeros(1, 3, side, side), Conditioning())
            assert_near(place.reshape(expected.shape), expected, atol=1e-6, rtol=1e-6)


def test_schedules() -> None:
    for row in case("lego", "schedules")["rows"]:
        seen, batch = row["cur_nimg"], row["batch"]
        lr = learning_rate(OptimizerConfig(lr=1e-4), seen, 200_000_000)
        assert lr == pytest.approx(row["lr"], rel=1e-9)
        beta = decay(EmaConfig(), seen, batch)
        assert beta == pytest.approx(row["ema_beta"], rel=1e-9, abs=1e-12)

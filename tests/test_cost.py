"""What recipes cost, against published figures and hand counts."""

from __future__ import annotations

import json
import resource

import pytest
from typer.testing import CliRunner

from tessera.cli import app
from tessera.errors import TesseraError
from tessera.pipelines.loading import estimate
from tessera.progress import human
from tessera.recipes.loading import load_recipe

TINY = [
    "data.resolution=8", "network.model_channels=16", "network.channel_mult=1,2",
    "network.num_blocks=1", "training.precision=fp32", "training.micro_batch=8",
]  # fmt: skip


@pytest.mark.slow
def test_the_ddpmpp_network_of_cifar10() -> None:
    cost = estimate(load_recipe("edm-cifar10-uncond-vp", ["training.micro_batch=4"]))
    assert cost.parameters == 55_733_891
    assert cost.forward_flops == pytest.approx(42.4e9, rel=2e-3)
    assert cost.train_flops == pytest.approx(3 * cost.forward_flops, rel=1e-2)
    assert cost.run_flops == cost.train_flops * 200_000_000
    assert cost.evaluations == 35
    assert cost.sample_flops == 35 * cost.forward_flops
    assert cost.weight_bytes == cost.gradient_bytes == cost.ema_bytes == 4 * 55_733_891
    assert cost.optimizer_bytes == 2 * cost.weight_bytes


@pytest.mark.slow
def test_the_adm_network_of_imagenet_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cost = estimate(load_recipe("edm-imagenet64-adm", ["sampling.steps=18"]))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert cost.parameters == 295_899_267
    assert cost.evaluations == 35
    assert cost.activation_bytes > 1e11
    assert grown * 1024 < cost.weight_bytes / 2, "the weights alone would take more"


@pytest.mark.slow
def test_attention_is_counted() -> None:
    # One head at 8x8 in one block: two products of 64 x 64 x 16, two FLOPs each.
    base = ["network.attn_resolutions=[]", "network.channel_mult=1,2"]
    plain = estimate(load_recipe("cifar10-small", [*TINY, *base]))
    attention = estimate(load_recipe("cifar10-small", [*TINY, *base, "network.attn_resolutions=8"]))
    # Once in the encoder (one block) and once in the decoder (its last block).
    products, projections = 2 * 64 * 64 * 16 * 2, 64 * 16 * (3 * 16 + 16) * 2
    assert attention.forward_flops - plain.forward_flops == 2 * (products + projections)


@pytest.mark.slow
def test_activations_grow_with_the_batch_and_shrink_with_precision() -> None:
    def activations(*overrides: str) -> int:
        return estimate(load_recipe("cifar10-small", [*TINY, *overrides])).activation_bytes

    whole = activations()
    assert activations("training.micro_batch=16") == pytest.approx(2 * whole, rel=0.02)
    assert activations("training.micro_batch=32", "training.precision=bf16") < 0.9 * activations(
        "training.micro_batch=32"
    )
    # At least the input of every convolution at full resolution is kept.
    assert whole > 8 * 16 * 8 * 8 * 4 * 6


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        (["sampling.steps=10"], 19),
        (["sampling.steps=10", "sampling.solver=euler"], 10),
        (["sampling.kind=ablation", "sampling.steps=10", "sampling.discretization=ve"], 19),
    ],
)
def test_evaluations(overrides: list[str], count: int) -> None:
    assert estimate(load_recipe("cifar10-small", [*TINY, *overrides])).evaluations == count


def test_guidance_doubles_the_evaluations_where_it_acts() -> None:
    recipe = load_recipe("cifar10-small", [*TINY, "sampling.steps=10"])
    assert estimate(recipe, guidance=1.5).evaluations == 2 * 19
    limited = estimate(recipe, guidance=1.5, guidance_interval=(0.2, 5.0)).evaluations
    assert 19 < limited < 2 * 19
    with pytest.raises(TesseraError, match="classes"):
        estimate(load_recipe("cifar10-small", [*TINY, "data.num_classes=0"]), guidance=2)


def test_counting_leaves_the_improved_ddpm_table_usable() -> None:
    from tessera.recipes.build import build_preconditioning

    recipe = load_recipe(
        "cifar10-small", [*TINY, "preconditioning.kind=iddpm", "preconditioning.timesteps=77"]
    )
    assert estimate(recipe).parameters > 0
    assert 0 < build_preconditioning(recipe.preconditioning).sigma_min < 1


def test_optimizer_and_averages() -> None:
    cost = estimate(load_recipe("cifar10-small", [*TINY, "ema.1.halflife_images=1e4"]))
    assert cost.ema_bytes == 2 * cost.weight_bytes
    assert cost.train_bytes == 6 * cost.weight_bytes + cost.activation_bytes


def test_command() -> None:
    runner = CliRunner(env={"COLUMNS": "80"})
    table = runner.invoke(app, ["cost", "cifar10-small", *TINY, "--sample", "guidance=2"])
    assert table.exit_code == 0, table.output
    assert "70 evaluations with guidance=2" in table.output
    assert max(map(len, table.output.splitlines())) <= 80
    limited = ["--sample", "guidance=2", "--sample", "guidance_interval=0.2,5"]
    plain = runner.invoke(app, ["cost", "cifar10-small", *TINY, "--json", *limited])
    assert 35 < json.loads(plain.stdout)["evaluations"] < 70


@pytest.mark.slow
def test_command_with_skipped_bricks() -> None:
    runner = CliRunner(env={"COLUMNS": "80"})
    costs = [
        json.loads(runner.invoke(app, ["cost", "quickstart-digits-lego", "--json", *skip]).stdout)
        for skip in ([], ["--sample", "skip=0.5"], ["--sample", "bricks=0-inf:1"])
    ]
    flops = [cost["sample_flops"] for cost in costs]
    assert flops[0] > flops[1] > flops[2]
    table = runner.invoke(app, ["cost", "quickstart-digits-lego", "--sample", "skip=0.5"])
    assert f"{1 - flops[1] / flops[0]:.1%} skipped" in table.output
    refused = runner.invoke(app, ["cost", "quickstart-digits", "--sample", "skip=0.5"])
    assert isinstance(refused.exception, TesseraError)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (999.6, "1.00 k"), (42.38e9, "42.4 G"), (123456, "123 k"),
     (9.996e6, "10.0 M"), (1.64e21, "1.64 Z")],
)  # fmt: skip
def test_human(value: float, text: str) -> None:
    assert human(value) == text
    assert human(value, "B").startswith(text)

"""Descent on energies while sampling: pipelines, command line, relays, costs, reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from energy_pipeline import energy_pipeline
from tiny_pipeline import tiny_pipeline
from training_case import tiny_recipe
from typer.testing import CliRunner

from tessera.cli import app
from tessera.errors import RecipeError, TesseraError
from tessera.pipelines.experts import assemble
from tessera.pipelines.generate import Job, generate_arrays
from tessera.pipelines.relay import assemble_relay
from tessera.recipes.loading import load_recipe
from tessera.sampling.core import means
from tessera.training.trainer import Trainer

MCMC = {"refine.kind": "mcmc", "refine.steps": 2, "refine.step_size": 0.02}
DISCRETE: dict[str, Any] = {
    "preconditioning": {"kind": "discrete", "timesteps": 50, "prediction": "eps"},
    "objective": {"kind": "discrete", "weight": "snr"},
    "sampling": {"kind": "ddpm", "steps": "3", "variance": "small"},
}


@pytest.mark.parametrize("sampler", ["edm", "ablation", "ddpm", "ddim"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_every_sampler_refines(sampler: str, guidance: float) -> None:
    """The same images in any batch, others than without, and the acceptance rate is known."""
    pipe = energy_pipeline(**(DISCRETE if sampler.startswith("dd") else {}))
    options: dict[str, Any] = {"sampler": sampler, "steps": "3", "guidance": guidance}
    plain = pipe.sample(range(5), labels=1, **options)
    assert pipe.reported == {}
    refined = pipe.sample(range(5), labels=1, **options, **MCMC)
    assert 0 < pipe.reported["acceptance_rate"] <= 1
    assert (plain != refined).any()
    parts = [b.images for b in pipe.sample_batches(range(5), 1, batch=2, **options, **MCMC)]
    assert np.abs(np.concatenate(parts).astype(int) - refined.astype(int)).max() <= 1
    assert 0 < pipe.reported["acceptance_rate"] <= 1


def test_rejection_number_and_size_of_steps_matter() -> None:
    pipe = energy_pipeline()

    def made(**changes: Any) -> Any:
        options = {f"refine.{name}": value for name, value in changes.items()}
        return pipe.sample(range(3), labels=0, **options)

    usual = made(kind="mcmc")
    for change in ({"steps": 1}, {"step_size": 0.4}, {"clamp": "clean"}):
        assert (made(kind="mcmc", **change) != usual).any(), change
    wild = made(step_size=1e5)  # keys of descent say so by themselves
    assert pipe.reported == {"acceptance_rate": 0}
    assert (wild == pipe.sample(range(3), labels=0)).all()
    made(step_size=0.4, reject=False)
    assert pipe.reported == {"acceptance_rate": 1}


def test_the_level_of_the_released_code_needs_discrete_levels() -> None:
    released = {**MCMC, "refine.level": "step", "refine.clamp": "clean"}
    energy_pipeline(**DISCRETE).sample([0], **released)
    with pytest.raises(TesseraError, match="Use level=state"):
        energy_pipeline().check([0], **released)


def test_a_recipe_refines_by_itself() -> None:
    pipe = energy_pipeline(sampling={"refine": {"kind": "mcmc", "steps": 2}})
    pipe.sample([0, 1])
    assert "acceptance_rate" in pipe.reported
    shown = {option.name: option.value for option in pipe.options()}
    assert (shown["refine.kind"], shown["refine.steps"], shown["refine.reject"]) == (
        "mcmc", 2, True,
    )  # fmt: skip
    pipe.sample([0, 1], **{"refine.steps": 3})
    assert "acceptance_rate" in pipe.reported
    pipe.sample([0, 1], refine=None)
    assert pipe.reported == {}


def test_models_without_an_energy_are_refused_in_words() -> None:
    with pytest.raises(TesseraError, match=r"refine\.kind=mcmc descends .* has none"):
        tiny_pipeline().sample([0], **MCMC)
    with pytest.raises(RecipeError, match=r"train with network\.kind=energy_dit"):
        load_recipe("cifar10-small", ["sampling.refine.kind=mcmc"])
    pipe = energy_pipeline()
    with pytest.raises(TesseraError, match="network is a SongUNet"):
        pipe.check([0], guide=tiny_pipeline(), guidance=2, **MCMC)
    with pytest.raises(TesseraError, match="kind Windows"):
        pipe.check([0], size="12x12", layout="windows", **MCMC)
    mistakes = {"refine.steps": "0", "refine.clamp": "hard", "refine.kind": "langevin"}
    for name, value in mistakes.items():
        with pytest.raises(TesseraError, match=name):
            pipe.check([0], **{**MCMC, name: value})


def test_guidance_by_a_weaker_energy_and_experts_refine() -> None:
    pipe = energy_pipeline()
    pipe.sample([0], guide=energy_pipeline(name="weak"), guidance=2, **MCMC)
    assert pipe.reported["acceptance_rate"] > 0
    experts = assemble([pipe, energy_pipeline()], [1.0])
    experts.sample([0], **MCMC)
    assert experts.reported["acceptance_rate"] > 0


def test_a_stage_of_a_relay_refines() -> None:
    """Also the second one, which deblurs: its network is an energy of what it sees."""
    second = energy_pipeline(
        data={"resolution": 16},
        objective={"kind": "blur", "block": 2},
        sampling={"kind": "relay", "steps": 4},
    )
    relay = assemble_relay([energy_pipeline(), second])
    options = {f"{stage}.{k}": v for stage in ("first", "second") for k, v in MCMC.items()}
    plain, refined = relay.sample([0, 1], 0), relay.sample([0, 1], 0, **options)
    assert (plain != refined).any()
    assert relay.reported.keys() == {"first.acceptance_rate", "second.acceptance_rate"}
    relay.sample([0], **{f"first.{k}": v for k, v in MCMC.items()})
    assert relay.reported.keys() == {"first.acceptance_rate"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_gradients_are_left_behind(precision: str) -> None:
    pipe = energy_pipeline()
    pipe.sample([0, 1], precision=precision, guidance=1.5, **MCMC)
    assert all(p.grad is None for p in pipe.model.parameters())
    before = {name: t.clone() for name, t in pipe.model.state_dict().items()}
    with torch.inference_mode():
        pipe.sample([0, 1], precision=precision, **MCMC)
    torch.testing.assert_close(pipe.model.state_dict(), before, atol=0, rtol=0)


def test_costs_of_refinement_are_counted() -> None:
    """On tensors without data, with all steps: n gradients and an energy at all levels but 0."""
    pipe = energy_pipeline()
    plain, refined = pipe.cost(), pipe.cost(**{"refine.kind": "mcmc", "refine.steps": 3})
    assert plain.evaluations == 5
    assert refined.evaluations == 5 + 2 * (3 + 1)
    assert refined.sample_flops > 2 * plain.sample_flops
    job = Job(pipe, [0, 1, 2], None, 2, {"refine.steps": 3, "refine.step_size": 1e-6})
    *_, summary = generate_arrays(job, Path("."))
    assert summary.evaluations == refined.evaluations
    assert summary.reported == {"acceptance_rate": 1}


def test_reports_are_added_up() -> None:
    assert means({"a": (1, 4)}, {"a": (3, 4), "b": (1, 1)}, {"c": (0, 0)}) == {"a": 0.5, "b": 1}


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_refines_and_tells_the_rate(tmp_path: Path) -> None:
    energy_pipeline().save(tmp_path / "pipe")
    keys = [f"{name}={value}" for name, value in MCMC.items()]
    output = run("sample", tmp_path / "pipe", *keys, "--seeds", "0-2", "--out", tmp_path / "out")
    assert "acceptance rate 0." in output or "acceptance rate 1" in output
    settings = json.loads((tmp_path / "out" / "sampling.json").read_text())
    assert settings["sampler"]["refine"]["steps"] == 2
    output = run("sample", tmp_path / "pipe", "--seeds", "0-2", "--out", tmp_path / "plain")
    assert "acceptance" not in output
    assert "refine.kind=mcmc" in run("sample", tmp_path / "pipe", "--options").replace("\n", " ")


def test_previews_log_the_rate(tmp_path: Path) -> None:
    network = {"kind": "energy_dit", "size": "S/2", "depth": 1, "width": 16, "heads": 2}
    preview = {"every_images": 48, "rows": 1, "columns": 2}
    recipe = tiny_recipe(
        tmp_path, network=network, run={"preview": preview},
        sampling={"refine": {"kind": "mcmc", "steps": 2}},
    )  # fmt: skip
    Trainer(recipe, tmp_path / "run").run()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rates = [line for line in lines if "samples_acceptance_rate" in line]
    assert [line["images"] for line in rates] == [48, 96]
    assert all(0 <= line["samples_acceptance_rate"] <= 1 for line in rates)

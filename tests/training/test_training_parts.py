"""A user's own parts in whole runs: training, resuming, scores, costs, several processes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import own_parts
import pytest
import torch
from safetensors.torch import load_file
from test_training_parallel import in_processes
from test_training_trainer import assert_same_run
from torch import nn
from training_case import read_metrics, tiny_recipe

import tessera
from tessera import Parts
from tessera.errors import RecipeError, TesseraError, TrainingError
from tessera.model import Tuning
from tessera.pipelines.experts import assemble
from tessera.pipelines.loading import estimate
from tessera.recipes.build import build_model
from tessera.recipes.loading import load_recipe
from tessera.recipes.schema import OptimizerConfig, Recipe
from tessera.training import evaluation, optimizers, probe
from tessera.training.feed import Feed
from tessera.training.trainer import Trainer

CPU = torch.device("cpu")
ALL = Parts(
    own_parts.network, own_parts.objective, own_parts.sampler, own_parts.refine, own_parts.dataset
)
EXTERNAL = {
    "network": {"kind": "external", "options": {"width": 6}},
    "objective": {"kind": "external", "options": {"sigma": 0.7}},
    "sampling": {
        "kind": "external",
        "options": {"steps": 3},
        "refine": {"options": {"shift": 0.1}},
    },
}


def own_recipe(folder: Path, **changes: Any) -> Recipe:
    """All parts external, without images of its own."""
    base = tiny_recipe(folder, **{**EXTERNAL, **changes}).model_dump()
    return Recipe.model_validate({**base, "data": {**base["data"], "path": None}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run of own parts that was never stopped, with previews."""
    preview = {"every_images": 48, "rows": 1, "columns": 2}
    recipe = own_recipe(
        folder,
        run={"preview": preview},
        ema=[{"halflife_images": 50}, {"halflife_images": 20}],
        training={"micro_batch": 4},
    )
    Trainer(recipe, folder / "whole", parts=ALL).run()
    return folder / "whole"


def test_a_run_learns_and_shows_previews(whole: Path) -> None:
    losses = [line["mse"] for line in read_metrics(whole)]
    assert losses[-1] < losses[0]
    assert [p.name for p in sorted((whole / "previews").iterdir())] == [
        "000000000048.png", "000000000096.png",
    ]  # fmt: skip


@pytest.mark.parametrize("stop_after", [3, 7])
def test_a_run_of_own_parts_resumes_bit_identically(
    stop_after: int, whole: Path, folder: Path
) -> None:
    run_dir = folder / f"resumed-{stop_after}"
    steps = Trainer(load_recipe(whole / "recipe.yaml"), run_dir, parts=ALL).steps()
    for _ in range(stop_after):
        next(steps)
    steps.close()
    Trainer(resume=run_dir, parts=ALL).run()
    assert_same_run(whole, run_dir)
    # The objective's own parameter was trained, and kept.
    newest = sorted((run_dir / "checkpoints").iterdir())[-1]
    assert load_file(newest / "model.safetensors")["objective.log_weight"] != 0


def test_a_run_is_not_resumed_without_its_parts(whole: Path) -> None:
    with pytest.raises(RecipeError, match=r"network\.kind.*Parts\(network=.*--with MODULE"):
        Trainer(resume=whole)
    only = Parts(ALL.network, ALL.objective, ALL.sampler, ALL.refine)
    with pytest.raises(RecipeError, match=r"data\.path is not set.*--with MODULE"):
        Trainer(resume=whole, parts=only)


def test_pipelines_load_sample_and_save_again(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"network\.kind is external"):
        tessera.load(whole)
    pipe = tessera.load(whole, parts=ALL, device="cpu")
    images = pipe.sample(range(3), labels=1)
    assert images.shape == (3, 8, 8, 3)
    assert pipe.class_names == ("even", "odd")
    pipe.save(tmp_path / "again")
    again = tessera.load(tmp_path / "again", parts=ALL, device="cpu")
    assert np.array_equal(again.sample(range(3), labels=1), images)
    assert not np.array_equal(tessera.load(whole, ema="20", parts=ALL).sample([0]), images[:1])
    # The weights do not need the sampler that they were saved with.
    network = tessera.load(whole, parts=Parts(network=own_parts.network))
    assert network.sample([0], sampler="edm", steps=2).shape == (1, 8, 8, 3)
    with pytest.raises(RecipeError, match=r"sampling\.refine is external"):
        network.sample([0])
    with pytest.raises(TesseraError, match=r"model\.safetensors"):
        tessera.load(whole, parts=Parts(network=lambda recipe, width: own_parts.Net(3, 2, 5)))


def test_nothing_is_made_where_parts_are_missing_or_wrong(tmp_path: Path) -> None:
    recipe = own_recipe(tmp_path)
    wrong = {
        r"sampling\.kind and sampling\.refine\.kind are": {"sampler": None, "refine": None},
        r"'loss' of 2 images float32 \[\]": {"objective": lambda r, sigma: total},
    }
    for message, changes in wrong.items():
        parts = Parts(**{**{name: getattr(ALL, name) for name in ALL.names}, **changes})
        with pytest.raises(RecipeError, match=message):
            Trainer(recipe, tmp_path / "run", parts=parts)
    assert not (tmp_path / "run").exists()


def total(model, x, cond, draws):
    return {"loss": model(x, torch.ones(len(x)), cond).mean.sum()}


def test_parts_in_vain_are_named(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    parts = Parts(network=own_parts.network, dataset=own_parts.dataset)
    with pytest.warns(UserWarning, match=r"'network' is not used.*network\.kind=external") as seen:
        trainer = Trainer(recipe, tmp_path / "run", parts=parts)
    assert any(str(recipe.data.path) in str(warning.message) for warning in seen)
    # The path of other images is not kept: a resumed run would take them in silence.
    assert load_recipe(tmp_path / "run" / "recipe.yaml").data.path is None
    assert trainer.dataset.name == "mine"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(own_recipe(tmp_path), tmp_path / "other", parts=ALL)


def test_an_own_data_set_can_be_cut_mirrored_and_kept(tmp_path: Path) -> None:
    data = {"max_images": 20, "xflip": True, "cache": True}
    recipe = own_recipe(tmp_path, data=data)
    feed, own = Feed(recipe, CPU, ALL), own_parts.Images()
    assert len(feed.dataset) == 40
    first, mirrored = feed.dataset.read(np.array([3, 23])), feed.dataset.raw_indices
    assert np.array_equal(first[0], own.images[mirrored[3]])
    assert np.array_equal(first[1], own.images[mirrored[3]][:, :, ::-1])
    assert feed.dataset.labels.tolist() == own.labels[mirrored].tolist()
    first[:] = 0
    assert np.array_equal(feed.dataset.read(np.array([3]))[0], own.images[mirrored[3]])


def test_scores_compare_with_the_own_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = evaluation.build_reference
    monkeypatch.setattr(
        evaluation, "build_reference", lambda data, **how: build(data, training_images=256, **how)
    )
    section = {"metrics": ["fd", "pr"], "every_images": 48, "images": 8, "batch": 4}
    Trainer(own_recipe(tmp_path, evaluate=section), tmp_path / "run", parts=ALL).run()
    lines = [x for x in read_metrics(tmp_path / "run") if "evaluate/fd" in x]
    assert [line["images"] for line in lines] == [48, 96]
    assert tessera.load(tmp_path / "run" / "best", parts=ALL).images_seen in (48, 96)


def test_costs_are_counted_and_measured(tmp_path: Path) -> None:
    recipe = own_recipe(tmp_path)
    cost = estimate(recipe, ALL)
    assert cost.parameters == sum(p.numel() for p in build_model(recipe, ALL).parameters())
    # Two convolutions of 3x3 between 3 and 6 channels on 8x8 pixels, and a linear layer of 3 to 6.
    assert cost.forward_flops == 2 * (2 * 9 * 3 * 6 * 64 + 3 * 6)
    assert cost.evaluations == 3
    assert cost.sample_flops == 3 * cost.forward_flops
    assert estimate(recipe, ALL, **{"options.steps": "5"}).evaluations == 5
    measured = probe.measure(recipe, Feed(recipe, CPU, ALL), CPU, 0.01, parts=ALL, show=False)
    assert measured.steps.keys() == {(8, None, None)}


def test_what_cannot_be_counted_is_said(tmp_path: Path) -> None:
    class Looking(own_parts.Net):
        def forward(self, x, noise, cond):
            return super().forward(x, noise, cond) * float(x.abs().max() + 1)

    parts = Parts(
        lambda recipe, width: Looking(3, 2, width), ALL.objective, ALL.sampler, ALL.refine
    )
    with pytest.raises(TesseraError, match=r"without\s+data.*test_training_parts\.py:\d+"):
        estimate(own_recipe(tmp_path), parts)


def test_experts_of_own_networks(tmp_path: Path) -> None:
    for place in (0, 1):
        recipe = own_recipe(tmp_path, snr_splits=[4.0], expert=place, objective={"kind": "edm"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Trainer(recipe, tmp_path / f"{place}", parts=ALL).run()
    made = assemble([tessera.load(tmp_path / f"{place}", parts=ALL) for place in (0, 1)])
    made.save(tmp_path / "experts")
    pipe = tessera.load(tmp_path / "experts", parts=ALL)
    assert np.array_equal(pipe.sample([0, 1]), made.sample([0, 1]))
    with pytest.raises(RecipeError, match="external"):
        tessera.load(tmp_path / "experts")


def test_compilation_needs_blocks(tmp_path: Path) -> None:
    recipe = own_recipe(tmp_path, training={"compile": True})
    with pytest.raises(TrainingError, match=r"blocks\(\)"):
        Trainer(recipe, tmp_path / "run", parts=ALL)


# ------------------------------------------------------------------------------- several processes


def train(folder: Path, run_dir: Path, parts: Parts, changes: dict[str, Any]) -> None:
    Trainer(own_recipe(folder, **changes), run_dir, parts=parts).run()


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_train_as_one(mode: str, folder: Path, tmp_path: Path) -> None:
    # The learned weight of the objective has no axis to be sharded along.
    changes = {"training": {"images": 48, "parallel": mode}, "objective": {"kind": "edm"}}
    one, two = tmp_path / "one", tmp_path / "two"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(folder, one, ALL, changes)
        in_processes(2, train, folder, two, ALL, changes)
    expected, actual = tessera.load(one, parts=ALL), tessera.load(two, parts=ALL)
    torch.testing.assert_close(
        actual.model.network.state_dict(), expected.model.network.state_dict(),
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip


class Idle(own_parts.Net):
    """Has a parameter that does nothing."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.idle = nn.Parameter(torch.zeros(2))


def refused(folder: Path, run_dir: Path) -> None:
    parts = Parts(
        lambda recipe, width: Idle(3, 2, width),
        *(ALL.objective, ALL.sampler, ALL.refine, ALL.dataset),
    )
    with pytest.raises(RecipeError, match=r"no part in the loss: network\.idle"):
        Trainer(own_recipe(folder), run_dir, parts=parts)


def test_parameters_without_a_part_are_named(folder: Path, tmp_path: Path) -> None:
    in_processes(2, refused, folder, tmp_path / "run")


# ---------------------------------------------------------------------------- groups of parameters


def test_the_first_step_of_each_group() -> None:
    torch.manual_seed(0)
    network = own_parts.Net(3, 2, 4)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    config = OptimizerConfig(kind="adamw", lr=0.01, weight_decay=0.5, eps=1e-12)
    optimizer = optimizers.build_optimizer(network, config)
    optimizers.set_learning_rate(optimizer, 0.02)
    x = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)
    cond = tessera.conditioning.Conditioning(labels=torch.tensor([0, 1]))
    network(x, torch.ones(2), cond).square().sum().backward()
    optimizer.step()
    # Adam's first step is the rate times the sign; decay is of tensors with two axes.
    for name, parameter in network.named_parameters():
        rate = 0.02 * (0.1 if name == "scale" else 1)
        decay = 0 if name == "plain.weight" or parameter.ndim < 2 else 0.5
        expected = before[name] * (1 - rate * decay) - rate * parameter.grad.sign()
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)
    groups = {(g["weight_decay"], round(g["lr"], 6)) for g in optimizer.param_groups}
    assert groups == {(0.5, 0.02), (0.0, 0.02), (0.5, 0.002)}


def test_groups_survive_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    averages = [{"halflife_images": 50}, {"halflife_images": 20}]
    recipe = own_recipe(tmp_path, optimizer={"kind": "adamw", "weight_decay": 0.1}, ema=averages)

    def run(name: str, stop_after: int | None = None) -> Path:
        steps = Trainer(recipe, tmp_path / name, parts=ALL).steps()
        for _ in zip(range(stop_after or 10**6), steps, strict=False):
            pass
        steps.close()
        if stop_after is not None:
            Trainer(resume=tmp_path / name, parts=ALL).run()
        return tmp_path / name

    whole = run("whole")
    assert_same_run(whole, run("stopped", 6))
    frozen = {"scale": Tuning(lr=0.0)}
    monkeypatch.setattr(own_parts, "TUNED", frozen)
    kept = tessera.load(run("frozen"), parts=ALL).model.network
    assert torch.equal(kept.scale, torch.ones(3, 1, 1))


def test_a_wrong_name_of_a_parameter_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_parts, "TUNED", {"scal": Tuning()})
    with pytest.raises(TesseraError, match=r"tuning\(\) of Net names 'scal'.*scale, first\.weight"):
        optimizers.build_optimizer(own_parts.Net(3, 0, 4), OptimizerConfig())

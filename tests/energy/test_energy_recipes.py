"""Recipes of transformers and energies: sizes, rules, training through every room of the house."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_case import read_metrics, tiny_recipe

from tessera.diffusion.energy_objective import EnergyObjective
from tessera.errors import RecipeError
from tessera.networks.dit import DiT, EnergyDiT
from tessera.pipelines.loading import build_pipeline, load
from tessera.recipes.build import build_denoiser, recipe_objective
from tessera.recipes.loading import load_recipe, parse_recipe, shipped
from tessera.recipes.schema import Recipe
from tessera.training.learner import learner_of
from tessera.training.optimizers import set_learning_rate
from tessera.training.trainer import Trainer

TINY = {"size": "S/2", "depth": 1, "width": 16, "heads": 2}
ENERGY: dict[str, Any] = {"kind": "energy_dit", **TINY, "step_size": 0.05}
DISCRETE: dict[str, Any] = {
    "preconditioning": {"kind": "discrete", "timesteps": 50, "prediction": "eps"},
    "objective": {"kind": "discrete", "weight": "snr"},
    "sampling": {"kind": "ddpm", "steps": "3", "variance": "small"},
}
ALL_TERMS: dict[str, Any] = {
    "network": {**ENERGY, "learn_step_size": True, "step_size_lr": 3},
    "energy": {
        "contrastive": 0.05, "refinement": 0.1, "contrastive_steps": 2, "refinement_steps": 2,
    },
}  # fmt: skip


def energy_recipe(folder: Path, **changes: Any) -> Recipe:
    return tiny_recipe(folder, **({"network": ENERGY} | changes))


@pytest.mark.parametrize("kind", ["dit", "energy_dit"])
@pytest.mark.parametrize(
    ("size", "patch", "shape"),
    [
        ("S/2", 2, (12, 384, 6)),
        ("B/1", 1, (12, 768, 12)),
        ("L/4", 4, (24, 1024, 16)),
        ("XL/8", 8, (28, 1152, 16)),
    ],
)
def test_published_sizes(kind: str, size: str, patch: int, shape: tuple[int, int, int]) -> None:
    recipe = load_recipe("cifar10-small", [f"network.kind={kind}", f"network.size={size}"])
    with torch.device("meta"):
        network = build_denoiser(recipe).network
    assert isinstance(network, DiT | EnergyDiT)
    heads = network.layers[0].attn.heads
    assert (len(network.layers), network.width, heads) == shape
    assert network.patch == patch


def test_sizes_in_part_of_ones_own() -> None:
    keys = ["size=B/8", "patch=4", "depth=3", "mlp_ratio=2"]
    recipe = load_recipe("cifar10-small", ["network.kind=dit", *(f"network.{k}" for k in keys)])
    with torch.device("meta"):
        network = build_denoiser(recipe).network
    assert (network.patch, len(network.layers), network.width) == (4, 3, 768)
    assert network.layers[0].mlp.fc1.out_features == 2 * 768


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["network.kind=dit", "network.size=M/2"], "network.size: 'M/2' is not one of S/1"),
        (["network.kind=dit", "network.size=S/8", "data.resolution=36"], "a multiple of 8"),
        (["network.kind=dit", "network.width=30"], "width .30. must be a multiple of heads"),
        (["network.kind=dit", "energy.contrastive=1"], "of kind dit has no energy to train"),
        (["energy.contrastive=1"], "of kind song_unet has no energy to train"),
        (["network.kind=energy_dit", "energy.refinement=1"], "set network.learn_step_size=true"),
        (["network.kind=energy_dit", "network.learn_step_size=true"], "Set energy.refinement"),
        (["network.kind=energy_dit", "network.step_size_lr=2"], "set learn_step_size=true"),
        (["network.kind=energy_dit", "energy.contrastive_steps=2"], "set contrastive above 0"),
        (["network.kind=energy_dit", "energy.refines=step_size"], "set refinement above 0"),
        (["network.kind=energy_dit", "energy.refinement_steps=1"], "must be at least 2"),
        (
            ["network.kind=energy_dit", "network.recompute=true", "training.compile=true"],
            "a compiled energy keeps",
        ),
        (["network.kind=energy_dit", "training.precision=fp16"], "float16 loses its small values"),
        (
            ["network.kind=energy_dit", "energy.contrastive=1", "objective.kind=blur",
             "sampling.kind=relay"],
            "white noise",
        ),
        (
            ["network.kind=energy_dit", "energy.contrastive=1", "objective.kind=external"],
            "white noise",
        ),
        (["network.kind=dit", "network.learn_variance=true"], "preconditioning.kind=discrete"),
        (["network.kind=dit", "coords.frequencies=2"], "kind dit always see the plain"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_in_words(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe("cifar10-small", overrides)


def test_the_shipped_pair_is_one_transformer() -> None:
    plain, energy = (load_recipe(f"cifar10-small-{name}") for name in ("dit", "energy"))
    networks = [build_denoiser(recipe).network for recipe in (plain, energy)]
    layers = [
        {name: p.shape for name, p in network.layers.named_parameters()} for network in networks
    ]
    assert layers[0] == layers[1]
    tokens = (32 // networks[1].patch) ** 2
    assert networks[1].multiplier == tokens
    same = set(Recipe.model_fields) - {"name", "description", "network", "training"}
    assert all(getattr(plain, key) == getattr(energy, key) for key in same)
    assert plain.training.images > 2 * energy.training.images


def test_the_readmes_recipes() -> None:
    names = [name for name in shipped() if name.startswith("energy-")]
    assert len(names) == 6
    for name in names:
        energy, plain = load_recipe(name), load_recipe(name.replace("energy", "dit"))
        tokens = energy.shape[1] // energy.network.token
        assert energy.shape[0] == 16
        assert tokens == energy.data.resolution // 16
        assert energy.fitted_sampling.clip == "none"
        assert energy.sampling.refine.kind == "mcmc"
        assert energy.optimizer == plain.optimizer
        assert energy.objective == plain.objective


@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize("process", [{}, DISCRETE])
def test_training_an_energy(tmp_path: Path, terms: bool, process: Any) -> None:
    recipe = energy_recipe(tmp_path, **process, **(ALL_TERMS if terms else {}))
    trainer = Trainer(recipe, tmp_path / "run")
    trainer.run()
    line = read_metrics(tmp_path / "run")[-1]
    assert ("contrastive" in line, "refinement" in line) == (terms, terms)
    names = {name.split(".")[-1] for name, p in trainer.learner.step.named_parameters()}
    assert ("alpha" in names) == terms
    pipe = load(tmp_path / "run")
    assert pipe.sample([1, 2], labels=1, guidance=1.5).shape == (2, 8, 8, 3)
    step_size = float(pipe.networks()[0].step_size.detach())
    assert (step_size == pytest.approx(0.05)) == (not terms)


def test_the_step_size_learns_at_its_own_rate(tmp_path: Path) -> None:
    recipe = energy_recipe(tmp_path, **ALL_TERMS, optimizer={"weight_decay": 0.5, "kind": "adamw"})
    learner = learner_of(recipe, build_denoiser(recipe), torch.device("cpu"))
    set_learning_rate(learner.optimizer, 0.25)
    alpha = learner.step.model.network.alpha
    groups = {
        (group["lr"], group["weight_decay"]): {id(p) for p in group["params"]}
        for group in learner.optimizer.param_groups
    }
    assert groups.keys() == {(0.25, 0.5), (0.25, 0.0), (0.75, 0.0)}
    assert groups[0.75, 0.0] == {id(alpha)}
    assert learner.reports() == {"step_size": pytest.approx(alpha.item())}


def test_resuming_repeats_a_run_that_never_stopped(tmp_path: Path) -> None:
    recipe = energy_recipe(tmp_path, **ALL_TERMS)
    Trainer(recipe, tmp_path / "whole").run()
    first = Trainer(recipe, tmp_path / "parts")
    for report in first.steps():
        if report.images >= 32:
            break
    first.save()
    second = Trainer(resume=tmp_path / "parts")
    assert second.images_seen == 32
    second.run()
    states = [load(tmp_path / name).networks()[0].state_dict() for name in ("whole", "parts")]
    torch.testing.assert_close(states[1], states[0], atol=0, rtol=0)


def test_a_learned_variance(tmp_path: Path) -> None:
    network = {"kind": "dit", **TINY, "learn_variance": True}
    recipe = tiny_recipe(tmp_path, network=network, **DISCRETE)
    Trainer(recipe, tmp_path / "run").run()
    assert "vb" in read_metrics(tmp_path / "run")[-1]
    pipe = load(tmp_path / "run")
    images = pipe.sample([0], variance="learned")
    assert (images != pipe.sample([0])).any()


@pytest.mark.parametrize("kind", ["dit", "energy_dit"])
def test_patches_know_their_places(tmp_path: Path, kind: str) -> None:
    network = {"kind": kind, **TINY}
    recipe = tiny_recipe(tmp_path, network=network, view={"kind": "patches", "sizes": [4, 8]})
    Trainer(recipe, tmp_path / "run").run()
    pipe = load(tmp_path / "run")
    assert pipe.sample([0], window="2,2,4,4").shape == (1, 4, 4, 3)
    assert pipe.sample([0], size="8x12").shape == (1, 8, 12, 3)


@pytest.mark.parametrize("kind", ["dit", "energy_dit"])
@pytest.mark.parametrize("change", [
    {"preconditioning": {"kind": "iddpm", "timesteps": 20}, "objective": {"kind": "discrete"}},
    {"low_resolution": 4},
    {"augment": {}},
    {"codec": {"kind": "vae", "downsample": 2}, "data": {"resolution": 16}},
])  # fmt: skip
def test_with_other_parts_of_the_house(tmp_path: Path, kind: str, change: Any) -> None:
    """Counted by running them: the loss and its gradients, and a sample."""
    recipe = tiny_recipe(tmp_path, network={"kind": kind, **TINY}, **change)
    cost = build_pipeline(recipe).cost()
    assert cost.train_flops > cost.forward_flops > 0


@pytest.mark.slow
def test_the_double_backward_is_counted(tmp_path: Path) -> None:
    def cost(network: dict[str, Any], **changes: Any) -> Any:
        recipe = tiny_recipe(tmp_path, network=network, **changes)
        return build_pipeline(recipe).cost()

    plain, energy = cost({"kind": "dit", **TINY}), cost(ENERGY)
    assert 1.8 < energy.train_flops / plain.train_flops < 2.4
    assert 1.8 < energy.sample_flops / plain.sample_flops < 3.2
    assert cost(**ALL_TERMS).train_flops > 3 * energy.train_flops
    assert cost({**ENERGY, "recompute": True}).activation_bytes < energy.activation_bytes


def test_the_objective_has_the_terms(tmp_path: Path) -> None:
    recipe = energy_recipe(tmp_path, **ALL_TERMS)
    objective = recipe_objective(recipe)
    assert isinstance(objective, EnergyObjective)
    assert (objective.terms.contrastive, objective.terms.refinement) == (0.05, 0.1)
    assert not isinstance(recipe_objective(energy_recipe(tmp_path)), EnergyObjective)


def test_old_recipes_have_no_terms(tmp_path: Path) -> None:
    data = tiny_recipe(tmp_path).model_dump()
    del data["energy"]
    assert parse_recipe(data).energy is None

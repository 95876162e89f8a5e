"""Patch Diffusion against the released code: patches, denoiser, losses, samplers, the loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import (
    RecordedDraws,
    RecordedSteps,
    case,
    load,
    recorded_network,
    relative_error,
    weights,
)
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.data.loader import StepPlan
from tessera.data.views import PatchView, crop, patch_coordinates, patch_sizes
from tessera.diffusion.guidance import Guided
from tessera.diffusion.objectives import EdmObjective
from tessera.diffusion.preconditioning import Edm, Preconditioned
from tessera.images import from_uint8
from tessera.networks.layers import CoordinateInput
from tessera.pipelines.canvas import choose_canvas
from tessera.pipelines.loading import build_pipeline
from tessera.recipes.build import build_denoiser, build_objective
from tessera.recipes.loading import parse_recipe
from tessera.recipes.schema import CanvasConfig, Recipe
from tessera.sampling.edm import edm_sampler
from tessera.training.learner import Learner, MicroBatch, TrainStep

NETWORKS = ["net_ddpmpp", "net_implicit", "net_adm_latent"]


def restored(name: str) -> tuple[Preconditioned, dict[str, Tensor]]:
    golden, config = load("patch", name), case("patch", name)["config"]
    network = recorded_network(config)
    network.load_state_dict(weights(golden, "w.model."), strict=True)
    channels, side = config["out_channels"], config["img_resolution"]
    shape = (channels, side, side)
    return Preconditioned(network.eval(), Edm(), shape, config["label_dim"]), golden


def conditioning(golden: dict[str, Tensor], coords: Tensor | None) -> Conditioning:
    labels = golden.get("in.class_labels")
    return Conditioning(
        labels=None if labels is None else labels.argmax(dim=1),
        augment=golden.get("in.augment_labels"),
        coords=coords,
    )


@pytest.mark.parametrize("side", [8, 16])
@pytest.mark.parametrize("name", NETWORKS)
def test_patches_and_denoiser(name: str, side: int) -> None:
    denoiser, golden = restored(name)
    p = f"p{side}"
    view = PatchView(16, 2, patch_sizes(16, (side, 16), 0.5) if side < 16 else [], seed=0)
    offsets = [golden.get(f"in.{p}.{axis}") for axis in ("row", "col")]
    numbers = dict(zip(("patch.row", "patch.column"), offsets, strict=True))
    draws = RecordedDraws({k: v for k, v in numbers.items() if v is not None})
    patch, coords = view.apply(golden["in.images"], draws, StepPlan(0, 2, side))
    assert torch.equal(patch, golden[f"out.{p}.patch"])
    if coords is None:
        assert side == 16
    else:
        assert (coords - golden[f"out.{p}.pos"]).abs().max() <= 1e-6
    cond = conditioning(golden, coords)
    for index, sigma in enumerate(golden["in.sigmas"]):
        z = patch + golden[f"in.{p}.noise"] * sigma
        for level in (sigma, sigma.expand(2)):
            with torch.no_grad():
                mean = denoiser(z, level, cond).mean
            assert relative_error(mean, golden[f"out.{p}.D.{index}"]) <= 2e-5


@pytest.mark.parametrize("side", [8, 16])
@pytest.mark.parametrize("name", NETWORKS)
def test_loss_and_gradients(name: str, side: int) -> None:
    denoiser, golden = restored(name)
    p, x, coords = f"p{side}", golden["in.images"], None
    if side < 16:
        rows, columns = golden[f"in.{p}.loss_row"], golden[f"in.{p}.loss_col"]
        x, coords = crop(x, rows, columns, side), patch_coordinates(rows, columns, side, 16)
    numbers = {"sigma": golden[f"in.{p}.loss_rnd"], "noise": golden[f"in.{p}.loss_noise"]}
    cond = replace(conditioning(golden, coords), augment=None)
    objective, draws = EdmObjective(), RecordedDraws(numbers)
    loss = objective.elementwise(denoiser, x, cond, draws, objective.sigma(draws))
    assert relative_error(loss, golden[f"out.{p}.loss"]) <= 1e-4

    (loss.sum() / len(x)).backward()
    parameters = dict(denoiser.network.named_parameters())
    names = case("patch", name)["parameter_order"]
    assert len(names) == len(parameters)
    for key, expected in zip(names, golden[f"out.{p}.gradnorm"].tolist(), strict=True):
        gradient = parameters[key.removeprefix("model.")].grad
        if expected < 0:
            assert gradient is None or not gradient.any(), key
        else:
            assert gradient is not None
            assert gradient.norm().item() == pytest.approx(expected, rel=1e-3, abs=1e-7), key


def recipe_of(name: str) -> Recipe:
    """The recorded network as a recipe."""
    config = case("patch", name)["config"]
    song = config["model_type"] == "SongUNet"
    same = ("model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions")
    network = {k: config[k] for k in same} | {"dropout": 0.0}
    if song:
        network["implicit_mlp"] = config.get("implicit_mlp", False)
    return parse_recipe(
        {
            "name": name,
            "data": {"resolution": 16, "channels": config["out_channels"]},
            "view": {"kind": "patches"},
            "augment": {"xflip": 1} if config["augment_dim"] else None,
            "network": {"kind": "song_unet" if song else "adm_unet", **network},
        }
    )


@pytest.mark.parametrize(
    "run", case("patch", "sampler")["config"]["runs"], ids=lambda r: r["index"]
)
def test_sampler(run: dict[str, Any]) -> None:
    numbers, index, window = load("patch", "sampler"), run["index"], run["window"]
    denoiser, _ = restored(run["weights"].removesuffix(".safetensors"))
    latents = numbers[f"in.{index}.latents"]
    labels = numbers.get(f"in.{index}.class_labels")
    x, y = window.get("x_start", 0), window.get("y_start", 0)
    side = window.get("image_size", 16)
    recipe = recipe_of("net_implicit")  # the canvas depends on nothing but the resolution
    section = CanvasConfig(window=(x, y, side, side), resolution=window["resolution"])
    canvas = choose_canvas(recipe, section)
    coords = canvas.coords(2, torch.device("cpu"))
    if coords is not None:
        assert (coords[:1] - numbers[f"out.{index}.pos"]).abs().max() <= 1e-6
    else:
        assert (x, y, side) == (0, 0, 16)
    cond = Conditioning(None if labels is None else labels.argmax(dim=1), coords=coords)
    names = {"num_steps": "steps"}
    options = {names.get(k, k.lower()): v for k, v in run["options"].items()}
    noise = RecordedSteps(numbers.get(f"in.{index}.step_noise"))
    model = denoiser if run["cfg"] is None else Guided(denoiser, run["cfg"])
    states = list(edm_sampler(**options)(model, latents, cond, noise))
    assert relative_error(states[-1].x, numbers[f"out.{index}.final"]) <= 5e-4


def test_frequency_embedding() -> None:
    numbers = load("patch", "sampler")
    embedded = CoordinateInput(4).embed(numbers["in.posembed"])
    assert relative_error(embedded, numbers["out.posembed4"]) <= 1e-6


def test_images_of_seeds(tmp_path: Path) -> None:
    denoiser, _ = restored("net_ddpmpp")
    config, expected = case("patch", "generate")["config"], load("patch", "generate")
    pipe = build_pipeline(recipe_of("net_ddpmpp"), denoiser)
    images = pipe.sample(
        config["seeds"],
        steps=config["steps"],
        s_churn=config["S_churn"],
        s_min=config["S_min"],
        s_max=config["S_max"],
        s_noise=config["S_noise"],
        batch=config["batch"],
    )
    for seed, image in zip(config["seeds"], images, strict=True):
        recorded = expected[f"out.{seed // 1000 * 1000:06d}/{seed:06d}.png"].numpy()
        assert np.abs(image.astype(int) - recorded).max() <= 1


def test_released_loop() -> None:
    golden, config = load("patch", "train"), case("patch", "train")["config"]
    network = config["network"]
    same = ("model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions")
    halflife = config["ema_halflife_kimg"] * 1000
    recipe = parse_recipe(
        {
            "name": "golden",
            "data": {"resolution": 64},
            "view": {"kind": "patches", "real_p": config["real_p"]},
            "network": {"kind": "song_unet", "dropout": 0.0, **{k: network[k] for k in same}},
            "optimizer": {"lr": 1e-3, "rampup_images": int(config["lr_rampup_kimg"] * 1000)},
            "ema": [{"halflife_images": halflife, "rampup_ratio": config["ema_rampup_ratio"]}],
            "training": {"images": 15, "batch": 2, "micro_batch": 1},
        }
    )
    objective, losses = build_objective(recipe.objective), list[Tensor]()

    def recording(denoiser, x, cond, draws):
        terms = objective(denoiser, x, cond, draws)
        losses.append(terms["loss"].detach().double().sum())
        return terms

    denoiser = build_denoiser(recipe)
    denoiser.network.load_state_dict(weights(golden, "w0.model."), strict=True)
    learner = Learner(
        TrainStep(denoiser, recording),
        recipe.optimizer,
        recipe.ema,
        recipe.training,
        torch.device("cpu"),
    )
    # The released loop draws a size for each round of a step, and counts the average number of
    # images instead of the actual one.
    counted = 2 * sum(
        size.probability * size.multiplier for size in patch_sizes(64, (16, 32, 64), 0.5)
    )
    assert counted == pytest.approx(3.8)

    def micro_batches(step: int) -> Iterator[MicroBatch]:
        for index in (2 * step, 2 * step + 1):
            described = config["micro_batches"][index]
            side, images = described["patch_size"], described["images"]
            recorded = weights(golden, f"in.{index}.")
            x, coords = recorded["images_u8"], None
            if side < 64:
                x = crop(x, recorded["row"], recorded["col"], side)
                coords = patch_coordinates(recorded["row"], recorded["col"], side, 64)
            draws = RecordedDraws({"sigma": recorded["rnd"], "noise": recorded["noise"]})
            cond = Conditioning(coords=coords)
            yield MicroBatch(from_uint8(x), cond, draws, 0, weight=counted / 2 / images)

    seen = [0, *config["cur_nimg_after_each_step"]]
    for step in range(len(seen) - 1):
        assert seen[step + 1] == seen[step] + int(counted)
        learner.update(micro_batches(step), counted, seen[step])

    expected = torch.stack([golden[f"out.{k}.loss_sum"] for k in range(len(losses))])
    assert ((torch.stack(losses) - expected).abs() <= 1e-4 * expected).all()
    for index, prefix in ((None, "out.net.model."), (0, "out.ema.model.")):
        state = denoiser.state_dict() if index is None else learner.average(index)
        for name, value in weights(golden, prefix).items():
            difference = (state[f"network.{name}"] - value).abs()
            if name.endswith("qkv.bias"):
                # Softmax is blind to the keys' bias: Adam makes steps of its gradient's rounding.
                difference[1::3] = 0
            assert difference.max() < 1e-4, name


@pytest.mark.parametrize("recorded", case("patch", "schedule")["cases"])
def test_schedule(recorded: dict[str, Any]) -> None:
    side, sides = recorded["resolution"], recorded["patch_sizes"]
    if recorded["latents"]:
        assert sides == [side // 2, side]
    else:
        assert sides == [side // 4, side // 2, side]
    sizes = patch_sizes(side, sides, recorded["real_p"])
    assert [s.probability for s in sizes] == pytest.approx(recorded["probabilities"])
    average = sum(s.probability * side / s.side for s in sizes)
    assert average == pytest.approx(recorded["batch_mul_avg"])
    if recorded["batch_multipliers"] == [4, 2, 1]:
        assert [s.multiplier for s in sizes] == [4, 2, 1]
    else:  # the released table is irregular: 8 where the paper's average assumes 4 (or 2)
        released = recorded["batch_multipliers"]
        sizes = patch_sizes(side, sides, recorded["real_p"], multipliers=released)
        assert [s.multiplier for s in sizes] == released

    total = recorded["progressive_total_kimg"] * 1000
    view = PatchView(side, 1, sizes, seed=0, progressive=True, total_images=total)
    for kimg, expected in recorded["progressive_kimg_to_patch"]:
        # A size of probability 0 is never chosen here, where the released code starts with it.
        if recorded["real_p"] == 1:
            expected = side
        assert view.size(kimg * 1000).side == expected

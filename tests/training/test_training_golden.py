"""The released training loop: losses, weights and averages after five steps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from golden_cases import RecordedDraws, case, load, relative_error, weights
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.recipes.build import build_augment, build_denoiser, build_objective
from tessera.recipes.loading import parse_recipe
from tessera.recipes.schema import Recipe
from tessera.training.learner import Learner, MicroBatch, TrainStep


def recorded_recipe(config: dict, **training: object) -> Recipe:
    """The recorded run's settings as a recipe."""
    network = config["network"]
    same = ("model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions")
    batch = config["batch_size"]
    return parse_recipe(
        {
            "name": "golden",
            "data": {"resolution": network["img_resolution"], "num_classes": network["label_dim"]},
            "augment": config["augment"],
            "network": {"kind": "song_unet", "dropout": 0.0, **{k: network[k] for k in same}},
            "optimizer": {"lr": 1e-3, "rampup_images": 10},
            "ema": [{"halflife_images": 20, "rampup_ratio": config["ema_rampup_ratio"]}],
            "training": {"images": batch * config["steps"], "batch": batch, **training},
        }
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_released_loop(channels_last: bool) -> None:
    golden, config = load("edm", "train"), case("edm", "train")["config"]
    recipe = recorded_recipe(config, channels_last=channels_last)
    objective, augment = build_objective(recipe.objective), build_augment(recipe.augment)
    assert augment is not None
    losses: list[Tensor] = []

    def recording(denoiser, x, cond, draws):
        terms = objective(denoiser, x, cond, draws)
        losses.append(terms["loss"].detach())
        return terms

    denoiser = build_denoiser(recipe)
    denoiser.network.load_state_dict(weights(golden, "w0.model."))
    learner = Learner(
        TrainStep(denoiser, recording),
        recipe.optimizer,
        recipe.ema,
        recipe.training,
        torch.device("cpu"),
    )
    rounds = config["accumulation_rounds"]

    def micro_batches(step: int) -> Iterator[MicroBatch]:
        for index in range(rounds * step, rounds * (step + 1)):
            recorded = weights(golden, f"in.{index}.")
            numbers = {"sigma": recorded.pop("rnd"), "noise": recorded.pop("noise")}
            numbers |= {f"augment.{name}": value for name, value in recorded.items()}
            # The released code draws shifts as [2, B].
            numbers["augment.translate_frac.n"] = recorded["translate_frac.n"].T
            draws = RecordedDraws(numbers)
            x, augmented = augment(recorded["images"], draws)
            cond = Conditioning(recorded["labels"].argmax(dim=1), augmented)
            yield MicroBatch(x, cond, draws, network_seed=0)

    batch = config["batch_size"]
    for step in range(config["steps"]):
        learner.update(micro_batches(step), batch, step * batch)

    expected = torch.cat([golden[f"out.{k}.loss"].sum((1, 2, 3)) for k in range(len(losses))])
    assert relative_error(torch.cat(losses), expected) < 1e-4
    worst = 0.0
    for index, prefix in ((None, "out.net.model."), (0, "out.ema.model.")):
        state = denoiser.state_dict() if index is None else learner.average(index)
        for name, value in weights(golden, prefix).items():
            difference = (state[f"network.{name}"] - value).abs()
            if name.endswith("qkv.bias"):
                # Softmax does not see a bias of the keys (q, k, v interleaved): its gradient is
                # rounding noise alone, which Adam turns into steps of any sign.
                assert difference[1::3].max() < 1e-3 * config["steps"]
                difference[1::3] = 0
            assert difference.max() < 1e-4, name
            worst = max(worst, float(difference.max()))
    assert worst < 2e-5

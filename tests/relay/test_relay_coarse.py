"""Relays whose first stage is the coarse band of a model of full size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from relay_tiny import SECOND, pipeline, run
from torch import Tensor

import tessera
from tessera.diffusion.means import block_means
from tessera.errors import TesseraError
from tessera.pipelines.plans import DiffusionPlan, Start
from tessera.pipelines.relay import RelayPipeline, assemble_relay


def coarse(*bands: dict[str, Any], **more: Any) -> Any:
    return pipeline({"view": {"kind": "bands", "bands": [*bands]}}, **more)


OWNER = ({"below": 0.9}, {"factor": 2})


@pytest.fixture(scope="module")
def relay() -> RelayPipeline:
    return assemble_relay([coarse(*OWNER, name="bands"), pipeline(SECOND, name="high")])


def test_the_first_stage_stays_in_its_band_and_hands_over_means(
    relay: RelayPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[Tensor] = []
    start = DiffusionPlan.start

    def watched(self: DiffusionPlan, *arguments: Any) -> Start:
        handed.extend(arguments[2:])
        return start(self, *arguments)

    monkeypatch.setattr(DiffusionPlan, "start", watched)
    seen: list[int] = []
    hook = relay.pipes[0].model.network.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[-1])
    )
    states = [state for _, state in relay.states(relay.plan(range(2), [0, 1]), [0, 1])]
    hook.remove()
    (pictures,) = handed
    assert seen == [4] * (2 * 2 - 1)
    assert pictures.shape == (2, 3, 4, 4)
    assert torch.equal(pictures, block_means(states[1].x, 2))
    assert states[-1].x.shape == (2, 3, 8, 8)
    assert relay.sides == [(4, 4), (8, 8)]


def test_more_steps_of_the_first_stage_stay_in_its_band(relay: RelayPipeline) -> None:
    plan = relay.plan([0], [0], **{"first.steps": 7})
    levels = plan.plans[0].sampler.levels(plan.plans[0].denoiser)
    assert len(levels) == 7
    assert 0.9 < levels[-1] < 0.90001
    costs = relay.costs(**{"first.steps": 7})
    each = {name: cost.sample_flops / cost.evaluations for name, cost in costs.items()}
    assert each["first"] < 0.3 * each["second"]


def test_it_is_saved_and_told_by_the_command(relay: RelayPipeline, tmp_path: Path) -> None:
    images = relay.sample(range(2), [0, 1])
    for place, pipe in enumerate(relay.pipes):
        pipe.save(tmp_path / str(place))
    whole = coarse(*OWNER, name="bands")
    whole.save(tmp_path / "whole")
    out = run("relay", tmp_path / "whole", tmp_path / "1", tmp_path / "r")
    assert "2 stages, 4x4 > 8x8" in out
    again = tessera.load(tmp_path / "r", device="cpu")
    assert np.array_equal(again.sample(range(2), [0, 1]), images)
    assert whole.recipe.sampling.sigma_min < 0.1, "the model itself is as it was"


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (({"below": 1.5}, {"factor": 2}), {}, "down to noise level 1.5 only, and .* begins at 0.9"),
        (({"below": 0.9}, {}), {}, "makes pictures of 8x8 pixels, and .* starts from 4x4"),
        (OWNER, {"objective": {"block": 4}}, "makes pictures of 8x8 pixels, and .* from 2x2"),
    ],
)
def test_bands_that_cannot_hand_over_are_refused(
    first: tuple[dict[str, Any], ...], second: dict[str, Any], words: str
) -> None:
    with pytest.raises(TesseraError, match=words):
        assemble_relay([coarse(*first), pipeline(SECOND, second)])

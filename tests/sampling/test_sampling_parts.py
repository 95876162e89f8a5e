"""Samplers and hooks of the caller's own."""

from __future__ import annotations

from typing import Any

import own_parts
import pytest
import torch
from test_sampling_methods import MEAN, Gaussian, NoNoise, exact, latents

from tessera import Parts
from tessera.conditioning import Conditioning
from tessera.errors import RecipeError
from tessera.recipes.build import build_sampler
from tessera.recipes.schema import EdmSamplerConfig, ExternalSamplerConfig
from tessera.sampling.core import Sampler


def sampled(sampler: Sampler) -> torch.Tensor:
    *_, state = sampler(Gaussian(), latents(4), Conditioning(), NoNoise())
    return state.x


def own_sampler(levels: Any, solver: Any) -> Sampler:
    made = Sampler(lambda denoiser: levels, solver)
    return build_sampler(ExternalSamplerConfig(), Parts(sampler=lambda: made))


def test_an_own_sampler_samples_at_any_levels() -> None:
    section = ExternalSamplerConfig(options={"steps": 200})
    made = build_sampler(section, Parts(sampler=own_parts.sampler))
    levels = made.levels(Gaussian())
    assert len(levels) == 200
    torch.testing.assert_close(sampled(made), exact(latents(4), 80.0), atol=0.03, rtol=0.02)
    listed = {"kind": "list", "sigmas": [5.0, 1.0]}
    again = build_sampler(ExternalSamplerConfig(levels=listed), Parts(sampler=own_parts.sampler))
    assert again.levels(Gaussian()) == [5.0, 1.0]


def test_a_refine_hook_of_the_callers_own_meets_any_sampler() -> None:
    calls: list[float] = []

    def refine(pull=0.0):
        def towards_the_mean(denoiser, x, sigma, cond, noise):
            calls.append(sigma)
            return x if sigma else MEAN + (1 - pull) * (x - MEAN)

        return towards_the_mean

    hook = {"refine": {"options": {"pull": 1.0}}}
    for section in (
        EdmSamplerConfig(steps=3, **hook),
        ExternalSamplerConfig(options={"steps": 3}, **hook),
    ):
        calls.clear()
        parts = Parts(sampler=own_parts.sampler, refine=refine)
        pulled = sampled(build_sampler(section, parts))
        assert torch.equal(pulled, torch.full_like(pulled, MEAN))
        assert len(calls) == 3
        assert calls[-1] == 0


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ([], "above 0: none"),
        ([1, 2], "above 0: 1, 2"),
        ([1.0, 0.0], "above 0: 1, 0"),
        (None, "raised TypeError"),
    ],
)
def test_levels_of_an_own_sampler_fall(levels: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        sampled(own_sampler(levels, own_parts.walk))


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (lambda *_: iter(()), "ended without a step"),
        (lambda d, x, *_: iter([x]), "yielded a Tensor"),
        (lambda d, x, *rest: own_parts.walk(d, x[:2], *rest), r"x \[2, 1, 2, 2\] from latents"),
    ],
)
def test_states_of_an_own_sampler_are_checked(solver: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        sampled(own_sampler([2.0, 1.0], solver))


def test_own_parts_of_a_sampler_have_their_types() -> None:
    with pytest.raises(RecipeError, match=r"'sampler' made a function.*Sampler\(levels, solver\)"):
        build_sampler(ExternalSamplerConfig(), Parts(sampler=lambda: own_parts.walk))
    section = EdmSamplerConfig(refine={})
    with pytest.raises(RecipeError, match=r"'refine' made a float"):
        build_sampler(section, Parts(refine=lambda: 0.5))


def test_no_gradients_are_kept_while_sampling() -> None:
    denoiser = Gaussian()
    start = latents(4).requires_grad_()
    states = own_sampler([2.0, 1.0], own_parts.walk)(denoiser, start, Conditioning(), NoNoise())
    assert not next(states).x.requires_grad
    assert torch.is_grad_enabled()

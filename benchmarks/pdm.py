"""Patched U-Nets: what P x P patches save, in FLOPs and measured, forward and training step.

LSUN's networks on 256x256 images (P = 1 with P = 4's widths), and ImageNet's network on 256x256
images at P = 4 beside 64x64 images at P = 1, which the paper says cost the same. All variants of a
table are timed in turns in one run, because machines differ; the trainer's own step is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import (
    ceilings,
    device,
    forward_flops,
    interleaved,
    record,
    section,
)
from benchmarks.models import (
    Precision,
    autocast,
    learner,
    training_step,
    variant,
    without_zeros,
)
from tessera.conditioning import Conditioning
from tessera.recipes.build import build_denoiser, recipe_objective
from tessera.recipes.pdm import LSUN_NETWORKS, imagenet256, lsun256
from tessera.recipes.schema import Recipe
from tessera.training.learner import Learner

UNPATCHED = "256x256, P=1"
MEMORY_GB = 48
"""What a training step of the unpatched network needs, for one image and in float32."""


def with_network(recipe: Recipe, side: int, patch: int, like: int | None = None) -> Recipe:
    """The recipe for images of another side and patches of another size."""
    network = recipe.network if like is None else LSUN_NETWORKS[like]
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"resolution": side}),
            "network": network.model_copy(update={"patch_size": patch}),
        }
    )


LSUN = {
    UNPATCHED: with_network(lsun256(4), 256, 1),
    **{f"256x256, P={patch}": lsun256(patch) for patch in LSUN_NETWORKS},
}
IMAGENET = {
    "64x64, P=1": with_network(imagenet256(0), 64, 1),
    "256x256, P=4": imagenet256(0),
}


def learner_of(recipe: Recipe, precision: Precision, compiled: bool = False) -> Learner:
    """The trainer's own learner; weights are random, so that no product is with zeros."""
    torch.manual_seed(0)
    denoiser = build_denoiser(recipe)
    without_zeros(denoiser)
    objective = recipe_objective(recipe.model_copy(update={"expert": None}))
    return learner(denoiser, objective, precision, compiled)


def conditioning(recipe: Recipe, batch: int) -> Conditioning:
    classes = recipe.data.num_classes
    return Conditioning(torch.arange(batch, device=device()) % classes if classes else None)


def forward(recipe: Recipe, target: Learner, batch: int, precision: Precision) -> Callable[[], Any]:
    """A function that evaluates the denoiser for `batch` images."""
    x = torch.rand(batch, *recipe.shape, device=device()) * 2 - 1
    x = x.contiguous(memory_format=torch.channels_last)
    cond = conditioning(recipe, batch)
    sigma = torch.full((batch,), 1.0, device=device())

    def evaluate() -> Any:
        with torch.inference_mode(), autocast(precision):
            return target.step.model(x, sigma, cond).mean

    return evaluate


def step_of(recipe: Recipe, target: Learner, batch: int) -> Callable[[], Any]:
    """A function that makes one optimiser step over `batch` images."""
    return training_step(target, recipe.shape, batch, conditioning(recipe, batch))


def _memory_gb() -> float:
    if device().type == "cuda":
        return torch.cuda.get_device_properties(device()).total_memory / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 1e9


def compare(title: str, recipes: dict[str, Recipe], base: str, rounds: int) -> list[str]:
    """Tables of forward pass and training step, each in float32 and bfloat16; as Markdown.

    The unpatched network fits into memory with few images only, and is busy with one; the others
    get more, lest the reading of weights counts as work.
    """
    sections = []
    many, few = (16, 2) if device().type == "cuda" else (4, 1)
    batches = {name: few if name == UNPATCHED else many for name in recipes}
    flops = {name: forward_flops(recipe) for name, recipe in recipes.items()}
    for kind in ("forward", "training step"):
        chosen = dict(recipes)
        if kind != "forward" and UNPATCHED in chosen and _memory_gb() < MEMORY_GB:
            del chosen[UNPATCHED]
        first = base if base in chosen else next(iter(chosen))
        rows = []
        for precision in ("fp32", "bf16"):
            learners = {name: learner_of(recipe, precision) for name, recipe in chosen.items()}
            calls = {
                name: forward(recipe, learners[name], batches[name], precision)
                if kind == "forward"
                else step_of(recipe, learners[name], batches[name])
                for name, recipe in chosen.items()
            }
            total = interleaved(calls, rounds)
            times = {name: seconds / batches[name] for name, seconds in total.items()}
            for name, seconds in times.items():
                gain, saved = times[first] / seconds, flops[first] / flops[name]
                macs, rate = flops[name] / 2e9, 1 / seconds
                rows.append(
                    [name, precision, str(batches[name]), f"{macs:.2f}", f"{rate:.3g}",
                     f"{saved:.2f}x", f"{gain:.2f}x", f"{gain / saved:.0%}"]
                )  # fmt: skip
            del learners, calls
        columns = ["images", "precision", "batch", "GMAC", "images/s", f"FLOPs against {first}",
                   "time", "of what FLOPs promise"]  # fmt: skip
        heading = f"{title}: {kind}"
        sections.append(section(heading, columns, rows))
    return sections


def settings(batch: int, rounds: int) -> str:
    """The training step of LSUN's P = 4 network in all settings, as Markdown."""
    recipe, rows = lsun256(4), []
    variants: list[tuple[Precision, bool]] = [("fp32", False), ("fp32", True), ("bf16", False)]
    variants.append(("bf16", True))
    calls = {
        variant("", precision, compiled).strip(): step_of(
            recipe, learner_of(recipe, precision, compiled), batch
        )
        for precision, compiled in variants
    }
    times = interleaved(calls, rounds)
    tops = {"fp32": ceilings(torch.float32), "bf16": ceilings(torch.bfloat16)}
    for name, seconds in times.items():
        rate = 3 * forward_flops(recipe) * batch / seconds
        share = rate / tops[name.split()[0]]["convolution"]
        gain = times["fp32 eager"] / seconds
        rows.append(
            [name, f"{batch / seconds:.3g}", f"{rate / 1e9:.0f}", f"{share:.0%}", f"{gain:.2f}x"]
        )
    columns = ["setting", "images/s", "GFLOP/s", "of convolution", "gain"]
    title = f"LSUN, P=4: settings of the training step, batch {batch}"
    return section(title, columns, rows)


def run(rounds: int, record_figures: bool) -> None:
    """Time all variants, print the tables, and keep them if asked to."""
    sections = [
        settings(64 if device().type == "cuda" else 4, rounds),
        *compare("LSUN's networks", LSUN, UNPATCHED, rounds),
        *compare("ImageNet's network", IMAGENET, "64x64, P=1", rounds),
    ]
    if record_figures:
        record("Patched U-Nets", "\n\n".join(sections))

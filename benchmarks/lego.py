"""LEGO-S-PG-64 beside a DiT-S/2 of the same blocks: training, sampling with bricks skipped.

The DiT is one brick that sees the whole canvas. Both go through the trainer's own step. Rates are
compared with the machine's best matrix product in the same run, because machines differ.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.harness import (
    ceilings,
    device,
    forward_flops,
    interleaved,
    now,
    record,
    section,
)
from benchmarks.models import (
    Precision,
    autocast,
    learner,
    sampling,
    training_step,
    variant,
    without_zeros,
)
from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.preconditioning import Preconditioned
from tessera.diffusion.skipping import cut_bricks, last_brick_schedule
from tessera.networks.lego import Brick, Lego
from tessera.recipes.build import build_denoiser, build_objective, build_sampler
from tessera.recipes.lego import STACKS
from tessera.recipes.schema import (
    BrickConfig,
    DataConfig,
    EdmSamplerConfig,
    LegoConfig,
    Recipe,
)

SHAPE = (3, 64, 64)
STEPS = 10
RATIOS = (0.0, 0.2, 0.4, 0.6)

LEGO = "LEGO-S-PG-64"
DIT = "DiT-S/2"
NETWORKS = {
    LEGO: STACKS["lego_S_PG_64"],
    DIT: LegoConfig(bricks=(BrickConfig(size=64, patch=2, depth=12),), width=384, heads=6),
}


def recipe(name: str) -> Recipe:
    return Recipe(name=name, data=DataConfig(resolution=64), network=NETWORKS[name])


def denoiser_of(name: str) -> Preconditioned:
    """A denoiser with random weights."""
    torch.manual_seed(0)
    denoiser = build_denoiser(recipe(name))
    without_zeros(denoiser)
    return denoiser


def brick_call(
    network: nn.Module, index: int, batch: int, precision: Precision
) -> Callable[[], Any]:
    """Forward pass of one brick alone."""
    assert isinstance(network, Lego)
    brick = network.model[index]
    assert isinstance(brick, Brick)
    channels = brick.x_embedder.proj.in_channels
    x = torch.randn(batch, channels, *SHAPE[1:], device=device())
    c = torch.randn(batch, 384, device=device())

    def call() -> Any:
        with torch.inference_mode(), autocast(precision):
            return brick(x, c)

    return call


def run(rounds: int, record_figures: bool) -> None:
    """Time all variants, print the tables, and keep them if asked to."""
    batch = 256 if device().type == "cuda" else 4
    sections = []
    tops = {
        precision: ceilings(dtype)["matrix product"]
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    flops = {name: forward_flops(recipe(name)) for name in NETWORKS}
    sections.append(
        "Matrix products: "
        + ", ".join(f"{p} {top / 1e9:.0f} GFLOP/s" for p, top in tops.items())
        + ". Forward pass of an image: "
        + ", ".join(f"{name} {value / 1e9:.1f} GFLOP" for name, value in flops.items())
        + "."
    )

    variants: tuple[tuple[str, Precision, bool], ...] = (
        (LEGO, "fp32", False), (DIT, "fp32", False), (LEGO, "fp32", True),
        (LEGO, "bf16", False), (LEGO, "bf16", True), (DIT, "bf16", True),
    )  # fmt: skip
    denoisers = {v: denoiser_of(v[0]) for v in variants}
    objective = build_objective(recipe(LEGO).objective)
    steps = {
        v: training_step(learner(denoisers[v], objective, *v[1:]), SHAPE, batch, Conditioning())
        for v in variants
    }
    times = interleaved(steps, rounds)
    rows = []
    for key, seconds in times.items():
        name, precision, _ = key
        rate = 3 * flops[name] * batch / seconds
        rows.append(
            [
                variant(*key),
                f"{batch / seconds:.2f}",
                f"{rate / 1e9:.0f}",
                f"{rate / tops[precision]:.0%}",
                f"{rate / tops['fp32']:.2f}",
            ]
        )
    columns = ["variant", "images/s", "GFLOP/s", "of its ceiling", "/ fp32 ceiling"]
    sections.append(section(f"Training step, batch {batch}", columns, rows))

    model = denoisers[LEGO, "fp32", False].eval()
    sections.append(_skipping(model, max(1, batch // 2), rounds))
    sections.append(_bricks(model, batch, rounds, tops))
    if record_figures:
        record("LEGO bricks: training, skipping", "\n\n".join(sections))


def evaluation_seconds(
    denoisers: dict[float, Denoiser], batch: int, rounds: int
) -> dict[float, list[float]]:
    """Seconds of the network in each evaluation of a sampling run: the least over the rounds."""
    spent: dict[float, list[list[float]]] = {key: [] for key in denoisers}
    for number in range(rounds + 1):
        for key, denoiser in denoisers.items():
            begin: list[float] = []
            end: list[float] = []
            hooks = [
                hook
                for network in denoiser.networks()
                for hook in (
                    network.register_forward_pre_hook(lambda *_, to=begin: to.append(now())),
                    network.register_forward_hook(lambda *_, to=end: to.append(now())),
                )
            ]
            sampling(denoiser, SHAPE, batch, Conditioning(), STEPS, "fp32")()
            for hook in hooks:
                hook.remove()
            if number:  # the first is to warm up
                spent[key].append([b - a for a, b in zip(begin, end, strict=True)])
    return {key: list(map(min, zip(*runs, strict=True))) for key, runs in spent.items()}


def _skipping(model: Preconditioned, batch: int, rounds: int) -> str:
    """Sampling in float32 at several ratios: time saved against FLOPs saved.

    What a run takes differs by more than short runs save, so the saving is worked out, as by
    `tessera sample`, from the median time of whole and of cut evaluations, here of all runs.
    """
    sizes = [brick.size for brick in NETWORKS[LEGO].bricks]
    levels = build_sampler(EdmSamplerConfig(steps=STEPS)).levels(model)
    schedules = {ratio: last_brick_schedule(sizes, ratio, levels) for ratio in RATIOS}
    denoisers = {ratio: cut_bricks(model, schedule) for ratio, schedule in schedules.items()}
    times = evaluation_seconds(denoisers, batch, rounds)
    # Every step but the last has two evaluations, which are cut alike.
    cut = {
        ratio: [bool(schedule.bricks(level)) for level in levels for _ in range(2)][:-1]
        for ratio, schedule in schedules.items()
    }
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for ratio, flags in cut.items():
        for flag, time in zip(flags, times[ratio], strict=True):
            seconds[flag].append(time)
    whole, part = (statistics.median(seconds[flag]) for flag in (False, True))
    full = forward_flops(recipe(LEGO))
    short = forward_flops(recipe(LEGO), bricks=f"0-inf:{len(sizes) - 1}")
    rows = []
    for ratio, flags in cut.items():
        share = sum(flags) / len(flags)
        flops, saved = share * (1 - short / full), share * (1 - part / whole)
        quotient = f"{saved / flops:.0%}" if flops else ""
        taken = f"{sum(times[ratio]):.2f}"
        rows.append([f"{ratio:.1f}", taken, f"{flops:.1%}", f"{saved:.1%}", quotient])
    columns = ["skip", "s", "FLOPs saved", "time saved", "time / FLOPs"]
    title = f"Sampling, {STEPS} steps, batch {batch}, fp32; an evaluation takes {whole:.3f} s, "
    return section(title + f"without the last brick {part:.3f} s", columns, rows)


def _bricks(model: Preconditioned, batch: int, rounds: int, tops: dict[str, float]) -> str:
    """The rate of each brick's forward pass by itself."""
    rows = []
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    totals = [forward_flops(recipe(LEGO), bricks=f"0-inf:{k + 1}") for k in range(3)]
    for index, brick in enumerate(NETWORKS[LEGO].bricks):
        own = totals[index] - (totals[index - 1] if index else 0)
        calls = {p: brick_call(model.network, index, batch, p) for p in precisions}
        for precision, seconds in interleaved(calls, rounds).items():
            rate = own * batch / seconds
            span = (brick.size // brick.patch) ** 2
            rows.append(
                [
                    f"r={brick.size}, p={brick.patch}, {precision}",
                    str(span),
                    f"{own / 1e9:.1f}",
                    f"{rate / 1e9:.0f}",
                    f"{rate / tops[precision]:.0%}",
                ]
            )
    columns = ["brick", "tokens attended", "GFLOP", "GFLOP/s", "of its ceiling"]
    return section(f"Bricks, forward, eager, batch {batch}", columns, rows)

"""Training of an energy beside the plain transformer of the same size: DiT-B/1, 256 tokens.

Both go through the trainer's own step. The energy's gradient is differentiated again, for which
the products alone are about twice those of the plain step; the table has the exact ratio beside the
measured one. Attention variants are compared on two blocks, where they are what differs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import ceilings, device, interleaved, record, section
from benchmarks.models import Precision, autocast, learner, training_step, without_zeros
from tessera.conditioning import Conditioning
from tessera.diffusion.discrete import Discrete, DiscreteDenoiser
from tessera.diffusion.discrete_objective import DiscreteObjective
from tessera.networks.dit import DiT, EnergyDiT
from tessera.networks.presets import SIZES

SHAPE = (16, 16, 16)
CLASSES = 1000
DEPTH, WIDTH, HEADS = SIZES["B"]
PLAIN = "plain"
ENERGIES: dict[str, dict[str, Any]] = {
    "energy": {},
    "energy, explicit attention": {"attention": "explicit"},
    "energy, unfused kernel": {"attention": "math"},
    "energy, blocks recomputed": {"recompute": True},
}


def denoiser_of(name: str, depth: int, where: torch.device) -> DiscreteDenoiser:
    """A denoiser with random weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"patch": 1, "depth": depth, "width": WIDTH, "heads": HEADS}
    network: nn.Module
    with where:
        if name == PLAIN:
            network = DiT(SHAPE[1], SHAPE[0], CLASSES, **sizes)
        else:
            network = EnergyDiT(SHAPE[1], SHAPE[0], CLASSES, **sizes, **ENERGIES[name])
    if where.type != "meta":
        without_zeros(network)
    return DiscreteDenoiser(network, Discrete(prediction="eps"), SHAPE, CLASSES)


def conditioning(batch: int, where: torch.device) -> Conditioning:
    return Conditioning(labels=torch.arange(batch, device=where) % CLASSES)


def forward(name: str, depth: int, batch: int, where: torch.device) -> Callable[[], Tensor]:
    """The network's forward pass in training, inner gradient included, to a scalar."""
    network = denoiser_of(name, depth, where).network
    x, noise = torch.randn(batch, *SHAPE, device=where), torch.ones(batch, device=where)
    cond = conditioning(batch, where)
    return lambda: network(x, noise, cond).square().mean()


def step_flops(name: str, depth: int) -> int:
    """Of one image, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(forward(name, depth, 1, torch.device("meta"))())
    return int(counter.get_total_flops())


class _Kept:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_megabytes(name: str, depth: int) -> float:
    """What autograd holds of one image between forward and backward, without the weights."""
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def keep(tensor: Tensor) -> _Kept:
        box = _Kept(tensor)
        kept.add(box)
        return box

    call = forward(name, depth, 1, torch.device("cpu"))
    with saved_tensors_hooks(keep, lambda box: box.tensor):
        loss = call()
    sizes = {
        box.tensor.untyped_storage().data_ptr(): box.tensor.untyped_storage().nbytes()
        for box in kept
        if not isinstance(box.tensor, nn.Parameter)
        and not (box.tensor._base is not None and isinstance(box.tensor._base, nn.Parameter))
    }
    del loss
    return sum(sizes.values()) / 1e6


def timed(
    names: list[str], depth: int, batch: int, precision: Precision, rounds: int
) -> dict[str, float]:
    """Seconds of a training step of each."""
    objective = DiscreteObjective(1000, weight="snr", label_dropout=0.1)
    cond = conditioning(batch, device())
    steps = {
        name: training_step(
            learner(denoiser_of(name, depth, torch.device("cpu")), objective, precision),
            SHAPE,
            batch,
            cond,
        )
        for name in names
    }
    return interleaved(steps, rounds)


def run(rounds: int, record_figures: bool) -> None:
    """Time all variants, print the tables, and keep them if asked to."""
    accelerated = device().type == "cuda"
    batch = 128 if accelerated else 2
    tops = {
        precision: ceilings(dtype)["matrix product"]
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    sections = [
        "Matrix products: " + ", ".join(f"{p} {t / 1e9:.0f} GFLOP/s" for p, t in tops.items())
    ]

    rows = []
    precisions: tuple[Precision, ...] = ("fp32", "bf16") if accelerated else ("fp32",)
    flops = {name: step_flops(name, DEPTH) for name in (PLAIN, "energy, explicit attention")}
    flops["energy"] = flops.pop("energy, explicit attention")  # without what it computes again
    for precision in precisions:
        with autocast(precision):
            pass  # sets the precision of products
        times = timed([PLAIN, "energy"], DEPTH, batch, precision, rounds)
        for name, seconds in times.items():
            rate = flops[name] * batch / seconds
            rows.append(
                [
                    f"{name} {precision}",
                    f"{batch / seconds:.2f}",
                    f"{rate / 1e9:.0f}",
                    f"{rate / tops[precision]:.0%}",
                    f"{seconds / times[PLAIN]:.2f}x",
                    f"{flops[name] / flops[PLAIN]:.2f}x",
                ]
            )
    columns = ["DiT-B/1", "images/s", "GFLOP/s", "of its ceiling", "time / plain", "FLOPs / plain"]
    sections.append(section(f"Training step, eager, batch {batch}", columns, rows))

    names = [PLAIN, *ENERGIES]
    times = timed(names, 2, batch, "fp32", rounds)
    memory = {name: kept_megabytes(name, 2) for name in names}
    work = {name: step_flops(name, 2) for name in names}
    rows = [
        [
            name,
            f"{1000 * times[name]:.0f}",
            f"{times[name] / times[PLAIN]:.2f}x",
            f"{work[name] / work[PLAIN]:.2f}x",
            f"{memory[name]:.0f}",
        ]
        for name in names
    ]
    columns = ["two blocks", "ms", "time / plain", "FLOPs / plain", "MB kept an image"]
    sections.append(section(f"Variants, fp32 eager, batch {batch}", columns, rows))
    if record_figures:
        record("Energies: training", "\n\n".join(sections))

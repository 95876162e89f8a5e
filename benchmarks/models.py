"""What benchmarks do with networks: the trainer's own step, and sampling, ready to be timed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.harness import device
from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.objectives import Objective
from tessera.diffusion.preconditioning import Preconditioned
from tessera.randomness import AddressedDraws
from tessera.recipes.schema import EmaConfig, OptimizerConfig, TrainingConfig
from tessera.sampling.edm import edm_sampler
from tessera.sampling.seeds import SeedNoise
from tessera.training.learner import Learner, MicroBatch, TrainStep, set_precision

Precision = Literal["fp32", "bf16"]
Shape = tuple[int, int, int]


def variant(name: str, precision: Precision, compiled: bool) -> str:
    """What is timed, in words."""
    return f"{name} {precision} {'compiled' if compiled else 'eager'}"


def autocast(precision: Precision) -> torch.autocast:
    """The context in which networks compute in `precision`; without TensorFloat32 in fp32."""
    set_precision(TrainingConfig(precision=precision))
    return torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16")


def without_zeros(network: nn.Module) -> None:
    """Give parameters that start at zero random values, so that no product is with zeros."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def learner(
    denoiser: Preconditioned, objective: Objective, precision: Precision, compiled: bool = False
) -> Learner:
    """The trainer's own learner around a denoiser."""
    training = TrainingConfig(precision=precision, compile=compiled)
    step = TrainStep(denoiser, objective)
    optimizer = OptimizerConfig(lr=1e-4, rampup_images=0)
    return Learner(step, optimizer, [EmaConfig()], training, device())


def training_step(
    target: Learner, shape: Shape, batch: int, cond: Conditioning
) -> Callable[[], Any]:
    """A function that makes one optimiser step over `batch` images, with new noise at each call."""
    steps = count()
    images = torch.rand(batch, *shape, device=device()) * 2 - 1

    def step() -> Any:
        set_precision(target.training)  # of the process: another variant may have had the last turn
        number = next(steps)
        numbers = number * batch + torch.arange(batch, device=device())
        micro = MicroBatch(images, cond, AddressedDraws(0, numbers), number)
        return target.update([micro], batch, number * batch)

    return step


def sampling(
    denoiser: Denoiser, shape: Shape, batch: int, cond: Conditioning, steps: int,
    precision: Precision,
) -> Callable[[], Any]:  # fmt: skip
    """A function that samples `batch` images by `steps` steps of Heun's method."""
    latents = SeedNoise(range(batch)).normal(shape).to(device())

    denoiser.eval()

    def sample() -> Any:
        with torch.inference_mode(), autocast(precision):
            *_, last = edm_sampler(steps=steps)(denoiser, latents, cond, SeedNoise(range(batch)))
        return last.x

    return sample

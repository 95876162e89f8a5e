"""Two gloo processes against one: gradients of an energy with all terms, by DDP and FSDP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from energy_case import random_energy
from processes_case import in_processes
from torch import Tensor

from tessera import distributed
from tessera.conditioning import Conditioning
from tessera.diffusion.discrete import Discrete, DiscreteDenoiser
from tessera.diffusion.discrete_objective import DiscreteObjective
from tessera.diffusion.energy_objective import EnergyObjective, EnergyTerms
from tessera.randomness import AddressedDraws
from tessera.training import parallel
from tessera.training.learner import TrainStep

MODES = ("ddp", "fsdp")
TERMS = (EnergyTerms(), EnergyTerms(contrastive=0.05, refinement=0.1, contrastive_steps=2))


def gradients(mode: str | None, rows: slice, terms: EnergyTerms) -> dict[str, Tensor]:
    """Gradients of the loss of four images, of which this process has `rows`."""
    network = random_energy(depth=1, learn_step_size=True, recompute=True)
    denoiser = DiscreteDenoiser(network, Discrete(timesteps=50, prediction="eps"), (3, 4, 4), 5)
    objective = EnergyObjective(DiscreteObjective(50, weight="snr"), terms)
    step: torch.nn.Module = TrainStep(denoiser, objective).train()
    if mode is not None:
        step = parallel.wrap(step, mode, torch.device("cpu"))  # type: ignore[arg-type]
    torch.manual_seed(5)
    x, labels = torch.randn(4, 3, 4, 4)[rows], torch.arange(4)[rows]
    draws = AddressedDraws(0, torch.arange(4)[rows])
    loss = step(x, Conditioning(labels=labels), draws)["loss"].sum()
    (loss * distributed.world() / 4).backward()
    return {
        name.removeprefix("module."): parallel.whole(p.grad)
        for name, p in step.named_parameters()
        if p.grad is not None
    }


def process(folder: Path) -> None:
    rank = distributed.rank()
    for mode in MODES:
        for index, terms in enumerate(TERMS):
            found = gradients(mode, slice(2 * rank, 2 * rank + 2), terms)
            if rank == 0:
                torch.save(found, folder / f"{mode}-{index}.pt")


@pytest.mark.slow
def test_parallel_gradients(tmp_path: Path) -> None:
    in_processes(2, process, tmp_path)
    for index, terms in enumerate(TERMS):
        expected = gradients(None, slice(None), terms)
        for mode in MODES:
            found = torch.load(tmp_path / f"{mode}-{index}.pt")
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)

"""DDPM++ at CIFAR-10's size against diffusers' U-Net of the nearest size: training and sampling.

Both networks go through the same training step (objective, backward pass, gradient norm, fused
Adam, average of the weights) and the same sampler, in float32 and bfloat16, eager and compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import ceilings, device, interleaved, record, section
from benchmarks.models import Precision, learner, sampling, training_step, variant
from tessera.conditioning import Conditioning
from tessera.diffusion.preconditioning import Edm, Preconditioned
from tessera.errors import require_extra
from tessera.networks.song_unet import SongUNet
from tessera.recipes.build import build_objective
from tessera.recipes.schema import EdmObjectiveConfig

SHAPE = (3, 32, 32)
CLASSES = 10
STEPS = 2  # of the sampler: three evaluations of the network

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Variant(NamedTuple):
    """What is timed."""

    network: str
    precision: Precision
    compiled: bool

    @property
    def label(self) -> str:
        """In words."""
        return variant(*self)


class DiffusersUNet(nn.Module):
    """UNet2DModel with the widths, depth and attention of DDPM++, behind our network contract."""

    def __init__(self) -> None:
        super().__init__()
        diffusers = require_extra("diffusers", "latents", "the comparison with UNet2DModel")
        self.unet = diffusers.UNet2DModel(
            sample_size=SHAPE[1],
            in_channels=3,
            out_channels=3,
            layers_per_block=4,
            block_out_channels=(256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            dropout=0.13,
            num_class_embeds=CLASSES,
        )

    def blocks(self) -> list[nn.Module]:
        """Residual and attention blocks, as compiled by the trainer."""
        kinds = ("ResnetBlock2D", "Attention")
        return [m for m in self.unet.modules() if type(m).__name__ in kinds]

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        output: Tensor = self.unet(x, noise, class_labels=cond.labels).sample
        return output


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tessera": partial(SongUNet, 32, 3, 3, CLASSES, channel_mult=(2, 2, 2), dropout=0.13),
    "diffusers": DiffusersUNet,
}


def forward_flops(make: Callable[[], nn.Module]) -> float:
    """FLOPs of one image's forward pass."""
    with torch.device("meta"):
        network = make()
        labels = torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, *SHAPE), torch.zeros(1), Conditioning(labels=labels))
    return float(counter.get_total_flops())


def denoiser(name: str) -> Preconditioned:
    """A freshly made network with EDM's preconditioning."""
    torch.manual_seed(0)
    return Preconditioned(NETWORKS[name](), Edm(), SHAPE, CLASSES)


def run(rounds: int, record_figures: bool) -> None:
    """Time all variants, print the tables, and keep them if asked to."""
    batch = 512 if device().type == "cuda" else 8
    cond = Conditioning(labels=torch.arange(batch, device=device()) % CLASSES)
    flops = {name: forward_flops(make) for name, make in NETWORKS.items()}
    tops: dict[str, dict[str, float]] = {}
    training: dict[Variant, float] = {}
    generation: dict[Variant, float] = {}
    for precision, dtype in DTYPES.items():
        tops[precision] = ceilings(dtype)
        variants = [
            Variant(name, precision, compiled) for name in NETWORKS for compiled in (False, True)
        ]
        denoisers = {key: denoiser(key.network) for key in variants}
        objective = build_objective(EdmObjectiveConfig())
        steps = {
            key: training_step(
                learner(denoisers[key], objective, precision, key.compiled), SHAPE, batch, cond
            )
            for key in variants
        }
        training |= interleaved(steps, rounds)
        samples = {
            key: sampling(denoisers[key], SHAPE, batch, cond, STEPS, precision) for key in variants
        }
        generation |= interleaved(samples, rounds)

    def rows(times: dict[Variant, float], images: int, passes: int) -> list[list[str]]:
        """Rates of runs over `images` images that cost `passes` forward passes each."""
        base = times[Variant("diffusers", "fp32", False)]
        result = []
        for key, time in times.items():
            rate = flops[key.network] * images * passes / time
            share = rate / tops[key.precision]["convolution"]
            result.append(
                [
                    key.label, f"{images / time:.2f}", f"{rate / 1e9:.0f}", f"{share:.0%}",
                    f"{base / time:.2f}x",
                ]
            )  # fmt: skip
        return result

    evaluations = 2 * STEPS - 1
    top_columns = ["precision", "matrix product, GFLOP/s", "convolution, GFLOP/s"]
    columns = ["variant", "images/s", "GFLOP/s", "of convolution", "against diffusers fp32"]
    tables = [
        (
            "Ceilings of this machine",
            top_columns,
            [[p, *(f"{v / 1e9:.0f}" for v in tops[p].values())] for p in tops],
        ),
        # A training step is a forward pass and a backward pass of twice its work.
        (f"Training step, batch {batch}", columns, rows(training, batch, 3)),
        (
            f"Evaluations of the network while sampling, batch {batch}",
            columns,
            rows(generation, batch * evaluations, 1),
        ),
    ]
    sections = [section(*table) for table in tables]
    if record_figures:
        note = (
            f"Forward pass of an image: DDPM++ {flops['tessera'] / 1e9:.1f} GFLOP, UNet2DModel "
            f"{flops['diffusers'] / 1e9:.1f} GFLOP. `python -m benchmarks unet --rounds {rounds}`"
        )
        record("U-Net: training and sampling", "\n\n".join([note, *sections]))

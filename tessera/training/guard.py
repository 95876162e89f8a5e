"""Steps with NaN or infinite gradients, and the loss scale; decided on the device, without waiting.

The decision of all processes reaches the fused optimiser as its `found_inf` (the way of PyTorch's
own gradient scaler), which leaves weights and moments alone; counters stay on the device too.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tessera import distributed
from tessera.recipes.schema import TrainingConfig

# The dynamic scale of torch.amp.GradScaler.
_INITIAL_SCALE, _GROWTH, _BACKOFF, _GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000

# What the released EDM code puts in the place of infinite gradients.
_REPLACEMENT = 1e5


class LossScale:
    """Keeps float16 gradients in range: fixed, or halved at overflow and doubled after a while."""

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        self.dynamic = config.precision == "fp16" and config.loss_scale is None
        initial = _INITIAL_SCALE if self.dynamic else config.loss_scale or 1.0
        self.active = initial != 1.0
        self.scale = torch.full((), initial, device=device)
        self._growth = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, bad: Tensor) -> None:
        """Follow a step; `bad` (float32, 0-dim) is 1 where gradients overflowed."""
        if self.dynamic:
            torch._amp_update_scale_(
                self.scale, self._growth, bad, _GROWTH, _BACKOFF, _GROWTH_INTERVAL
            )

    def state(self) -> dict[str, Tensor]:
        """The live tensors."""
        return {"loss_scale": self.scale, "loss_scale_growth": self._growth}


class SkipCounter:
    """How many steps were skipped, in all and in a row; on the device."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, bad: Tensor) -> None:
        """Count a step; `bad` (0-dim) is 1 if it was skipped, else 0."""
        flag = bad.to(torch.int64)
        self.total.add_(flag)
        self.in_a_row.add_(1).mul_(flag)

    def state(self) -> dict[str, Tensor]:
        """The live tensors."""
        return {"skipped": self.total, "skipped_in_a_row": self.in_a_row}


def gradient_norm(gradients: list[Tensor], sharded: bool) -> Tensor:
    """L2 norm of the whole gradient, 0-dim float32; of all shards together when sharded."""
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if not sharded:
        return norm
    squared = norm.square()
    dist.all_reduce(squared)
    return squared.sqrt()


def agree(values: list[Tensor], bad: Tensor) -> tuple[list[Tensor], Tensor]:
    """Sum `values` over the processes, and call the step bad if any of them does.

    One small all-reduce; nothing for one process.
    """
    if distributed.active():
        shapes = [value.shape for value in values]
        packed = torch.cat([value.reshape(-1) for value in [*values, bad]])
        dist.all_reduce(packed)
        *parts, bad = packed.split([*(shape.numel() for shape in shapes), 1])
        values = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    return values, (bad.reshape(()) > 0).to(torch.float32)


@torch.no_grad()
def replace_nonfinite(gradients: list[Tensor]) -> None:
    """NaN to 0 and ±∞ to ±1e5, in place, as the released EDM code does."""
    for gradient in gradients:
        torch.nan_to_num(gradient, nan=0.0, posinf=_REPLACEMENT, neginf=-_REPLACEMENT, out=gradient)

"""Exponential moving averages of the weights, measured in images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tessera.recipes.schema import EmaConfig


def decay(config: EmaConfig, images_seen: int, batch: int) -> float:
    """β of a step over `batch` images that begins after `images_seen` images (EDM, section 6.2).

    β = 0.5^(batch / h) with the half-life h at most `rampup_ratio` of the images seen.
    """
    halflife = config.halflife_images
    if config.rampup_ratio is not None:
        halflife = min(halflife, config.rampup_ratio * images_seen)
    # 0.5^(batch / h) underflows to the 0 that it should be.
    return float(0.5 ** min(batch / max(halflife, 1e-8), 2000.0))


class Ema:
    """A float32 average of the trained parameters; buffers are constants and are not averaged.

    Attributes:
        config: half-life and ramp-up.
        weights: name to average, sharded as the parameters are.
        local_weights: the averages (or their shards) of this process.
    """

    def __init__(self, module: nn.Module, config: EmaConfig) -> None:
        self.config = config
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.weights = {n: p.detach().clone().float() for n, p in trained.items()}
        self.local_weights = local(self.weights.values())
        self._trained = list(trained.values())

    @torch.no_grad()
    def update(self, images_seen: int, batch: int, keep: Tensor) -> None:
        """Move towards the weights after a step over `batch` images.

        Args:
            images_seen: images before the step.
            keep: 0-dim, 1 if the step was skipped (the average stays as it is), else 0; on the
                device, so that nobody waits for it.
        """
        # Asked for anew, because FSDP may replace a shard (PyTorch 2.8 does, of uneven ones).
        parameters = local(self._trained)
        share = (1 - keep) * (1 - decay(self.config, images_seen, batch))
        if share.device.type == "cpu":
            shares = [share] * len(self.local_weights)
            torch._foreach_lerp_(self.local_weights, parameters, shares)
            return
        # With a share on the device, the above would start a kernel for each tensor.
        moves = torch._foreach_sub(parameters, self.local_weights)
        torch._foreach_mul_(moves, share)
        torch._foreach_add_(self.local_weights, moves)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's shards of sharded tensors; ordinary tensors as they are. Shares storage."""
    return [t._local_tensor if isinstance(t, DTensor) else t.detach() for t in tensors]

"""DDP and FSDP2 around a training step, and compilation of its repeated blocks; from outside."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tessera import distributed
from tessera.errors import TrainingError
from tessera.model import is_cut


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks that networks inside `module` name by their `blocks()` method."""
    blocks: list[nn.Module] = []
    for child in module.modules():
        named: Any = getattr(child, "blocks", None)
        if callable(named) and not isinstance(named, nn.Module):
            blocks.extend(named())
    return blocks


def compile_blocks(module: nn.Module, device: torch.device) -> None:
    """Compile each repeated block in place; names of parameters do not change.

    Blocks of one class share their compiled code when their shapes agree.

    Raises:
        TrainingError: the CPU needs a C++ compiler, and there is none; or the network names no
            blocks.
    """
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise TrainingError(
            "training.compile needs a C++ compiler on the CPU, and none is installed. "
            "Install one (Debian, Ubuntu: apt install g++), or set training.compile=false"
        )
    blocks = repeated_blocks(module)
    if not blocks:
        raise TrainingError(
            "training.compile compiles the blocks that a network names, and this one names none: "
            "give it a method blocks(), a list of modules, or set training.compile=false"
        )
    # Every block and every image size that a block sees is a version of the same code to PyTorch,
    # which by default gives up after 8.
    limit = max(64, 8 * len(blocks))
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, 4 * limit
    )
    for block in blocks:
        block.compile(dynamic=False)


def wrap(step: nn.Module, mode: Literal["ddp", "fsdp"], device: torch.device) -> nn.Module:
    """The step made parallel over the processes; as it is when there is only one.

    FSDP changes `step` in place (its parameters become shards); DDP puts a module around it.
    """
    if not distributed.active():
        return step
    if mode == "fsdp":
        for block in repeated_blocks(step):
            fully_shard(block)
        fully_shard(step)
        for part in step.modules():
            # The average of Gloo is a sum in PyTorch 2.8 (pytorch/pytorch#162338); sums are sums.
            if isinstance(part, FSDPModule) and device.type == "cpu":
                part.set_force_sum_reduction_for_comms(True)
        return step
    return DistributedDataParallel(
        step,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=is_cut(step),
    )


@contextlib.contextmanager
def round_of(module: nn.Module, *, final: bool) -> Iterator[None]:
    """Forward and backward of one micro-batch; only the final one exchanges gradients."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(final)
        yield
    elif isinstance(module, DistributedDataParallel) and not final:
        with module.no_sync():
            yield
    else:
        yield


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into `target`, or into this process's shard of it."""
    if isinstance(target, DTensor):
        value = value.to(target.device, target.dtype)
        value = distribute_tensor(value, target.device_mesh, target.placements)
    target.copy_(value)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (all processes must ask); others as they are."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

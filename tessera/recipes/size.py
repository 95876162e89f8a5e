"""Whether a recipe's network fits into memory, before anything of it is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tessera.errors import RecipeError
from tessera.memory import physical


class _Hollow(TorchFunctionMode):
    """Modules made under it have parameters of their size without numbers, and draw nothing.

    In place of the meta device, which also imports the compiler when weights are drawn on it.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones, torch.randn):
            return func(*args, **{**kwargs, "device": "meta"})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def hollow(build: Callable[[], nn.Module]) -> nn.Module:
    """The module that `build` makes, with parameters of their size and without numbers.

    Buffers that are computed, as filters are, have theirs.
    """
    with torch.random.fork_rng(devices=[]), _Hollow():
        return build()


def network_bytes(build: Callable[[], nn.Module]) -> int:
    """Bytes of the parameters and buffers of the module that `build` makes, without making them."""
    network = hollow(build)
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def check_fits(build: Callable[[], nn.Module], name: str, copies: int = 1) -> None:
    """Refuse a network that is larger than the memory of this machine.

    Args:
        build: makes the network.
        name: of the recipe, for the message.
        copies: how often numbers as many as its weights are kept.

    Raises:
        RecipeError: it is.
    """
    try:
        size = network_bytes(build)
    except (RuntimeError, OverflowError, MemoryError):  # sizes beyond what tensors can have
        size = 2**63
    if copies * size > physical():
        kept = "" if copies == 1 else f", which training keeps {copies} times (gradients, averages)"
        raise RecipeError(
            f"{name}: its network has {size / 2**30:,.1f} GiB of weights{kept}, and this machine "
            f"has {physical() / 2**30:,.1f} GiB of memory. Make the network smaller, or use a "
            "larger machine; `tessera cost` counts what it needs"
        )

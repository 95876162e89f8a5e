"""What a recipe builds, a trainer trains and a pipeline samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tessera.errors import TesseraError


class Model(nn.Module):
    """A network and what surrounds it; a denoiser is one kind of model.

    Attributes:
        network: holds the weights, and knows nothing of diffusion. Models made of several models
            (experts, wrappers) have none of their own; see `networks`.
        shape: (C, H, W) of x in model space, as trained.
        num_classes: number of classes that the network knows; 0 if it knows none.
    """

    network: nn.Module
    shape: tuple[int, int, int]
    num_classes: int = 0

    def begin(self, images: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Take from the training images what is needed before the first step; nothing by default.

        Args:
            images: batches of x [B, C, H, W] in model space, with their classes int64 [B] if there
                are any; read only if they are asked for.
        """

    def networks(self) -> list[nn.Module]:
        """The networks of the model and of all models in it, each once."""
        models = [m for m in self.modules() if isinstance(m, Model)]
        whole = (m._modules.get("network") for m in models)
        short = (network for m in models for network in m.shortened())
        return [*dict.fromkeys(n for n in (*whole, *short) if n is not None)]

    def shortened(self) -> list[nn.Module]:
        """Its own network cut short, as it runs and is trained at some noise levels; by default
        never."""
        return []


@dataclass(frozen=True)
class Tuning:
    """How a parameter is trained otherwise than all others.

    Attributes:
        lr: multiplier of the learning rate.
        decay: whether weight decay applies, where it applies to tensors of this shape.
    """

    lr: float = 1.0
    decay: bool = True


def tunings(module: nn.Module) -> dict[nn.Parameter, Tuning]:
    """What the modules in `module` say of their parameters, by a method `tuning()`.

    It gives a `Tuning` for each name of a parameter (as in `named_parameters`) that needs one.

    Raises:
        TesseraError: a name is that of no parameter.

    Example:
        >>> import torch
        >>> class Scale(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.gain = nn.Parameter(torch.ones(3, 1))
        ...
        ...     def tuning(self) -> dict[str, Tuning]:
        ...         return {"gain": Tuning(lr=0.1, decay=False)}
        >>> [*tunings(nn.Sequential(Scale(), nn.Linear(2, 2))).values()]
        [Tuning(lr=0.1, decay=False)]
    """
    found: dict[nn.Parameter, Tuning] = {}
    for part in module.modules():
        own = getattr(part, "tuning", None)
        if callable(own):
            known = dict(part.named_parameters())
            for name, tuning in own().items():
                if name not in known:
                    raise TesseraError(
                        f"tuning() of {type(part).__name__} names {name!r}, which is none of its "
                        f"parameters: {', '.join(known)}"
                    )
                found[known[name]] = tuning
    return found


def is_cut(module: nn.Module) -> bool:
    """Whether some steps leave out parameters of the models in `module`."""
    return any(m.shortened() for m in module.modules() if isinstance(m, Model))


def reported(module: nn.Module) -> dict[str, Tensor]:
    """Numbers that the modules in `module` want logged while training, by a method `reports()`.

    It gives a tensor of one number for each name; it is asked at log lines, not at every step.

    Raises:
        TesseraError: two modules use one name, or what a module gives is not one number.

    Example:
        >>> import torch
        >>> class Scale(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.gain = nn.Parameter(torch.ones(()))
        ...
        ...     def reports(self) -> dict[str, Tensor]:
        ...         return {"gain": self.gain}
        >>> {name: number.item() for name, number in reported(nn.Sequential(Scale())).items()}
        {'gain': 1.0}
    """
    found: dict[str, Tensor] = {}
    for part in module.modules():
        own = getattr(part, "reports", None)
        for name, number in own().items() if callable(own) else ():
            if name in found:
                raise TesseraError(f"reports() of two modules name {name!r}; give each its own")
            if not isinstance(number, Tensor) or number.numel() != 1:
                raise TesseraError(
                    f"reports() of {type(part).__name__}: {name!r} is no tensor of one number"
                )
            found[name] = number
    return found


def with_tensors(module: nn.Module, replace: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """A module of the same structure around other tensors; nothing else is copied twice.

    Args:
        module: any module that can be copied; not one whose weights are sharded.
        replace: (name, parameter or buffer) to what stands in its place, which is not copied.
    """
    memo: dict[int, object] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        other = replace(name, parameter.detach())
        memo.setdefault(id(parameter), nn.Parameter(other, parameter.requires_grad))
    for name, buffer in module.named_buffers(remove_duplicate=False):
        memo.setdefault(id(buffer), replace(name, buffer))
    made: nn.Module = copy.deepcopy(module, memo)
    return made


def on_meta(model: Model) -> Model:
    """The same model on tensors without data."""
    made = with_tensors(model, lambda _name, tensor: torch.empty_like(tensor, device="meta"))
    assert isinstance(made, Model)
    return made

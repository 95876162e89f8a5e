"""Fused Adam and AdamW, and the learning rate as a function of images seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tessera.model import Tuning, tunings
from tessera.recipes.schema import OptimizerConfig

# The buffers that Adam keeps for each parameter, beside its step counter.
MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALE = "lr_scale"


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Adam:
    """Fused Adam or AdamW, with its state already made (zeros, as if before the first step).

    Weight decay applies to tensors with two axes or more, because biases and gains have one, but
    for what the modules that own parameters say of them (`tessera.model.Tuning`).
    """
    tuned = tunings(module)
    members: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for parameter in module.parameters():
        if parameter.requires_grad:
            own = tuned.get(parameter, Tuning())
            decays = parameter.ndim >= 2 and own.decay
            members.setdefault((decays, own.lr), []).append(parameter)
    kind = torch.optim.Adam if config.kind == "adam" else torch.optim.AdamW
    optimizer = kind(
        [
            {"params": group, "weight_decay": config.weight_decay if decays else 0.0, _SCALE: scale}
            for (decays, scale), group in members.items()
            if group
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate `lr`, times its own multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[_SCALE]


def learning_rate(config: OptimizerConfig, images_seen: int, images: int) -> float:
    """Learning rate of the step that begins after `images_seen` images of a run over `images`.

    A linear ramp from 0 (EDM, so the very first step has rate 0), times a constant, or a decay from
    `decay_start_images` on: cosine or linear down to `final_lr` at the end of the run, or
    1 / sqrt(images seen / decay_start_images) (Karras et al. 2024, EDM2, equation 67).
    """
    ramp = min(images_seen / config.rampup_images, 1.0) if config.rampup_images else 1.0
    start = config.decay_start_images
    if config.decay == "constant" or images_seen <= start:
        return config.lr * ramp
    if config.decay == "inverse_sqrt":
        return config.lr * ramp * math.sqrt(start / images_seen)
    progress = min((images_seen - start) / max(images - start, 1), 1.0)
    share = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return (config.final_lr + (config.lr - config.final_lr) * share) * ramp


def named_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimiser's live tensors as `<buffer>/<parameter name>`."""
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{key}/{name}"] = value
    return state

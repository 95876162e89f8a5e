"""The networks that the recorded energy cases describe, and random ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from golden_cases import case, load, weights
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.diffusion.discrete import Discrete, DiscreteDenoiser
from tessera.networks.dit import DiT, EnergyDiT


def own_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of our parameters instead of the released ones."""
    own = {
        k.removeprefix("dit.").replace("blocks.", "layers."): v.reshape(1) if k == "alpha" else v
        for k, v in tensors.items()
    }
    if any(name.startswith("energy_layer") for name in own):  # the unused plain head is not built
        own = {k: v for k, v in own.items() if not k.startswith("final_layer")}
    return own


def recorded_network(
    name: str, **changes: Any
) -> tuple[DiT | EnergyDiT, dict[str, Tensor], dict[str, Any]]:
    """(network with the recorded weights, tensors, configuration) of a case."""
    golden, c = load("energy", name), case("energy", name)["config"]
    side = c.get("input_size", c.get("latent_size"))
    arguments = (side, c["in_channels"], c["num_classes"])
    options: dict[str, Any] = {
        "patch": c["patch_size"],
        "depth": c["depth"],
        "width": c["hidden_size"],
        "heads": c["num_heads"],
        "mlp_ratio": c["mlp_ratio"],
    }
    network: DiT | EnergyDiT
    state = own_names(weights(golden))
    if c.get("use_energy"):
        options["multiplier"] = c.get("energy_gradient_multiplier", 1.0)
        if c.get("linear_then_mean"):
            options["head"] = "linear_then_mean"
        options["learn_step_size"] = c.get("learnable_mcmc_step_size", False)
        network = EnergyDiT(*arguments, **(options | changes))
        state.setdefault("alpha", network.alpha.detach())  # not in all of the released ones
    else:
        network = DiT(*arguments, learn_variance=c.get("learn_sigma", False), **options)
        state.pop("alpha", None)
    network.load_state_dict(state, strict=True)
    return network, golden, c


def recorded(name: str, **changes: Any) -> tuple[DiscreteDenoiser, dict[str, Tensor]]:
    """(denoiser of the case's process, tensors) of a case."""
    network, golden, c = recorded_network(name, **changes)
    process = Discrete(timesteps=c["diffusion_timesteps"], prediction="eps")
    shape = (c["in_channels"], c["latent_size"], c["latent_size"])
    return DiscreteDenoiser(network, process, shape, c["num_classes"]), golden


def conditioning(golden: Mapping[str, Tensor], classes: int = 10) -> Conditioning:
    """The recorded labels, of which the one after the last is that of no class."""
    labels = golden["in.y"]
    return Conditioning(labels=torch.where(labels == classes, -1, labels))


def levels(denoiser: DiscreteDenoiser, steps: Tensor) -> Tensor:
    """The noise levels σ of timesteps, float64."""
    return denoiser.levels[steps]


def column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def random_energy(side: int = 4, channels: int = 3, classes: int = 5, **options: Any) -> EnergyDiT:
    """A tiny energy with random weights everywhere."""
    torch.manual_seed(0)
    settings = {"depth": 2, "width": 16, "heads": 2, "patch": 1} | options
    network = EnergyDiT(side, channels, classes, **settings)
    for name, parameter in network.named_parameters():
        if name != "alpha":
            nn.init.normal_(parameter, std=0.2)
    return network.eval()

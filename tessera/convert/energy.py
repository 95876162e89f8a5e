"""Checkpoints of energy diffusion: transformers as energies, and plain ones of the same training.

Multiplier, head and number of steps are only among the arguments that a training was called with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tessera.convert.checkpoint import (
    AVERAGE,
    TRAINED,
    CheckpointFile,
    Data,
    Description,
    Family,
    Ignored,
    Place,
    Settings,
)
from tessera.convert.dit import (
    arguments_of,
    is_transformer,
    output_channels,
    place_transformer,
    transformer_sections,
)
from tessera.convert.flat import shape_of, state_dict
from tessera.recipes.schema import EnergyDiTConfig, Recipe

_PREFIX = "dit."
_HEAD = "energy_layer.energy_head.0.weight"


def _recognise(source: CheckpointFile) -> bool:
    data = source.data
    return isinstance(data, dict) and any(
        is_transformer(data.get(key), _PREFIX) for key in ("model", "model_ema")
    )


def _describe(source: CheckpointFile, settings: Settings) -> Description:
    data = source.data
    weights = {
        name: state_dict(source, data[key], key)
        for name, key in ((AVERAGE, "model_ema"), (TRAINED, "model"))
        if data.get(key) is not None
    }
    tensors = {name.removeprefix(_PREFIX): t for name, t in next(iter(weights.values())).items()}
    inferred, needs = transformer_sections(source, tensors)
    heads = inferred["network"].pop("heads", None)
    energy = _HEAD in tensors
    kind = "energy_dit" if energy else "dit"
    inferred["network"]["kind"] = kind
    if not energy:
        channels = shape_of(source, tensors, "x_embedder.proj.weight", 4)[1]
        inferred["network"]["learn_variance"] = output_channels(source, tensors) == 2 * channels
    arguments = arguments_of(data.get("args"))
    notes = []
    if not arguments:
        notes.append(
            "the file does not hold what its training was called with: number of steps"
            + (", multiplier and head of the energy" if energy else "")
            + " are the released defaults (preconditioning.timesteps, network.multiplier, "
            "network.head)"
        )
    return Description(
        weights,
        _placing,
        said=_said(arguments, energy),
        inferred=inferred,
        assumed={
            "preconditioning": {"kind": "discrete", "schedule": "linear", "prediction": "eps"},
            "objective": {"kind": "discrete", "weight": "snr"},
            "sampling": {"kind": "ddpm", "steps": "250", "variance": "small"},
            "network": {"kind": kind} | ({} if heads is None else {"heads": heads}),
        },
        needs=needs,
        constant=lambda ours: ours == "alpha",
        notes=notes,
    )


def _said(arguments: Mapping[str, Any], energy: bool) -> Data:
    """What the arguments of a training say, by our names."""
    said: Data = {}

    def say(section: str, key: str, name: str, kinds: type | tuple[type, ...]) -> None:
        value = arguments.get(name)
        if isinstance(value, kinds):
            said.setdefault(section, {})[key] = value

    say("preconditioning", "timesteps", "diffusion_timesteps", int)
    say("objective", "label_dropout", "label_drop_prob", (int, float))
    if energy:
        say("network", "multiplier", "energy_grad_multiplier", (int, float))
        say("network", "step_size", "mcmc_step_size", (int, float))
        say("network", "learn_step_size", "learnable_mcmc_step_size", bool)
        if isinstance(arguments.get("linear_then_mean"), bool):
            head = "linear_then_mean" if arguments["linear_then_mean"] else "mean_then_linear"
            said["network"] = {**said.get("network", {}), "head": head}
    steps = arguments.get("num_sampling_steps")
    if isinstance(steps, str) and steps.isdecimal():
        said["sampling"] = {"steps": steps}
    if energy and arguments.get("use_innerloop_opt") is True:
        refine = {"kind": "mcmc", "reject": arguments.get("always_accept_opt_steps") is not True}
        said["sampling"] = {**said.get("sampling", {}), "refine": refine}
    return {
        section: ({"kind": "discrete", **keys} if section in ("preconditioning", "objective")
                  else keys)
        for section, keys in said.items()
    }  # fmt: skip


def _placing(recipe: Recipe) -> Place:
    energy = isinstance(recipe.network, EnergyDiTConfig)
    inner = place_transformer(recipe)

    def place(name: str, tensor: Tensor) -> tuple[str, Tensor] | Ignored:
        if name == "alpha":
            if not energy:
                return Ignored("the step size of an energy's descent, in a network without energy")
            return "alpha", tensor.reshape(1)
        if energy and name.startswith(f"{_PREFIX}final_layer."):
            return Ignored("a last layer that an energy never uses")
        return inner(name.removeprefix(_PREFIX), tensor)

    return place


FAMILY = Family("energy", "energy diffusion", _recognise, _describe)

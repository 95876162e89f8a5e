"""Export to the names of guided diffusion (Dhariwal & Nichol 2021), and of PDM, built on it."""

from __future__ import annotations

from torch import nn

from tessera.convert import guided
from tessera.convert.target import (
    ReleasedFile,
    Target,
    discrete,
    picture_options,
    process_note,
    process_options,
    refuse,
)
from tessera.networks.layers import GroupNorm
from tessera.pipelines.base import Pipeline
from tessera.recipes.schema import AdmUNetConfig, PatchedUNetConfig, Recipe

_NAME = "guided-diffusion"
_ORDER = "legacy"  # unless its code is called with --use_new_attention_order


def _export(pipe: Pipeline) -> ReleasedFile:
    recipe, section = pipe.recipe, pipe.recipe.network
    if not isinstance(section, AdmUNetConfig | PatchedUNetConfig):
        refuse(recipe, _NAME, f"its network is {section.kind}, neither adm_unet nor patched_unet")
    process = discrete(recipe, _NAME)
    if recipe.shape[0] != 3:
        refuse(recipe, _NAME, f"its images have {recipe.shape[0]} channels, and not 3")
    network, codec = pipe.model.network, picture_options(recipe)
    options = (*_heads(section), *codec, *process_options(process))
    if recipe.low_resolution is not None:
        options = (*options, f"low_resolution={recipe.low_resolution}")
    if isinstance(section, PatchedUNetConfig):
        if section.eps != PatchedUNetConfig.model_fields["eps"].default:
            refuse(recipe, _NAME, f"PDM's code has no network.eps={section.eps:g}")
        if section.groups is None:
            refuse(recipe, _NAME, "PDM's code has network.groups=32 only")
        order: str = section.attention_order
        key, state = "network.attention_order", network.state_dict()
    else:
        _check(recipe, section, network)
        if process.prediction == "v":
            refuse(recipe, _NAME, "it predicts v, which guided diffusion's code does not know")
        order, key = _ORDER, guided.ORDER
        state = guided.released_state(recipe, network.state_dict(), order)
    new = "with" if order == "split" else "without"
    notes = process_note(process), f"attention is that of its code {new} use_new_attention_order"
    return ReleasedFile(state, (*options, f"{key}={order}"), notes)


def _heads(section: AdmUNetConfig | PatchedUNetConfig) -> tuple[str, ...]:
    names = {"heads", "decoder_heads", "head_channels"}
    values = section.model_dump(include=names, exclude_none=True)
    if section.head_channels and isinstance(section, PatchedUNetConfig):
        values = {"head_channels": section.head_channels}
    return tuple(f"network.{name}={value}" for name, value in values.items())


def _check(recipe: Recipe, section: AdmUNetConfig, network: nn.Module) -> None:
    """Raise for networks that EDM's code builds and guided diffusion's does not."""
    groups = {module.groups for module in network.modules() if isinstance(module, GroupNorm)}
    if groups != {32}:
        refuse(
            recipe,
            _NAME,
            f"its normalisations have groups of {', '.join(map(str, sorted(groups)))}, and those "
            "there have 32 (network.groups=32, which fits if all widths are multiples of 32)",
        )
    if section.channel_mult_emb != 4:
        refuse(recipe, _NAME, f"network.channel_mult_emb={section.channel_mult_emb}, not 4")


TARGET = Target(_NAME, _export)

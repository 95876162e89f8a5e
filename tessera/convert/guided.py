"""Checkpoints of guided diffusion (Dhariwal & Nichol 2021): flat state dicts of ADM U-Nets.

Our ADM network carries EDM's names and its order of the rows of attention's weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from tessera.convert.checkpoint import (
    CheckpointFile,
    Data,
    Description,
    Family,
    Need,
    Place,
    Settings,
)
from tessera.convert.flat import (
    Tensors,
    UNetShape,
    is_state_dict,
    setting,
    shape_of,
    state_dict,
    unet_shape,
)
from tessera.convert.pdm import ENLARGED, HEADS, SIDE, weights_name
from tessera.recipes.schema import AdmUNetConfig, Recipe

_LAST = "out_layers.3"
ORDER = "attention_order"

_RESIDUAL = {
    "in_layers.0": "norm0",
    "in_layers.2": "conv0",
    "emb_layers.1": "affine",
    "out_layers.0": "norm1",
    "out_layers.3": "conv1",
    "skip_connection": "skip",
}
_ATTENTION = {"norm": "norm2", "qkv": "qkv", "proj_out": "proj"}
_OUTSIDE = {
    "time_embed.0": "map_layer0",
    "time_embed.2": "map_layer1",
    "label_emb": "map_label",
    "out.0": "out_norm",
    "out.2": "out_conv",
}


def _preset(
    side: int,
    *,
    heads: int | None = None,
    schedule: str = "linear",
    small: int | None = None,
) -> Data:
    """What the published command of a model says beside its tensors."""
    data: Data = {
        "data": {"resolution": side},
        "network": {"heads": heads} if heads else {"head_channels": 64},
        "preconditioning": {"kind": "discrete", "schedule": schedule, "prediction": "eps"},
        "sampling": {"kind": "ddpm", "steps": "250"},
    }
    return data if small is None else {**data, "low_resolution": small}


PRESETS: dict[str, Data] = {
    "64x64_diffusion": _preset(64, schedule="cosine"),
    "128x128_diffusion": _preset(128, heads=4),
    "256x256_diffusion": _preset(256),
    "256x256_diffusion_uncond": _preset(256),
    "512x512_diffusion": _preset(512),
    "64_256_upsampler": _preset(256, heads=4, small=64),
    "128_512_upsampler": _preset(512, small=128),
    "lsun_bedroom": _preset(256),
    "lsun_cat": _preset(256),
    "lsun_horse": _preset(256),
}
"""The published files and their flags."""
_SPLIT = ("64x64_diffusion",)
"""Those with the new order of the rows of attention's weights; all others have the legacy one."""


def _recognise(source: CheckpointFile) -> bool:
    data = source.data
    return is_state_dict(data) and "input_blocks.1.0.emb_layers.1.weight" in data


def _describe(source: CheckpointFile, settings: Settings) -> Description:
    tensors = state_dict(source, source.data, "content")
    shape = unet_shape(source, tensors, _LAST)
    _check_kind(source, tensors, shape)
    stem = source.path.stem
    published = stem if stem in PRESETS and settings.preset is None else None
    side = setting(settings, "data.resolution", PRESETS, published)
    side = side if isinstance(side, int) else None
    order = _order(source, settings, settings.preset or published)
    needs = [SIDE, HEADS]
    if order is None:
        needs.append(Need((ORDER,), "split if trained with use_new_attention_order, else legacy"))
    if _enlarges(source, tensors):
        needs.append(ENLARGED)
    return Description(
        {weights_name(source): tensors},
        partial(_placing, shape, order or "split"),
        inferred=_sections(source, tensors, shape, side),
        assumed={
            "preconditioning": {"kind": "discrete", "schedule": "linear", "prediction": "eps"},
            "objective": {"kind": "discrete", "weight": "snr", "label_dropout": 0},
            "network": {"kind": "adm_unet", "dropout": 0},
            "sampling": {"kind": "ddpm"},
        },
        needs=needs,
        published=published,
        presets=PRESETS,
        constant=is_constant,
    )


def _order(source: CheckpointFile, settings: Settings, preset: str | None) -> str | None:
    """Which rows of attention's weight are q, k and v; None where nobody says it."""
    order: Any = settings.own.get(ORDER)
    if order not in (None, "split", "legacy"):
        raise source.error(f"`attention_order={order}`: there is none. Choose split or legacy")
    if order is None and preset in PRESETS:
        return "split" if preset in _SPLIT else "legacy"
    return None if order is None else str(order)


def _check_kind(source: CheckpointFile, tensors: Tensors, shape: UNetShape) -> None:
    """Raise for what the released networks can be and ours cannot."""
    width, rows = shape.widths[0], shape_of(
        source, tensors, "input_blocks.1.0.emb_layers.1.weight", 2
    )[0]  # fmt: skip
    if rows != 2 * width:
        raise source.error(
            "its blocks do not scale by the noise level (use_scale_shift_norm=False), as none of "
            "the published networks; this library's ADM network does"
        )
    if len(shape.widths) > 1 and not shape.resblock_updown:
        raise source.error(
            "it changes resolution by convolutions (resblock_updown=False), as none of the "
            "published networks; this library's ADM network does it within its blocks"
        )


def _enlarges(source: CheckpointFile, tensors: Tensors) -> bool:
    channels = shape_of(source, tensors, "input_blocks.0.0.weight", 4)[1]
    if channels not in (3, 6):
        raise source.error(f"it takes {channels} channels: no RGB pixels, nor two of them")
    return channels == 6


def _sections(source: CheckpointFile, tensors: Tensors, shape: UNetShape, side: int | None) -> Data:
    hidden, channels = shape_of(source, tensors, "time_embed.0.weight", 2)
    out = shape_of(source, tensors, "out.2.weight", 4)[0]
    if out not in (3, 6):
        raise source.error(f"it puts out {out} channels: no RGB pixels, with variances or without")
    network: Data = {
        "kind": "adm_unet",
        "model_channels": channels,
        "channel_mult": shape.mult(channels),
        "channel_mult_emb": hidden // channels,
        "num_blocks": shape.blocks,
        "groups": 32,
        "learn_variance": out == 6,
    }
    if side is not None:
        network["attn_resolutions"] = shape.resolutions(side)
    classes = 0
    if "label_emb.weight" in tensors:
        classes = shape_of(source, tensors, "label_emb.weight", 2)[0]
    return {"network": network, "data": {"channels": 3, "num_classes": classes}}


# -------------------------------------------------------------------------------------- the tensors


def _placing(shape: UNetShape, order: str, recipe: Recipe) -> Place:
    modules = _modules(shape, recipe.shape[1])
    network = recipe.network
    assert isinstance(network, AdmUNetConfig)

    def place(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        module, _, kind = name.rpartition(".")
        ours = modules.get(module)
        if ours is None:
            return name, tensor
        last = ours.rpartition(".")[2]
        if last == "qkv":
            tensor = _interleaved(tensor, heads_at(network, len(tensor) // 3), order)
        if last in ("qkv", "proj") and kind == "weight":
            tensor = tensor.reshape(*tensor.shape[:2], 1, 1)
        return f"{ours}.{kind}", tensor.T if last == "map_label" else tensor

    return place


def released_state(
    recipe: Recipe, state: Mapping[str, Tensor], order: str = "legacy"
) -> dict[str, Tensor]:
    """The tensors of our ADM network under the released names: what the converter places, undone.

    Args:
        order: of the rows of attention's weights, "split" or "legacy".
    """
    network = recipe.network
    assert isinstance(network, AdmUNetConfig)
    side = recipe.shape[1]
    modules = _modules(recipe_shape(network, side), side)
    theirs = {ours: module for module, ours in modules.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if is_constant(name):
            continue
        last = module.rpartition(".")[2]
        if last == "qkv":
            tensor = _released_rows(tensor, heads_at(network, len(tensor) // 3), order)
        if last in ("qkv", "proj") and kind == "weight":
            tensor = tensor.flatten(2)
        found[f"{theirs[module]}.{kind}"] = tensor.T if last == "map_label" else tensor
    return found


def is_constant(name: str) -> bool:
    """Whether a tensor of our network is a constant that released files do not have."""
    return name.endswith("resample_filter")


def recipe_shape(network: AdmUNetConfig, side: int) -> UNetShape:
    """The levels of our network on pictures of this side."""
    levels = range(len(network.channel_mult))
    return UNetShape(
        tuple(int(network.model_channels * mult) for mult in network.channel_mult),
        network.num_blocks,
        tuple(level for level in levels if side >> level in network.attn_resolutions),
        True,
    )


def heads_at(network: AdmUNetConfig, width: int) -> int:
    """Attention heads of a level so wide."""
    return network.heads or width // network.head_channels


def _modules(shape: UNetShape, side: int) -> dict[str, str]:
    """Every released module that a network may have, by our name."""
    units = _units(shape, side)
    (stem, ours), *blocks = units.items()
    found = {**_OUTSIDE, stem: ours}
    seen: set[str] = set()
    for unit, ours in blocks:
        parts = _ATTENTION if ours in seen else _RESIDUAL
        seen.add(ours)
        found |= {f"{unit}.{theirs}": f"{ours}.{own}" for theirs, own in parts.items()}
    return found


def _units(shape: UNetShape, side: int) -> dict[str, str]:
    """The released parts by our names: the second one of a name is its attention."""
    names = [f"{side >> level}x{side >> level}" for level in range(len(shape.widths))]
    units = {"input_blocks.0.0": f"enc.{names[0]}_conv"}
    index = 1
    for level, name in enumerate(names):
        for block in range(shape.blocks):
            ours = f"enc.{name}_block{block}"
            units |= {f"input_blocks.{index}.0": ours, f"input_blocks.{index}.1": ours}
            index += 1
        if level + 1 < len(names):
            units[f"input_blocks.{index}.0"] = f"enc.{names[level + 1]}_down"
            index += 1
    for part, ours in enumerate(("in0", "in0", "in1")):
        units[f"middle_block.{part}"] = f"dec.{names[-1]}_{ours}"
    index = 0
    for level in reversed(range(len(names))):
        for block in range(shape.blocks + 1):
            parts = [f"dec.{names[level]}_block{block}"] * (1 + (level in shape.attention))
            if level and block == shape.blocks:
                parts.append(f"dec.{names[level - 1]}_up")
            units |= {f"output_blocks.{index}.{k}": ours for k, ours in enumerate(parts)}
            index += 1
    return units


def _interleaved(rows: Tensor, heads: int, order: str) -> Tensor:
    """Rows of attention's weight or bias in EDM's order: q, k and v of one channel in a row."""
    width = len(rows) // 3
    if heads < 1 or width % heads:
        return rows  # which the shape of the recipe's network refuses
    shape = (3, heads, width // heads) if order == "split" else (heads, 3, width // heads)
    parts = rows.reshape(*shape, -1)
    parts = parts.permute(1, 2, 0, 3) if order == "split" else parts.permute(0, 2, 1, 3)
    return parts.reshape(rows.shape)


def _released_rows(rows: Tensor, heads: int, order: str) -> Tensor:
    """`_interleaved` undone."""
    width = len(rows) // 3
    parts = rows.reshape(heads, width // heads, 3, -1)
    parts = parts.permute(2, 0, 1, 3) if order == "split" else parts.permute(0, 2, 1, 3)
    return parts.reshape(rows.shape)


FAMILY = Family(
    "guided-diffusion",
    "guided diffusion",
    _recognise,
    _describe,
    options={ORDER: "split if trained with use_new_attention_order, else legacy"},
)

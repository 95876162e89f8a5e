"""Checkpoints of MAR (Li et al. 2024): models of masked tokens, and the head that makes them."""

from __future__ import annotations

import math
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
    Need,
    Place,
    Renamed,
    Settings,
)
from tessera.convert.dit import arguments_of
from tessera.convert.edm import KL16, image_sections
from tessera.convert.flat import Tensors, is_state_dict, numbered, shape_of, state_dict
from tessera.networks.mar_sizes import MAR_SIZES
from tessera.recipes.schema import Recipe

_HEAD = "diffloss.net."
NAMES = Renamed(_HEAD, "head.")
_MARKS = ("encoder_pos_embed_learned", f"{_HEAD}input_proj.weight")


def _recognise(source: CheckpointFile) -> bool:
    data = source.data
    states = [data.get(key) for key in ("model", "model_ema")] if isinstance(data, dict) else []
    return any(_is_model(state) for state in (data, *states))


def _is_model(value: Any) -> bool:
    return is_state_dict(value) and {*_MARKS} <= {*value}


def _describe(source: CheckpointFile, settings: Settings) -> Description:
    # Alone, the averaged weights are a state dict of their own.
    data = {"model_ema": source.data} if _is_model(source.data) else source.data
    weights = {
        name: state_dict(source, data[key], key)
        for name, key in ((AVERAGE, "model_ema"), (TRAINED, "model"))
        if data.get(key) is not None
    }
    tensors = next(iter(weights.values()))
    arguments = arguments_of(data.get("args"))
    inferred, assumed_heads, needs = _sections(source, tensors, arguments)
    return Description(
        weights,
        _placing,
        said=_said(arguments),
        inferred=inferred,
        assumed={
            "preconditioning": {"kind": "discrete", "schedule": "cosine", "prediction": "eps"},
            "objective": {"kind": "mar"},
            "sampling": {"kind": "mar"},
            "network": {"kind": "mar", **assumed_heads},
        },
        needs=needs,
    )


def _sections(
    source: CheckpointFile, tensors: Tensors, arguments: Mapping[str, Any]
) -> tuple[Data, Data, list[Need]]:
    """What shapes show, the heads that are usual for it, and what must be asked for."""
    width, token = shape_of(source, tensors, "z_proj.weight", 2)
    places = shape_of(source, tensors, "encoder_pos_embed_learned", 3)[1]
    _, count, wide = shape_of(source, tensors, "diffusion_pos_embed_learned", 3)
    hidden = shape_of(source, tensors, "encoder_blocks.0.mlp.fc1.weight", 2)[0]
    side = math.isqrt(count)
    if side**2 != count:
        raise source.error(f"it has {count} tokens, which are no square")
    depths = [numbered(tensors, rf"{part}_blocks\.(\d+)\.") for part in ("encoder", "decoder")]
    classes = 0
    if "class_emb.weight" in tensors:
        classes = shape_of(source, tensors, "class_emb.weight", 2)[0]
    network: Data = {
        "kind": "mar",
        "width": width,
        "depth": depths[0],
        "decoder_width": wide,
        "decoder_depth": depths[1],
        "mlp_ratio": hidden / width,
        "buffer": places - count,
        "head_width": shape_of(source, tensors, f"{_HEAD}input_proj.weight", 2)[0],
        "head_depth": numbered(tensors, rf"{_HEAD}res_blocks\.(\d+)\."),
    }
    patch = arguments.get("patch_size", 1)
    if not isinstance(patch, int) or patch < 1 or token % patch**2:
        raise source.error(f"its tokens of {token} numbers are not {patch} x {patch} pixels")
    network["patch"] = patch
    sections = image_sections(side * patch, token // patch**2, classes)
    stride = arguments.get("vae_stride")
    if isinstance(stride, int) and stride > 0:
        sections["data"] |= {"resolution": side * patch * stride, "channels": 3}
        sections["codec"] = {**KL16, "channels": token // patch**2, "downsample": stride}
    named = [size.heads for size in MAR_SIZES.values() if size[:2] == (width, depths[0])]
    heads: Data = {}
    needs = []
    if named or width % 64 == 0 == wide % 64:
        first = named[0] if named else width // 64
        heads = {"heads": first, "decoder_heads": first if wide == width else wide // 64}
    else:
        needs.append(Need(("network.heads",), f"number of attention heads; divides {width}"))
    return {**sections, "network": network}, heads, needs


def _said(arguments: Mapping[str, Any]) -> Data:
    """What the arguments of a training say, by our names."""
    said: Data = {}
    for section, key, name in (
        ("network", "attn_dropout", "attn_dropout"),
        ("network", "dropout", "proj_dropout"),
        ("objective", "label_dropout", "label_drop_prob"),
        ("objective", "mask_ratio_min", "mask_ratio_min"),
        ("objective", "repeats", "diffusion_batch_mul"),
        ("sampling", "num_iter", "num_iter"),
    ):
        value = arguments.get(name)
        if isinstance(value, int | float):
            said.setdefault(section, {})[key] = value
    return said


def _placing(recipe: Recipe) -> Place:
    def place(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        return NAMES.to_ours(name), tensor

    return place


FAMILY = Family("mar", "MAR", _recognise, _describe)

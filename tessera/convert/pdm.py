"""Checkpoints of PDM (Luhman & Luhman 2022): flat state dicts of patched U-Nets, without flags."""

from __future__ import annotations

import math
import re

from tessera.convert.checkpoint import (
    AVERAGE,
    TRAINED,
    CheckpointFile,
    Data,
    Description,
    Family,
    Need,
    Settings,
    prefixed,
)
from tessera.convert.flat import (
    Tensors,
    is_state_dict,
    setting,
    shape_of,
    state_dict,
    unet_shape,
)

_LAST = "out_layers.2"
_PUBLISHED = {
    "imagenet_weights_0": "pdm-imagenet256-expert0",
    "imagenet_weights_1": "pdm-imagenet256-expert1",
    "ffhq_weights": "pdm-ffhq1024",
    **{f"lsun_weights_p{patch}": f"pdm-lsun256-p{patch}" for patch in (2, 4, 8)},
}

HEADS = Need(
    ("network.heads", "network.head_channels"),
    "number of attention heads, or the width of one: 64 in the published models",
)
SIDE = Need(("data.resolution",), "side of the images, pixels")
ENLARGED = Need(("low_resolution",), "side of the small images that it enlarges")


def weights_name(source: CheckpointFile) -> str:
    """What the weights in a flat file are called; those of `model000003.pt` are no average."""
    return TRAINED if re.fullmatch(r"(.*[-_])?model\d+", source.path.stem) else AVERAGE


def _recognise(source: CheckpointFile) -> bool:
    data = source.data
    return is_state_dict(data) and "input_blocks.1.0.emb_layers.weight" in data


def _describe(source: CheckpointFile, settings: Settings) -> Description:
    tensors = state_dict(source, source.data, "content")
    published = _PUBLISHED.get(source.path.stem)
    side = setting(settings, "data.resolution", {}, published)
    inferred = _sections(source, tensors, side if isinstance(side, int) else None)
    return Description(
        {weights_name(source): tensors},
        prefixed(""),
        inferred=inferred,
        assumed={
            "preconditioning": {"kind": "discrete", "schedule": "linear", "prediction": "x0"},
            "objective": {"kind": "discrete"},
            "sampling": {"kind": "ddpm"},
        },
        needs=_needs(source, tensors),
        published=published,
        notes=_class_notes(inferred),
    )


def _needs(source: CheckpointFile, tensors: Tensors) -> list[Need]:
    order = Need(
        ("network.attention_order",), "split if trained with use_new_attention_order, else legacy"
    )
    channels = [
        shape_of(source, tensors, f"{name}.weight", 4)[axis]
        for name, axis in (("input_blocks.0.0", 1), ("out.2", 0))
    ]
    return [SIDE, HEADS, order] + [ENLARGED] * (channels[0] == 2 * channels[1])


def _sections(source: CheckpointFile, tensors: Tensors, side: int | None) -> Data:
    shape = unet_shape(source, tensors, _LAST)
    stem = shape_of(source, tensors, "input_blocks.0.0.weight", 4)
    head = shape_of(source, tensors, "out.2.weight", 4)[0]
    embedding = shape_of(source, tensors, "time_embed.0.weight", 2)
    patch = math.isqrt(head // 3)
    if 3 * patch**2 != head or stem[1] not in (head, 2 * head):
        raise source.error(
            f"it takes {stem[1]} channels and puts out {head}: no patches of RGB pixels"
        )
    network: Data = {
        "kind": "patched_unet",
        "patch_size": patch,
        "model_channels": embedding[1],
        "channel_mult": shape.mult(embedding[1]),
        "num_blocks": shape.blocks,
        "resblock_updown": shape.resblock_updown,
        "learn_variance": "variance_output_t_emb.weight" in tensors,
    }
    data: Data = {"channels": 3, "num_classes": 0}
    if "label_embs.weight" in tensors:
        rows = shape_of(source, tensors, "label_embs.weight", 2)[0]
        # The released code knows ImageNet's classes only.
        network["null_class"] = rows != 1000
        data["num_classes"] = rows - network["null_class"]
    sections: Data = {"network": network, "data": data}
    if side is not None:
        network["attn_resolutions"] = shape.resolutions(side // patch)
    return sections


def _class_notes(inferred: Data) -> list[str]:
    network, data = inferred["network"], inferred["data"]
    if not data["num_classes"]:
        return []
    null = "the last of them no class" if network["null_class"] else "none of them no class"
    rows = data["num_classes"] + network["null_class"]
    return [f"{rows} rows of class embeddings: {null} (network.null_class)"]


FAMILY = Family("pdm", "PDM", _recognise, _describe)

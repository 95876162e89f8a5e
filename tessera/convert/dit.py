"""Checkpoints of DiT (Peebles & Xie 2023): published state dicts, and training states."""

from __future__ import annotations

import math
import re
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
from tessera.convert.edm import image_sections
from tessera.convert.flat import Tensors, is_state_dict, numbered, shape_of, state_dict
from tessera.convert.records import ClosedObject
from tessera.networks.presets import SIZES
from tessera.recipes.schema import Recipe

NAMES = Renamed("blocks.", "layers.")
"""Blocks are layers here."""

_MARK = ("x_embedder.proj.weight", "blocks.0.adaLN_modulation.1.weight")


def is_transformer(value: Any, prefix: str = "") -> bool:
    """Whether a value is the state dict of a diffusion transformer, of names behind a prefix."""
    if not is_state_dict(value):
        return False
    return any(all(p + prefix + name in value for name in _MARK) for p in ("", "module."))


def arguments_of(value: Any) -> Mapping[str, Any]:
    """What a training was called with, as a plain mapping; empty if that is not there."""
    if isinstance(value, ClosedObject):
        return value.state
    return value if isinstance(value, dict) else {}


def transformer_sections(source: CheckpointFile, tensors: Tensors) -> tuple[Data, list[Need]]:
    """What the shapes of a transformer's tensors show, and what they do not.

    Raises:
        CheckpointError: they are not those of a diffusion transformer.
    """
    width, channels, patch, _ = shape_of(source, tensors, "x_embedder.proj.weight", 4)
    tokens = shape_of(source, tensors, "pos_embed", 3)[1]
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise source.error(f"it has {tokens} tokens, which are no square")
    depth = numbered(tensors, r"blocks\.(\d+)\.")
    hidden = shape_of(source, tensors, "blocks.0.mlp.fc1.weight", 2)[0]
    classes = 0
    if "y_embedder.embedding_table.weight" in tensors:
        classes = shape_of(source, tensors, "y_embedder.embedding_table.weight", 2)[0] - 1
    network: Data = {
        "patch": patch,
        "depth": depth,
        "width": width,
        "mlp_ratio": hidden / width,
    }
    needs = []
    named = [preset.heads for preset in SIZES.values() if preset[:2] == (depth, width)]
    if named or width % 64 == 0:
        network["heads"] = named[0] if named else width // 64
    else:
        needs.append(Need(("network.heads",), f"number of attention heads; divides {width}"))
    return {**image_sections(side * patch, channels, classes), "network": network}, needs


def output_channels(source: CheckpointFile, tensors: Tensors) -> int:
    """Of the last layer of a plain transformer."""
    patch = shape_of(source, tensors, "x_embedder.proj.weight", 4)[2]
    return shape_of(source, tensors, "final_layer.linear.weight", 2)[0] // patch**2


def place_transformer(recipe: Recipe) -> Place:
    """By our names."""

    def place(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        return NAMES.to_ours(name), tensor

    return place


def _recognise(source: CheckpointFile) -> bool:
    data = source.data
    if not isinstance(data, dict):
        return False
    return is_transformer(data) or any(is_transformer(data.get(key)) for key in ("model", "ema"))


def _describe(source: CheckpointFile, settings: Settings) -> Description:
    data = source.data
    if is_transformer(data):
        weights = {AVERAGE: state_dict(source, data, "content")}
    else:
        weights = {
            name: state_dict(source, data[key], key)
            for name, key in ((AVERAGE, "ema"), (TRAINED, "model"))
            if key in data
        }
    tensors = next(iter(weights.values()))
    inferred, needs = transformer_sections(source, tensors)
    heads = inferred["network"].pop("heads", None)
    channels, out = (
        shape_of(source, tensors, "x_embedder.proj.weight", 4)[1],
        output_channels(source, tensors),
    )
    inferred["network"] |= {"kind": "dit", "learn_variance": out == 2 * channels}
    assumed: Data = {
        "preconditioning": {"kind": "discrete", "schedule": "linear", "prediction": "eps"},
        "objective": {"kind": "discrete", "weight": "snr"},
        "sampling": {"kind": "ddpm", "steps": "250"},
        "network": {"kind": "dit"} | ({} if heads is None else {"heads": heads}),
    }
    arguments = arguments_of({} if is_transformer(data) else data.get("args"))
    vae = arguments.get("vae")
    said: Data = {}
    if vae in ("ema", "mse") and "codec" in inferred:
        said["codec"] = {"kind": "vae", "model": f"stabilityai/sd-vae-ft-{vae}"}
    return Description(
        weights,
        place_transformer,
        said=said,
        inferred=inferred,
        assumed=assumed,
        needs=needs,
        images_seen=_images(source, arguments),
    )


def _images(source: CheckpointFile, arguments: Mapping[str, Any]) -> int:
    """Steps by the name of a training state, times its batch."""
    batch = arguments.get("global_batch_size")
    if not isinstance(batch, int) or not re.fullmatch(r"\d{1,9}", source.path.stem):
        return 0
    return int(source.path.stem) * batch if 0 < batch < 2**32 else 0


FAMILY = Family("dit", "DiT", _recognise, _describe)

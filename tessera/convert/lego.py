"""Checkpoints of LEGO bricks (Zheng et al. 2024): the sizes of bricks are read from the objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tessera.convert.checkpoint import (
    CheckpointFile,
    Data,
    Description,
    Family,
    Settings,
    prefixed,
)
from tessera.convert.edm import augment_section, image_sections, loss_section
from tessera.convert.records import ClosedObject
from tessera.convert.snapshots import made_of, need_snapshot
from tessera.errors import CheckpointError

_CLASS = "EDMPrecondLEGO"
_MODULE = "training.lego_models"
_CLASSES = (
    "DiTBlock", "FinalLayer", "LEGO", "LEGO_module", "LabelEmbedder", "PositionalEmbedding",
    "TimestepEmbedder",
)  # fmt: skip

_PUBLISHED = {
    "LEGO-L-PG-64": "lego-l-pg-imagenet64",
    "LEGO-L-PR-64": "lego-l-pr-imagenet64",
    "LEGO-XL-U-256": "lego-xl-u-imagenet256-latent",
}


def _describe(source: CheckpointFile, settings: Settings) -> Description:
    snapshot = need_snapshot(source)
    precond = snapshot.network.state
    stack = _child(source, snapshot.network, "model")
    channels, classes = (_integer(source, precond, name) for name in ("img_channels", "label_dim"))
    if precond.get("sigma_min", 0) != 0:
        raise source.error("its smallest noise level is not 0, which is not known here")
    training = stack.state.get("train_intermediate_stages", True)
    dropout = _label_dropout(stack) if classes else 0
    said: Data = {
        **image_sections(_integer(source, precond, "img_resolution"), channels, classes),
        "network": {**_network(source, stack), "joint": bool(training), "positions": "learned"},
        "preconditioning": {"kind": "edm", "sigma_data": precond.get("sigma_data", 0.5)},
        "objective": {**loss_section(snapshot, "edm"), "label_dropout": dropout},
    }
    said["augment"] = augment_section(snapshot, _augment_labels(source, stack))
    said["data"]["xflip"] = bool(snapshot.dataset.get("xflip", False))
    precision = "fp16" if precond.get("use_fp16") else "fp32"
    return Description(
        snapshot.weights(),
        prefixed("model."),
        said=said,
        assumed={"training": {"precision": precision}},
        published=_PUBLISHED.get(source.path.stem),
        # Those of 64 pixels are less deep than the recipes'.
        free=frozenset({"network.bricks"}),
        images_seen=snapshot.images_seen,
    )


def _network(source: CheckpointFile, stack: ClosedObject) -> Data:
    """The section of a stack, from the attributes and shapes of its bricks."""
    bricks = [*_children(source, _child(source, stack, "model"))]
    if not bricks:
        raise source.error("its stack has no bricks")
    sections, shapes = zip(*(_brick(source, brick) for brick in bricks), strict=True)
    if len(set(shapes)) > 1:
        raise source.error(
            "its bricks differ in width, heads or the width of their MLPs, which ours do not"
        )
    width, heads, ratio = shapes[0]
    return {
        "kind": "lego",
        "bricks": [*sections],
        "width": width,
        "heads": heads,
        "mlp_ratio": ratio,
    }


def _brick(source: CheckpointFile, brick: ClosedObject) -> tuple[Data, tuple[int, int, float]]:
    embedder = _child(source, brick, "x_embedder").state
    blocks = [*_children(source, _child(source, brick, "blocks"))]
    if not blocks:
        raise source.error("one of its bricks has no blocks")
    side, patch = (_square(source, embedder, name) for name in ("img_size", "patch_size"))
    first = blocks[0].state
    attention = _child(source, blocks[0], "attn").state
    ratio = first.get("mlp_ratio", 4.0)
    shape = (
        _integer(source, brick.state, "hidden_size"),
        _integer(source, attention, "num_heads"),
        float(ratio) if isinstance(ratio, int | float) else 4.0,
    )
    return {"size": side, "patch": patch, "depth": len(blocks)}, shape


def _label_dropout(stack: ClosedObject) -> float:
    """Of the label embedder; the released default where it does not say."""
    embedder = (stack.state.get("_modules") or {}).get("y_embedder")
    rate = embedder.state.get("dropout_prob") if isinstance(embedder, ClosedObject) else None
    return float(rate) if isinstance(rate, int | float) else 0.1


def _augment_labels(source: CheckpointFile, stack: ClosedObject) -> int:
    """How many it takes; 0 if none."""
    layer = (stack.state.get("_modules") or {}).get("map_augment")
    if not isinstance(layer, ClosedObject):
        return 0
    return _integer(source, layer.state, "in_features")


def _child(source: CheckpointFile, record: ClosedObject, name: str) -> ClosedObject:
    modules = record.state.get("_modules")
    child = modules.get(name) if isinstance(modules, Mapping) else None
    if not isinstance(child, ClosedObject):
        raise _strange(source, f"a {record.class_name} without {name}")
    return child


def _children(source: CheckpointFile, record: ClosedObject) -> list[ClosedObject]:
    modules = record.state.get("_modules")
    if not isinstance(modules, Mapping):
        raise _strange(source, f"a {record.class_name} without modules")
    return [_child(source, record, name) for name in modules]


def _integer(source: CheckpointFile, state: Mapping[str, Any], name: str) -> int:
    value = state.get(name)
    if not isinstance(value, int):
        raise _strange(source, f"{name} is no number")
    return value


def _square(source: CheckpointFile, state: Mapping[str, Any], name: str) -> int:
    """A side that is stored for height and width."""
    value = state.get(name)
    if not isinstance(value, Sequence) or len(value) != 2 or value[0] != value[1]:
        raise _strange(source, f"{name} is not that of a square")
    return _integer(source, {name: value[0]}, name)


def _strange(source: CheckpointFile, what: str) -> CheckpointError:
    return source.error(f"its network is not as the released code makes it: {what}")


FAMILY = Family(
    "lego",
    "LEGO bricks",
    lambda source: made_of(source, _CLASS),
    _describe,
    classes=tuple((_MODULE, name) for name in _CLASSES),
)

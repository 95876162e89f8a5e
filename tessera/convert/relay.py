"""Checkpoints of relay diffusion (Teng et al. 2023): EDM's networks, of two stages.

Nothing in a network says that it deblurs: the second stage is told by its loss, by the options, by
the name of a published file, or by standing behind a first one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tessera.convert.checkpoint import CheckpointFile, Data, Description, Family, Settings
from tessera.convert.edm import UNetKind, describe_unet, unet_sections
from tessera.convert.records import brief
from tessera.convert.snapshots import Snapshot, need_snapshot, open_snapshot

_CLASS = "EDMPrecond"
_KIND = UNetKind(idle=frozenset({"eff_attn"}))

_LOSS = {
    "P_mean": "p_mean",
    "P_std": "p_std",
    "sigma_data": "sigma_data",
    "up_scale": "block",
    "prob_length": "prob_length",
    "blur_sigma_max": "blur_sigma_max",
    "min_scale": "min_scale",
    "block_scale": "block_scale",
}
_IDLE_LOSS = {"truncate_sigma"}
_STAGES = ("first", "second")
_PUBLISHED = {
    f"{data}_{stage}_stage": f"relay-{data}-{stage}"
    for data in ("celebahq", "imagenet")
    for stage in _STAGES
}


def _recognise(source: CheckpointFile) -> bool:
    snapshot = open_snapshot(source)
    if snapshot is None or snapshot.class_name != _CLASS:
        return False
    marked = snapshot.loss is not None and snapshot.loss.class_name == "BlurLoss"
    both = isinstance(source.data, dict) and {"step", "optimizer_state"} <= source.data.keys()
    arguments = snapshot.network.state.get("_init_kwargs")
    return marked or both or (isinstance(arguments, dict) and "eff_attn" in arguments)


def _describe(source: CheckpointFile, settings: Settings) -> Description:
    snapshot = need_snapshot(source)
    stage, reason = _stage(source, snapshot, settings)
    notes = ["eff_attn changes no numbers"] if "eff_attn" in snapshot.given else []
    blur = snapshot.loss if stage == "second" else None
    plain = snapshot
    if stage == "second":
        plain = Snapshot(source, snapshot.networks, None, snapshot.augment, snapshot.dataset)
        notes.append(f"taken for a second stage, {reason}")
    said, assumed = unet_sections(plain, _KIND)
    if stage == "second":
        dropout = said.pop("objective")["label_dropout"]
        objective: Data = {"kind": "blur", "label_dropout": dropout}
        if blur is not None and blur.class_name == "BlurLoss":
            given = {"block_scale": 0} | snapshot.arguments(
                blur, {**_LOSS, **{name: name for name in _IDLE_LOSS}}
            )
            objective |= {k: v for k, v in given.items() if k not in _IDLE_LOSS}
            said["objective"] = objective
        else:
            # A published recipe or an option says more.
            assumed["objective"] = {"block": 4, "block_scale": 0.15, **objective}
            notes.append(
                "the file does not say how images were blurred: by default as the released code "
                "does (options: objective.block, .blur_sigma_max, .prob_length, .block_scale)"
            )
        assumed["sampling"] = {"kind": "relay"}
    inferred: Data = {}
    if stage == "second" and settings.first is not None and "objective" not in said:
        inferred["objective"] = {"block": said["data"]["resolution"] // settings.first}
    published = _PUBLISHED.get(source.path.stem)
    found = describe_unet(source, snapshot, said, assumed, published=published, notes=tuple(notes))
    return replace(found, inferred=inferred)


def _stage(source: CheckpointFile, snapshot: Snapshot, settings: Settings) -> tuple[str, str]:
    """Which stage it is, and by what that is known."""
    wanted: Any = settings.own.get("stage")
    if wanted is not None and wanted not in _STAGES:
        raise source.error(f"`stage={brief(wanted)}`: there is none. Choose first or second")
    loss = snapshot.loss
    if loss is not None:
        stage = "second" if loss.class_name == "BlurLoss" else "first"
        if wanted not in (None, stage):
            raise source.error(f"it was trained by a {loss.class_name}, as a {stage} stage")
        return stage, "by its loss"
    if settings.first is not None and wanted != "first":
        return "second", "for it stands behind a first one"
    if wanted is not None:
        return wanted, "by the option"
    for stage in _STAGES:
        if _PUBLISHED.get(source.path.stem, "").endswith(stage):
            return stage, "by the name of a published file"
    preset = settings.preset or ""
    if preset.startswith("relay-") and preset.endswith(_STAGES):
        return preset.rpartition("-")[2], "by the preset"
    return "first", "for nothing says that it deblurs"


FAMILY = Family(
    "relay",
    "relay diffusion",
    _recognise,
    _describe,
    options={"stage": "first or second, of a .pt file, which does not say"},
)

"""Checkpoints of EDM (Karras et al. 2022): what their objects are called here.

State dicts need no renaming but for a prefix, because our U-Nets carry the released names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessera.convert.checkpoint import (
    CheckpointFile,
    Data,
    Description,
    Family,
    Ignored,
    Place,
    Settings,
)
from tessera.convert.records import ClosedObject, brief
from tessera.convert.snapshots import Snapshot, made_of, need_snapshot
from tessera.diffusion.preconditioning import Iddpm, Vp
from tessera.recipes.build import build_preconditioning
from tessera.recipes.schema import AugmentConfig, Recipe


class _Class(NamedTuple):
    """A class of the released code: our `kind`, and its arguments by our names."""

    kind: str
    arguments: Mapping[str, str]


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_UNET = _same(
    "model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions",
    "dropout",
)  # fmt: skip
_NETWORKS = {
    "SongUNet": _Class(
        "song_unet",
        {
            **_UNET,
            **_same("channel_mult_noise", "resample_filter"),
            "embedding_type": "embedding",
            "encoder_type": "encoder",
            "decoder_type": "decoder",
            "implicit_mlp": "implicit_mlp",
        },
    ),
    "DhariwalUNet": _Class("adm_unet", _UNET),
}

_PRECONDITIONING = {
    "EDMPrecond": _Class("edm", _same("sigma_data")),
    "VPPrecond": _Class(
        "vp", {**_same("beta_d", "beta_min", "epsilon_t"), "M": "timesteps"}
    ),
    "VEPrecond": _Class("ve", _same("sigma_min", "sigma_max")),
    "iDDPMPrecond": _Class("iddpm", {"C_1": "c_1", "C_2": "c_2", "M": "timesteps"}),
}  # fmt: skip
_DEFAULT_NETWORK = {"vp": "SongUNet", "ve": "SongUNet", "iddpm": "DhariwalUNet"}

_LOSSES = {
    "EDMLoss": _Class("edm", {"P_mean": "p_mean", "P_std": "p_std", "sigma_data": "sigma_data"}),
    "VPLoss": _Class("vp", _same("beta_d", "beta_min", "epsilon_t")),
    "VELoss": _Class("ve", _same("sigma_min", "sigma_max")),
}

_RELEASED = {
    **{
        f"edm-cifar10-32x32-{labels}-{network}": f"edm-cifar10-{labels}-{network}"
        for labels in ("cond", "uncond")
        for network in ("vp", "ve")
    },
    **{
        f"edm-{data}-64x64-uncond-{network}": f"edm-{ours}-{network}"
        for data, ours in (("ffhq", "ffhq64"), ("afhqv2", "afhqv2-64"))
        for network in ("vp", "ve")
    },
    "edm-imagenet-64x64-cond-adm": "edm-imagenet64-adm",
}
"""The published files to the recipes of their experiments, with training and sampler settings."""

_AUGMENT_DIM = 9  # of the augmentation that the released training script always uses


def network_section(model_type: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's `network` of a released U-Net made with `arguments`; others are ignored.

    The ADM network had attention only where it is 64 channels wide or more, whatever it was asked
    for; a recipe says what there is.
    """
    kind, names = _NETWORKS[model_type]
    section = {ours: arguments[name] for name, ours in names.items() if name in arguments}
    section = {"kind": kind, **section}
    if kind == "adm_unet":
        section["attn_resolutions"] = _adm_attention(arguments)
    return section


def _adm_attention(arguments: Mapping[str, Any]) -> list[int]:
    resolution = arguments["img_resolution"]
    width, mults = arguments.get("model_channels", 192), arguments.get("channel_mult", (1, 2, 3, 4))
    levels = {resolution >> level: width * mult for level, mult in enumerate(mults)}
    asked = arguments.get("attn_resolutions", (32, 16, 8))
    return [side for side in asked if levels.get(side, 64) >= 64]


@dataclass(frozen=True)
class UNetKind:
    """How the U-Nets of a descendant of EDM differ from EDM's own.

    Attributes:
        idle: arguments of its networks that change no numbers.
        coordinates: channels of `img_channels` that are coordinates.
        arguments: further arguments of its preconditioned network.
    """

    idle: frozenset[str] = frozenset()
    coordinates: int = 0
    arguments: frozenset[str] = frozenset()


def unet_sections(snapshot: Snapshot, kind: UNetKind = UNetKind()) -> tuple[Data, Data]:
    """The sections of the recipe that a file says, and those that it leaves to defaults.

    Raises:
        CheckpointError: the network is none that the library has.
    """
    network = snapshot.network
    scaling, names = _PRECONDITIONING[network.class_name.removeprefix("Patch_")]
    given = {name: value for name, value in snapshot.given.items() if name not in kind.idle}
    arguments = {"label_dim": 0, "augment_dim": 0, "label_dropout": 0.0, "use_fp16": False, **given}
    model_type = arguments.get("model_type", _DEFAULT_NETWORK.get(scaling, "DhariwalUNet"))
    if model_type not in _NETWORKS:
        raise snapshot.source.error(
            f"its network is a {brief(model_type)}; those of EDM are {', '.join(_NETWORKS)}"
        )
    known = {*names, *_NETWORKS[model_type].arguments, *kind.arguments}
    _check_arguments(snapshot, arguments, scaling, known)
    channels = arguments["img_channels"] - kind.coordinates
    sections: Data = {
        **image_sections(arguments["img_resolution"], channels, arguments["label_dim"]),
        "network": network_section(model_type, arguments),
        "preconditioning": {
            "kind": scaling,
            **{ours: given[name] for name, ours in names.items() if name in given},
        },
        "objective": {
            **loss_section(snapshot, scaling),
            "label_dropout": arguments["label_dropout"],
        },
        "augment": augment_section(snapshot, arguments["augment_dim"]),
    }
    sections["data"]["xflip"] = bool(snapshot.dataset.get("xflip", False))
    if scaling == "vp":
        sections["preconditioning"]["released_sigma_min"] = _released_sigma_min(
            network, sections["preconditioning"]
        )
    return sections, {"training": {"precision": "fp16" if arguments["use_fp16"] else "fp32"}}


KL16 = {"kind": "vae", "model": "vae-kl16", "channels": 16, "downsample": 16, "scale": 0.2325}
"""The autoencoder of MAR, whose folder the caller names by `codec.model`."""


def image_sections(side: int, channels: int, classes: int) -> Data:
    """The sections of a network on pictures of this side: pixels, or latents by their channels.

    Four are those of Stable Diffusion's VAE, of pictures of 8 times the side; sixteen KL-16's.
    """
    data = {"resolution": side, "channels": channels, "num_classes": classes}
    match channels:
        case 4:
            return {
                "data": {**data, "resolution": 8 * side, "channels": 3},
                "codec": {"kind": "vae"},
            }
        case 16:
            return {"data": {**data, "resolution": 16 * side, "channels": 3}, "codec": dict(KL16)}
    return {"data": data}


def describe_unet(
    source: CheckpointFile,
    snapshot: Snapshot,
    said: Data,
    assumed: Data,
    *,
    published: str | None = None,
    notes: tuple[str, ...] = (),
) -> Description:
    """The description of a file that holds a U-Net of EDM or of a descendant."""

    def place(recipe: Recipe) -> Place:
        scaling = build_preconditioning(recipe.preconditioning)

        def put(name: str, tensor: Tensor) -> tuple[str, Tensor] | Ignored:
            if name == "u" and isinstance(scaling, Iddpm):
                _check_table(source, tensor, scaling)
                return Ignored("the table of noise levels, which is computed")
            return name.removeprefix("model."), tensor

        return put

    return Description(
        snapshot.weights(),
        place,
        said=said,
        assumed=assumed,
        published=published,
        images_seen=snapshot.images_seen,
        notes=notes,
    )


def _check_table(source: CheckpointFile, table: Tensor, scaling: Iddpm) -> None:
    ours = scaling.table(torch.device("cpu"))
    if table.shape != ours.shape or not torch.allclose(table, ours, 1e-5, 0):
        raise source.error("its table of noise levels is not that of improved DDPM")


def _describe(source: CheckpointFile, settings: Settings) -> Description:
    snapshot = need_snapshot(source)
    said, assumed = unet_sections(snapshot)
    return describe_unet(source, snapshot, said, assumed, published=_RELEASED.get(source.path.stem))


def _check_arguments(
    snapshot: Snapshot, arguments: Mapping[str, Any], scaling: str, names: set[str]
) -> None:
    """Raise for arguments of the preconditioned network that the recipe would leave out."""
    common = {
        "img_resolution", "img_channels", "label_dim", "augment_dim", "label_dropout", "use_fp16",
        "model_type",
    }  # fmt: skip
    fixed = {"sigma_min": 0, "sigma_max": math.inf} if scaling == "edm" else {}
    wrong = [
        f"{brief(name)}={brief(value)}"
        for name, value in arguments.items()
        if name not in names | common and (name not in fixed or value != fixed[name])
    ]
    missing = [name for name in ("img_resolution", "img_channels") if name not in arguments]
    if wrong or missing:
        text = f"with {', '.join(wrong)}" if wrong else f"without {', '.join(missing)}"
        raise snapshot.source.error(
            f"its {snapshot.class_name} was made {text}, which is not known here"
        )


def loss_section(snapshot: Snapshot, scaling: str) -> dict[str, Any]:
    """What it was trained by; without that, what belongs to its preconditioning.

    Raises:
        CheckpointError: a loss that EDM has not.
    """
    loss = snapshot.loss
    if loss is None:
        return {"kind": scaling if scaling in ("vp", "ve") else "edm"}
    name = loss.class_name.removeprefix("Patch_").removeprefix("LEGO")  # which change no numbers
    if name not in _LOSSES:
        raise snapshot.source.error(
            f"it was trained by a {loss.class_name}; those of EDM are {', '.join(_LOSSES)}"
        )
    kind, names = _LOSSES[name]
    return {"kind": kind, **snapshot.arguments(loss, names)}


def augment_section(snapshot: Snapshot, labels: int) -> dict[str, Any] | None:
    """The augmentation that gives the network its `labels` augmentation labels.

    Raises:
        CheckpointError: it gives another number of them, or is not in the file.
    """
    if labels == 0:
        return None
    if snapshot.augment is not None:
        names = _same(*AugmentConfig.model_fields)
        # The released class does nothing that it is not asked for; our recipes have its defaults
        # in the training script.
        off = {name: 0 for name in names if not name.endswith(("_std", "_max", "_prob"))}
        given = snapshot.arguments(snapshot.augment, names)
        section = AugmentConfig.model_validate({**off, "p": 1, **given})
    else:
        section = AugmentConfig()
    if section.label_dim != labels:
        raise snapshot.source.error(
            f"its network has {labels} augmentation labels, and the augmentation "
            + (f"{section.label_dim}" if snapshot.augment else "is not in the file")
        )
    return section.model_dump()


def _released_sigma_min(network: ClosedObject, section: Mapping[str, Any]) -> bool:
    """Whether the smallest noise level is the released, rounded one rather than the exact one."""
    values = {name: value for name, value in section.items() if name != "kind"}
    stored = network.state.get("sigma_min", 2.0**-10)
    exact, released = (Vp(**values, released_sigma_min=r).sigma_min for r in (False, True))
    return abs(float(stored) - released) < abs(float(stored) - exact)


FAMILY = Family("edm", "EDM", lambda source: made_of(source, *_PRECONDITIONING), _describe)

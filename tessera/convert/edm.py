"""Checkpoints of EDM (Karras et al. 2022): what their objects are called here.

State dicts need no renaming but for a prefix, because our U-Nets carry the released names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessera.convert.checkpoint import Checkpoint, Converter, brief
from tessera.convert.unpickle import ClosedObject
from tessera.diffusion.preconditioning import Iddpm, Vp
from tessera.recipes.build import build_preconditioning
from tessera.recipes.loading import dump_recipe, parse_recipe, shipped
from tessera.recipes.schema import AugmentConfig, Recipe


class _Kind(NamedTuple):
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
    "SongUNet": _Kind(
        "song_unet",
        {
            **_UNET,
            **_same("channel_mult_noise", "resample_filter"),
            "embedding_type": "embedding",
            "encoder_type": "encoder",
            "decoder_type": "decoder",
        },
    ),
    "DhariwalUNet": _Kind("adm_unet", _UNET),
}

_PRECONDITIONING = {
    "EDMPrecond": _Kind("edm", _same("sigma_data")),
    "VPPrecond": _Kind(
        "vp", {**_same("beta_d", "beta_min", "epsilon_t"), "M": "timesteps"}
    ),
    "VEPrecond": _Kind("ve", _same("sigma_min", "sigma_max")),
    "iDDPMPrecond": _Kind("iddpm", {"C_1": "c_1", "C_2": "c_2", "M": "timesteps"}),
}  # fmt: skip
_DEFAULT_NETWORK = {"vp": "SongUNet", "ve": "SongUNet", "iddpm": "DhariwalUNet"}

_LOSSES = {
    "EDMLoss": _Kind("edm", {"P_mean": "p_mean", "P_std": "p_std", "sigma_data": "sigma_data"}),
    "VPLoss": _Kind("vp", _same("beta_d", "beta_min", "epsilon_t")),
    "VELoss": _Kind("ve", _same("sigma_min", "sigma_max")),
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


def edm_recipe(checkpoint: Checkpoint) -> tuple[Recipe, int]:
    """The recipe of a checkpoint and its images seen; of a published file, as its experiment says.

    Raises:
        CheckpointError, RecipeError: the network is none that the library has.
    """
    network = checkpoint.network
    scaling, names = _PRECONDITIONING[network.class_name]
    given = checkpoint.arguments(network)
    arguments = {"label_dim": 0, "augment_dim": 0, "label_dropout": 0.0, "use_fp16": False, **given}
    model_type = arguments.get("model_type", _DEFAULT_NETWORK.get(scaling, "DhariwalUNet"))
    if model_type not in _NETWORKS:
        raise checkpoint.error(
            f"its network is a {brief(model_type)}; those of EDM are {', '.join(_NETWORKS)}"
        )
    _check_arguments(checkpoint, arguments, scaling, {*names, *_NETWORKS[model_type].arguments})

    sections: dict[str, Any] = {
        "data": {
            "resolution": arguments["img_resolution"],
            "channels": arguments["img_channels"],
            "num_classes": arguments["label_dim"],
            "xflip": bool(checkpoint.dataset.get("xflip", False)),
        },
        "network": network_section(model_type, arguments),
        "preconditioning": {
            "kind": scaling,
            **{ours: given[name] for name, ours in names.items() if name in given},
        },
        "objective": {
            **_objective(checkpoint, scaling),
            "label_dropout": arguments["label_dropout"],
        },
        "augment": _augment(checkpoint, arguments["augment_dim"]),
    }
    if scaling == "vp":
        sections["preconditioning"]["released_sigma_min"] = _released_sigma_min(
            network, sections["preconditioning"]
        )
    recipe = parse_recipe(
        {
            "name": checkpoint.path.stem,
            "description": f"converted from {checkpoint.path.name}",
            **sections,
            "training": {"precision": "fp16" if arguments["use_fp16"] else "fp32"},
        },
        str(checkpoint.path),
    )
    published = _published(checkpoint, recipe)
    if published is not None:
        return published, published.training.images
    return recipe, checkpoint.images_seen


def _check_arguments(
    checkpoint: Checkpoint, arguments: Mapping[str, Any], scaling: str, names: set[str]
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
        raise checkpoint.error(
            f"its {checkpoint.network.class_name} was made {text}, which is not known here"
        )


def _objective(checkpoint: Checkpoint, scaling: str) -> dict[str, Any]:
    """What it was trained by; without that, what belongs to its preconditioning."""
    loss = checkpoint.loss
    if loss is None:
        return {"kind": scaling if scaling in ("vp", "ve") else "edm"}
    if loss.class_name not in _LOSSES:
        raise checkpoint.error(
            f"it was trained by a {loss.class_name}; those of EDM are {', '.join(_LOSSES)}"
        )
    kind, names = _LOSSES[loss.class_name]
    return {"kind": kind, **checkpoint.arguments(loss, names)}


def _augment(checkpoint: Checkpoint, labels: int) -> dict[str, Any] | None:
    """The augmentation that gives the network its `labels` augmentation labels."""
    if labels == 0:
        return None
    if checkpoint.augment is not None:
        names = _same(*AugmentConfig.model_fields)
        # The released class does nothing that it is not asked for; our recipes have its defaults
        # in the training script.
        off = {name: 0 for name in names if not name.endswith(("_std", "_max", "_prob"))}
        given = checkpoint.arguments(checkpoint.augment, names)
        section = AugmentConfig.model_validate({**off, "p": 1, **given})
    else:
        section = AugmentConfig()
    if section.label_dim != labels:
        raise checkpoint.error(
            f"its network has {labels} augmentation labels, and the augmentation "
            + (f"{section.label_dim}" if checkpoint.augment else "is not in the file")
        )
    return section.model_dump()


def _released_sigma_min(network: ClosedObject, section: Mapping[str, Any]) -> bool:
    """Whether the smallest noise level is the released, rounded one rather than the exact one."""
    values = {name: value for name, value in section.items() if name != "kind"}
    stored = network.state.get("sigma_min", 2.0**-10)
    exact, released = (Vp(**values, released_sigma_min=r).sigma_min for r in (False, True))
    return abs(float(stored) - released) < abs(float(stored) - exact)


def _published(checkpoint: Checkpoint, recipe: Recipe) -> Recipe | None:
    """The recipe of the experiment if this is one of the published files."""
    name = _RELEASED.get(checkpoint.path.stem)
    if name is None:
        return None
    base = shipped()[name]()
    described = {"name": recipe.name, "description": f"{base.description}, {recipe.description}"}
    same = ("network", "preconditioning", "shape", "augment_dim")
    if any(getattr(base, part) != getattr(recipe, part) for part in same):
        return None
    own = {part: getattr(recipe, part) for part in ("data", "objective", "augment")}
    return parse_recipe(dump_recipe(base.model_copy(update={**own, **described})))


def edm_state(
    checkpoint: Checkpoint, recipe: Recipe, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The network's tensors of the preconditioned network's.

    Raises:
        CheckpointError: improved DDPM's table of noise levels is another than ours.
    """
    scaling = build_preconditioning(recipe.preconditioning)
    if isinstance(scaling, Iddpm):
        table, ours = state.pop("u", None), scaling.table(torch.device("cpu"))
        if table is None or table.shape != ours.shape or not torch.allclose(table, ours, 1e-5, 0):
            raise checkpoint.error("its table of noise levels is not that of improved DDPM")
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


CONVERTER = Converter("EDM", tuple(_PRECONDITIONING), edm_recipe, edm_state)

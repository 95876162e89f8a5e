"""Export to diffusers: the ADM U-Net (Dhariwal & Nichol 2021) as its `UNet2DModel`.

The only network with an exact counterpart there. Its `DiTTransformer2DModel` is none of DiT: it
tells the network the time at other frequencies, 10000^(-i / 127) instead of 10000^(-i / 128).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tessera.convert.flat import UNetShape
from tessera.convert.guided import heads_at, is_constant, recipe_shape
from tessera.convert.target import Target, discrete, refuse
from tessera.diffusion.discrete import noise_betas
from tessera.errors import TesseraError, require_extra
from tessera.files import atomic_folder
from tessera.networks.layers import GroupNorm, UNetBlock
from tessera.pipelines.base import Pipeline
from tessera.recipes.schema import AdmUNetConfig, DiscretePreconditioningConfig, DiTConfig, Recipe

_NAME = "diffusers"
_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_BLOCK = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "conv_shortcut",
}
_ATTENTION = {"norm2": "group_norm", "proj": "to_out.0"}
_OUTSIDE = {
    "map_layer0": "time_embedding.linear_1",
    "map_layer1": "time_embedding.linear_2",
    "out_norm": "conv_norm_out",
    "out_conv": "conv_out",
}


@dataclass(frozen=True)
class DiffusersModel:
    """A network and its scheduler, as those of diffusers.

    Attributes:
        unet: a `UNet2DModel`.
        scheduler: a `DDPMScheduler`.
        classes: how many the network knows.
        notes: what else to know.
    """

    unet: Any
    scheduler: Any
    classes: int
    notes: tuple[str, ...]

    def write(self, dest: Path, *, overwrite: bool = False) -> None:
        """Write a folder: `unet`, `scheduler`, and what makes them a `DDPMPipeline`.

        That only without classes, because `DDPMPipeline` tells its network none.

        Raises:
            TesseraError: something is in the way; of folders, an earlier export alone is replaced.
        """
        if dest.exists() and not (overwrite and _is_export(dest)):
            raise TesseraError(
                f"{dest} exists already; choose another name, or `overwrite=True` to replace an "
                "earlier export"
            )
        with atomic_folder(dest) as part:
            if self.classes:
                self.unet.save_pretrained(part / "unet", safe_serialization=True)
                self.scheduler.save_pretrained(part / "scheduler")
            else:
                diffusers = require_extra("diffusers", "latents", "the export to diffusers")
                whole = diffusers.DDPMPipeline(unet=self.unet, scheduler=self.scheduler)
                whole.save_pretrained(part, safe_serialization=True)


def _is_export(folder: Path) -> bool:
    parts = "unet/config.json", "scheduler/scheduler_config.json"
    return all((folder / part).is_file() for part in parts)


def _export(pipe: Pipeline) -> DiffusersModel:
    recipe, section = pipe.recipe, pipe.recipe.network
    if isinstance(section, DiTConfig):
        refuse(
            recipe,
            _NAME,
            "its DiTTransformer2DModel tells the network the time at other frequencies than DiT "
            "was trained with, so that its images would be others. --to dit keeps the model",
        )
    if not isinstance(section, AdmUNetConfig):
        refuse(
            recipe,
            _NAME,
            f"it has no network like {section.kind}. There is a UNet2DModel for adm_unet",
        )
    process = discrete(recipe, _NAME)
    network = pipe.model.network
    diffusers = require_extra("diffusers", "latents", "the export to diffusers")
    unet = diffusers.UNet2DModel(**_config(recipe, section, network))
    unet.load_state_dict(_state(recipe, section, network.state_dict()), strict=True)
    notes = []
    if recipe.data.num_classes:
        notes.append(f"class {recipe.data.num_classes} of its UNet2DModel is no class")
    if not recipe.codec.of_pixels:
        notes.append("its images are latents; their autoencoder is not in the folder")
    scheduler = _scheduler(diffusers, recipe, process)
    return DiffusersModel(unet.eval(), scheduler, recipe.data.num_classes, tuple(notes))


def _config(recipe: Recipe, section: AdmUNetConfig, network: nn.Module) -> dict[str, Any]:
    """What makes a `UNet2DModel` ours.

    Raises:
        TesseraError: nothing does.
    """
    shape = recipe_shape(section, recipe.shape[1])
    groups = {module.groups for module in network.modules() if isinstance(module, GroupNorm)}
    blocks = [module for module in network.modules() if isinstance(module, UNetBlock)]
    widths = {block.out_channels // block.heads for block in blocks if block.heads}
    for wrong, why in (
        (recipe.low_resolution is not None, "it enlarges pictures, which UNet2DModel is not told"),
        (len(groups) > 1, "its normalisations differ in their groups (network.groups)"),
        (len(widths) > 1, "its heads of attention differ in width (network.heads)"),
        (
            shape.widths[0] != section.model_channels,
            "its first level is not as wide as network.model_channels (network.channel_mult)",
        ),
    ):
        if wrong:
            refuse(recipe, _NAME, why)
    attention = [level in shape.attention for level in range(len(shape.widths))]
    down, up = (
        [f"Attn{way}Block2D" if attends else f"Resnet{way}sampleBlock2D" for attends in order]
        for way, order in (("Down", attention), ("Up", attention[::-1]))
    )
    classes, channels = recipe.data.num_classes, recipe.shape[0]
    return {
        "sample_size": recipe.shape[1],
        "in_channels": channels,
        "out_channels": channels * (1 + section.learn_variance),
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "time_embedding_dim": section.model_channels * section.channel_mult_emb,
        "down_block_types": down,
        "up_block_types": up,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "block_out_channels": shape.widths,
        "layers_per_block": shape.blocks,
        "dropout": section.dropout,
        "attention_head_dim": next(iter(widths), 8),
        "add_attention": heads_at(section, shape.widths[-1]) > 0,
        "norm_num_groups": next(iter(groups)),
        "attn_norm_num_groups": next(iter(groups)),
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": classes + 1 if classes else None,
    }


def _state(
    recipe: Recipe, section: AdmUNetConfig, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Our tensors under the names of `UNet2DModel`; no class is its last one, a row of zeros."""
    units = _units(recipe_shape(section, recipe.shape[1]), recipe.shape[1])
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        unit, _, last = module.rpartition(".")
        if is_constant(name):
            continue
        if module == "map_label":
            none = tensor.new_zeros(1, len(tensor))
            found["class_embedding.weight"] = torch.cat([tensor.T, none])
        elif last == "qkv":
            for place, part in enumerate("qkv"):
                rows = tensor[place::3]  # of one channel its q, k and v lie together
                rows = rows.flatten(1) if kind == "weight" else rows
                found[f"{_attention(units[unit])}.to_{part}.{kind}"] = rows
        elif last in _ATTENTION:
            value = tensor.flatten(1) if last == "proj" and kind == "weight" else tensor
            found[f"{_attention(units[unit])}.{_ATTENTION[last]}.{kind}"] = value
        elif last in _BLOCK:
            found[f"{units[unit]}.{_BLOCK[last]}.{kind}"] = tensor
        else:
            found[f"{_OUTSIDE.get(module, units.get(module))}.{kind}"] = tensor
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _attention(unit: str) -> str:
    return unit.replace(".resnets.", ".attentions.")


def _units(shape: UNetShape, side: int) -> dict[str, str]:
    """Our blocks by the names there, where resampling ends a level and does not begin the next."""
    names = [f"{side >> level}x{side >> level}" for level in range(len(shape.widths))]
    last = len(names) - 1
    units = {
        f"enc.{names[0]}_conv": "conv_in",
        f"dec.{names[-1]}_in0": "mid_block.resnets.0",
        f"dec.{names[-1]}_in1": "mid_block.resnets.1",
    }
    for level, name in enumerate(names):
        for block in range(shape.blocks + 1):
            units[f"enc.{name}_block{block}"] = f"down_blocks.{level}.resnets.{block}"
            units[f"dec.{name}_block{block}"] = f"up_blocks.{last - level}.resnets.{block}"
        if level:
            units[f"enc.{name}_down"] = f"down_blocks.{level - 1}.downsamplers.0"
            units[f"dec.{names[level - 1]}_up"] = f"up_blocks.{last - level}.upsamplers.0"
    return units


def _scheduler(diffusers: Any, recipe: Recipe, process: DiscretePreconditioningConfig) -> Any:
    """Its `DDPMScheduler` of our process.

    Raises:
        TesseraError: it has no such process.
    """
    if process.spacing or (process.rescale_timesteps and process.timesteps != 1000):
        refuse(recipe, _NAME, "its schedulers number the steps of a process otherwise "
               "(preconditioning.spacing, preconditioning.rescale_timesteps)")  # fmt: skip
    betas = noise_betas(process.schedule, process.timesteps)
    cosine = process.schedule == "cosine"
    small = getattr(recipe.sampling, "variance", "") == "small"
    learned = getattr(recipe.network, "learn_variance", False)
    return diffusers.DDPMScheduler(
        num_train_timesteps=process.timesteps,
        beta_start=float(betas[0]),
        beta_end=float(betas[-1]),
        beta_schedule="squaredcos_cap_v2" if cosine else "linear",
        prediction_type=_PREDICTIONS[process.prediction],
        variance_type="learned_range" if learned else "fixed_small" if small else "fixed_large",
        clip_sample=recipe.codec.of_pixels,
    )


TARGET = Target(_NAME, _export)

"""The autoencoder of MAR (KL-16, and others of latent diffusion's kind) as one of diffusers.

Its architecture is diffusers' `AutoencoderKL`; only names differ, and attention's 1x1 convolutions
are linear layers there. What the weights say decides what is built: also decoders with attention
on the way up, as latent diffusion's own KL-16 has, which the released MAR code would load without a
word and decode without.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.convert.flat import numbered
from tessera.errors import CheckpointError, require_extra
from tessera.files import atomic_folder
from tessera.pipelines.folder import mismatches

SCALE = 0.2325
"""Of the latents of MAR's KL-16."""

_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def autoencoder_config(state: Mapping[str, Tensor], scale: float = SCALE) -> dict[str, Any]:
    """The configuration of diffusers' `AutoencoderKL` that tensors under the released names fit.

    Args:
        scale: of the latents.

    Raises:
        CheckpointError: they are those of something else.
    """
    try:
        levels = numbered(state, r"encoder\.down\.(\d+)\.")
        widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
        blocks = numbered(state, r"encoder\.down\.0\.block\.(\d+)\.")
        latent, channels = (
            state["post_quant_conv.weight"].shape[0],
            state["encoder.conv_in.weight"].shape[1],
        )
        if not levels or not blocks:
            raise KeyError("encoder.down")
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"these tensors are not those of a KL autoencoder of latent diffusion's kind ({error})"
        ) from error

    def attends(part: str, level: int) -> str:
        return "Attn" if f"{part}.{level}.attn.0.q.weight" in state else ""

    return {
        "in_channels": channels,
        "out_channels": channels,
        "latent_channels": latent,
        "block_out_channels": widths,
        "layers_per_block": blocks,
        "down_block_types": [
            f"{attends('encoder.down', i)}DownEncoderBlock2D" for i in range(levels)
        ],
        "up_block_types": [
            f"{attends('decoder.up', i)}UpDecoderBlock2D" for i in reversed(range(levels))
        ],
        "act_fn": "silu",
        "norm_num_groups": 32,
        "sample_size": 16 * 2 ** (levels - 1),
        "scaling_factor": scale,
    }


def diffusers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of diffusers, those of attention as it wants them."""
    levels = numbered(state, r"decoder\.up\.(\d+)\.")
    return dict(_renamed(name, tensor, levels) for name, tensor in state.items())


def _renamed(name: str, tensor: Tensor, levels: int) -> tuple[str, Tensor]:
    new = re.sub(r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
    new = new.replace(".mid.attn_1.", ".mid_block.attentions.0.")
    new = re.sub(
        r"decoder\.up\.(\d{1,5})\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.", new
    )
    new = re.sub(r"encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", new)
    new = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", new)
    new = re.sub(r"\.attn\.(\d+)\.", r".attentions.\1.", new)
    new = new.replace(".downsample.", ".downsamplers.0.").replace(".upsample.", ".upsamplers.0.")
    new = new.replace("norm_out", "conv_norm_out").replace("nin_shortcut", "conv_shortcut")
    if ".attentions." not in new:
        return new, tensor
    *head, layer, kind = new.split(".")
    tensor = tensor[:, :, 0, 0] if tensor.shape[2:] == (1, 1) else tensor
    return ".".join([*head, _ATTENTION.get(layer, layer), kind]), tensor


def build_autoencoder(state: Mapping[str, Tensor], scale: float = SCALE) -> Any:
    """diffusers' `AutoencoderKL` of tensors under the released names.

    Args:
        scale: of the latents.

    Raises:
        CheckpointError: the tensors are not those of such an autoencoder; some are missing, left
            over or of another shape.
    """
    diffusers = require_extra("diffusers", "latents", "the autoencoder")
    config = autoencoder_config(state, scale)
    try:
        with torch.device("meta"):  # its sizes may be those that nothing but a name claims
            vae = diffusers.AutoencoderKL(**config)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"diffusers builds no such autoencoder ({error})") from error
    # Copies, for diffusers writes no tensors that share their numbers.
    renamed = diffusers_names(state)
    found = {name: t.to(torch.float32, copy=True) for name, t in renamed.items()}
    if problems := mismatches(found, vae.state_dict()):
        raise CheckpointError(
            "the autoencoder's tensors, by the names of diffusers, do not fit it: "
            + "; ".join(problems)
        )
    vae.load_state_dict(found, strict=True, assign=True)
    return vae


def save_autoencoder(vae: Any, folder: Path) -> None:
    """Write an autoencoder as a folder that `codec.model` may name, whole or not at all.

    Args:
        vae: of `build_autoencoder`.
        folder: must not exist.
    """
    with atomic_folder(folder) as part:
        vae.save_pretrained(part, safe_serialization=True)

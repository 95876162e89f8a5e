"""From images back to the latents that a model makes them of (DDIM backwards)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.conditioning import NO_CLASS, Conditioning
from tessera.diffusion.denoiser import Denoiser
from tessera.errors import TesseraError
from tessera.images import from_uint8
from tessera.pipelines.options import (
    Label,
    Precision,
    autocast,
    check_low_res,
    choose_labels,
    choose_sampler,
)
from tessera.recipes.schema import DdimSampler
from tessera.sampling.ddpm import encode_ddim

if TYPE_CHECKING:
    from tessera.pipelines.pipeline import Pipeline


def encode(
    pipe: Pipeline,
    images: NDArray[np.uint8],
    labels: Label | Iterable[Label] | None = None,
    *,
    low_res: NDArray[np.uint8] | None = None,
    batch: int = 64,
    precision: Precision = "fp32",
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    guide: Pipeline | Denoiser | None = None,
    **options: Any,
) -> Tensor:
    """See `Pipeline.encode`."""
    section = choose_sampler(pipe.recipe.sampling, {**options, "sampler": "ddim"})
    assert isinstance(section, DdimSampler)
    if section.eta > 0:
        raise TesseraError(
            f"eta={section.eta:g}: only DDIM without noise can be gone backwards; set eta=0"
        )
    check_low_res(pipe.recipe, low_res)
    if labels is None and pipe.denoiser.num_classes:
        labels = NO_CLASS
    count = len(images)
    classes = choose_labels(labels, range(count), pipe.denoiser.num_classes, pipe.class_names)
    denoiser = pipe.guided(guidance, guidance_interval, guide)
    pipe.codec.prepare()
    _check_images(images, pipe.codec.image_shape(pipe.recipe.shape))
    sampler = section.model_dump(exclude={"kind", "eta"})
    parts: list[Tensor] = []
    for rows in np.array_split(np.arange(count), math.ceil(count / batch)):
        x = pipe.codec.encode_mean(_on(images[rows], pipe.device))
        cond = Conditioning(None if classes is None else torch.from_numpy(classes[rows]))
        if low_res is not None:
            small = _on(low_res[rows % len(low_res)], pipe.device)
            cond = replace(cond, image=from_uint8(small))
        with autocast(pipe.device, precision):
            *_, last = encode_ddim(denoiser, x, cond.to(pipe.device), **sampler)
        parts.append(last.x.to("cpu", torch.float32))
    return torch.cat(parts)


def _on(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """[N, H, W, C] to [N, C, H, W] on `device`."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2)


def _check_images(images: NDArray[np.uint8], shape: tuple[int, int, int]) -> None:
    channels, height, width = shape
    if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels) or not len(images):
        raise TesseraError(
            f"images of shape {images.shape}, {images.dtype}: this model encodes uint8 images "
            f"[N, {height}, {width}, {channels}]"
        )

"""Bits per dimension: the variational bound on the likelihood that a model gives real images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.variational import Bound, prior_terms
from tessera.errors import TesseraError
from tessera.images import from_uint8
from tessera.metrics.classifier import LabelledImages
from tessera.metrics.images import batches
from tessera.randomness import AddressedDraws
from tessera.sampling.ddpm import visited
from tessera.sampling.levels import process_levels


@dataclass(frozen=True)
class Bits:
    """The bound of B images over the N steps of a process, from the cleanest to the noisiest.

    Attributes:
        vb: terms of the bound in bits per dimension, [B, N].
        mse: mean squared error of the estimate of the image, [B, N].
        noise_mse: that of the noise, [B, N].
        prior: the last term, about noise alone, [B].
    """

    vb: Tensor
    mse: Tensor
    noise_mse: Tensor
    prior: Tensor

    @property
    def total(self) -> Tensor:
        """Bits per dimension, [B]."""
        return self.vb.sum(dim=1) + self.prior


@torch.no_grad()
def bits_per_dimension(
    denoiser: Denoiser,
    x: Tensor,
    cond: Conditioning,
    noise: Callable[[int], Tensor],
    *,
    steps: str = "",
    noise_schedule: str | None = None,
    clip: bool = True,
) -> Bits:
    """The bound for images x [B, C, H, W] in model space; one evaluation a step.

    Experts are asked each at the levels that they own.

    Args:
        noise: step to standard normal noise like x; asked from the noisiest step down.
        steps, noise_schedule: see `process_levels`.
        clip: cut the estimates to [-1, 1].
    """
    levels = process_levels(denoiser, steps=steps, noise_schedule=noise_schedule)
    process, denoiser = visited(denoiser, levels)
    bound = Bound(process, x.device)
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    for step in reversed(range(len(process))):
        sigma = float(process.sigmas[step])
        n = noise(step).to(x.device)
        z = x.to(torch.float64) + sigma * n
        posterior = denoiser(z, torch.full((len(x),), sigma, dtype=torch.float64), cond)
        estimate = posterior.mean.clamp(-1, 1) if clip else posterior.mean
        index = torch.full((len(x),), step, dtype=torch.int64, device=x.device)
        columns.append(
            (
                bound.terms(index, x, estimate, posterior.log_variance),
                (estimate - x).square().mean(dim=(1, 2, 3)),
                ((z - estimate) / sigma - n).square().mean(dim=(1, 2, 3)),
            )
        )
    vb, mse, noise_mse = (torch.stack(parts[::-1], dim=1) for parts in zip(*columns, strict=True))
    return Bits(vb, mse, noise_mse, prior_terms(process, x))


def dataset_bits(
    denoiser: Denoiser,
    data: LabelledImages,
    count: int,
    *,
    batch: int = 16,
    seed: int = 0,
    device: torch.device | str = "cpu",
    steps: str = "",
    noise_schedule: str | None = None,
    clip: bool = True,
    low_resolution: int | None = None,
    advance: Callable[[float], object] = lambda _: None,
) -> Bits:
    """The bound for the first images of a set; their noise does not depend on the batch size.

    Args:
        advance: called with the number of images that are done.
        batch, seed, device: how, with which noise, and where.
        steps, noise_schedule, clip: see `bits_per_dimension`.
        low_resolution: side of the small images that the model enlarges: the averaged pixels of the
            large ones, as in training.

    Raises:
        TesseraError: the images are not those of the model.
    """
    if tuple(data.shape) != tuple(denoiser.shape):
        raise TesseraError(
            f"the images have shape {tuple(data.shape)} (channels, height, width), the model's "
            f"{tuple(denoiser.shape)}. Convert them with: tessera data convert"
        )
    labels = None if data.labels is None or not denoiser.num_classes else data.labels
    parts: list[Bits] = []
    for indices, images in batches(data, np.arange(count), batch):
        draws = AddressedDraws(seed, torch.from_numpy(indices))
        x = from_uint8(images)
        small = None if low_resolution is None else F.adaptive_avg_pool2d(x, low_resolution)
        cond = Conditioning(
            None if labels is None else torch.from_numpy(labels[indices]), image=small
        )

        def noise(step: int, draws: AddressedDraws = draws) -> Tensor:
            return draws.normal(f"nll.{step}", *denoiser.shape)

        bits = bits_per_dimension(
            denoiser, x.to(device), cond.to(device), noise,
            steps=steps, noise_schedule=noise_schedule, clip=clip,
        )  # fmt: skip
        parts.append(Bits(*(t.cpu() for t in (bits.vb, bits.mse, bits.noise_mse, bits.prior))))
        advance(len(images))
    return Bits(*(torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Bits)))

"""Energies of real images under an energy model: which it finds likely, and which strange.

The energy at noise level σ is V √(1 + σ²) / σ, whose gradient by the noisy image z is minus the
score: that of a perfect model is -log p(z; σ) in nats, up to a constant of the noise level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tessera.conditioning import Conditioning
from tessera.data.codec import Codec
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.energy import energy
from tessera.errors import TesseraError
from tessera.metrics.classifier import LabelledImages
from tessera.metrics.images import batches
from tessera.randomness import AddressedDraws


@dataclass(frozen=True)
class Energies:
    """Of N images at S noise levels.

    Attributes:
        sigmas: the noise levels.
        values: float64 [N, S], in nats; comparable within a column only.
    """

    sigmas: tuple[float, ...]
    values: NDArray[np.float64]

    def standardised(self, reference: Energies | None = None) -> NDArray[np.float64]:
        """One number an image, [N]: the mean over noise levels of how many standard deviations its
        energy lies above the mean of `reference`, by default of these images."""
        known = (reference or self).values
        spread = known.std(axis=0)
        distance = (self.values - known.mean(axis=0)) / np.where(spread > 0, spread, 1)
        mean: NDArray[np.float64] = distance.mean(axis=1)
        return mean


@torch.no_grad()
def image_energies(
    denoiser: Denoiser,
    data: LabelledImages,
    indices: NDArray[np.int64],
    sigmas: Sequence[float],
    codec: Codec,
    *,
    labels: NDArray[np.int64] | None = None,
    repeats: int = 1,
    batch: int = 32,
    seed: int = 0,
    device: torch.device | str = "cpu",
    advance: Callable[[float], object] = lambda _: None,
) -> Energies:
    """Energies of images of a set, each with noise of its own that no batch changes.

    Args:
        indices: of the images in the set, [N].
        sigmas: noise levels, positive.
        codec: takes images to model space; of latents, their mean.
        labels: classes of all images of the set; None for none.
        repeats: draws of noise over which an energy is averaged.
        batch, seed, device: how, with which noise, and where.
        advance: called with the number of images that are done.

    Raises:
        TesseraError: the model has no energy, or the images are not of its shape.

    Example:
        >>> rows = np.arange(100)  # doctest: +SKIP
        >>> image_energies(pipe.denoiser, photos, rows, [0.1, 1], pipe.codec)  # doctest: +SKIP
    """
    denoiser.check_energy()
    shape = codec.image_shape(denoiser.shape)
    if tuple(data.shape) != tuple(shape):
        raise TesseraError(
            f"the images of {data.name} have shape {tuple(data.shape)} (channels, height, width), "
            f"the model's {tuple(shape)}. Convert them with: tessera data convert"
        )
    parts = []
    for chunk, images in batches(data, indices, batch):
        draws = AddressedDraws(seed, torch.from_numpy(chunk))
        x = codec.encode_mean(images.to(device))
        cond = Conditioning(None if labels is None else torch.from_numpy(labels[chunk]))
        values = np.zeros((len(images), len(sigmas)))
        for column, sigma in enumerate(sigmas):
            level = torch.full((len(x),), sigma, dtype=torch.float64)
            total = torch.zeros(len(x), dtype=torch.float64)
            for repeat in range(repeats):
                noise = draws.normal(f"energy.{column}.{repeat}", *denoiser.shape).to(x)
                found = energy(denoiser, x + sigma * noise, level, cond.to(device))
                total += found.cpu().to(torch.float64)
            values[:, column] = total.numpy() / repeats * (1 + sigma**2) ** 0.5 / sigma
        parts.append(values)
        advance(len(images))
    return Energies(tuple(sigmas), np.concatenate(parts))


def auroc(usual: NDArray[np.float64], strange: NDArray[np.float64]) -> float:
    """How well a number tells two sets apart, 0 to 1: the share of pairs in which that of `strange`
    is the larger, ties for a half (area under the ROC curve).

    Example:
        >>> auroc(np.array([1.0, 2.0]), np.array([2.0, 3.0]))
        0.875
    """
    known = np.sort(usual)
    below = np.searchsorted(known, strange, "left") + np.searchsorted(known, strange, "right")
    return float(below.mean() / (2 * len(known)))

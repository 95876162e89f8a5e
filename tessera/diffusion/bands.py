"""Views by noise level: what of an image a denoiser sees, and is trained on, in each band of σ.

The mean of f x f pixels with white noise of level σ has white noise of level σ / f. So above some
noise level one network estimates the small image, at a cost lower by f², and is told the scale by
the coordinates: those of the full grid at a lower density. At low noise far pixels say nothing, and
crops suffice that see a halo which the loss does not.
"""

from __future__ import annotations

import bisect
import copy
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tessera.conditioning import Conditioning, full_grid
from tessera.diffusion.denoiser import Denoiser, Posterior, by_owner
from tessera.diffusion.means import block_means
from tessera.diffusion.objectives import DenoisingObjective, Reduction
from tessera.diffusion.preconditioning import Preconditioned
from tessera.randomness import Draws


@dataclass(frozen=True)
class Band:
    """Noise levels, and what is seen there.

    Attributes:
        sigma_min, sigma_max: sigma_min <= σ < sigma_max.
        factor: side of the blocks of pixels whose means are seen; 1: the pixels themselves.
        crop: side of the crops that are trained on, pixels; None: whole images.
        halo: pixels at a crop's border, but not at the image's, that are seen without any loss.
        bricks: of a stack so many run, the first; None: all.
    """

    sigma_min: float = 0.0
    sigma_max: float = math.inf
    factor: int = 1
    crop: int | None = None
    halo: int = 0
    bricks: int | None = None

    def __str__(self) -> str:
        if self.factor > 1:
            seen = f"means of {self.factor}x{self.factor} pixels"
        elif self.crop is None:
            seen = "the whole image"
        else:
            seen = f"crops of {self.crop} with a halo of {self.halo}"
        return seen if self.bricks is None else f"{seen}, by bricks 1 to {self.bricks}"


class BandedDenoiser(Preconditioned):
    """A denoiser that does at each noise level no more than is needed there.

    From a threshold on its network sees the means of blocks (`Preconditioned.of_means`); in some
    bands it is the first bricks of a stack. To samplers, guidance and windows it is a denoiser as
    any other.

    Args:
        whole: of all pixels by the whole network, at any noise level; where means are seen, its
            network takes coordinates.
        bands: rising, the first from 0. Their crops are no matter of a denoiser.
    """

    def __init__(self, whole: Preconditioned, bands: Sequence[Band]) -> None:
        super().__init__(whole.network, whole.preconditioning, whole.shape, whole.num_classes)
        self.bands = tuple(bands)
        self._starts = [band.sigma_min for band in bands[1:]]
        # No submodules: their network is one of this one already.
        stack: Any = whole.network
        self._by_bricks: dict[int | None, Preconditioned] = {None: whole}
        for n in {band.bricks for band in bands} - {None}:
            self._by_bricks[n] = whole.around(stack.prefix(n))
        self._fixed: int | None = None

    def around(self, network: nn.Module) -> Self:
        other = type(self)(self._by_bricks[None].around(network), self.bands)
        other._fixed = self._fixed
        return other

    def shortened(self) -> list[nn.Module]:
        return [part.network for n, part in self._by_bricks.items() if n is not None]

    def begin(self, images: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        self._by_bricks[None].begin(images)

    def for_step(self, sigma: float) -> Self:
        """With the band that a step begins in for all of it; reads nothing from the device."""
        step = copy.copy(self)
        step._fixed = bisect.bisect_right(self._starts, sigma)
        return step

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        """As every denoiser; free of synchronisation where `sigma` is on the CPU."""
        if self._fixed is not None:
            return self._at(self._fixed, z, sigma, cond)
        sigma = sigma.reshape(-1)
        starts = torch.tensor(self._starts, dtype=sigma.dtype, device=sigma.device)
        return by_owner(torch.bucketize(sigma, starts, right=True), z, sigma, cond, self._at)

    def _at(self, index: int, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        band, factor = self.bands[index], self.bands[index].factor
        denoiser = self._by_bricks[band.bricks]
        if factor == 1:
            posterior: Posterior = denoiser(z, sigma, cond)
            return posterior
        coords = cond.coords
        if coords is None:
            height, width = z.shape[-2:]
            coords = full_grid((height, width), z.device).expand(len(z), -1, -1, -1)
        small = replace(cond, coords=block_means(coords, factor))
        return denoiser.of_means(z.to(torch.float32), sigma, small, factor)


class BandedObjective:
    """A denoising objective, in each step at the noise levels of one band.

    Which one the step's draws say (`Draws.band`); without any, it is the plain objective. The loss
    of a crop is weighted such that its mean over all crops is that of the whole image.

    Args:
        objective: of all noise levels.
        bands: from low noise to high.
        size: height and width of whole images.
    """

    reduction: ClassVar[Reduction] = "sum"

    def __init__(
        self, objective: DenoisingObjective, bands: Sequence[Band], size: tuple[int, int]
    ) -> None:
        self.objective, self.bands, self._size = objective, tuple(bands), size
        self._by_bricks = [_within(objective, band) for band in bands]

    def probabilities(self) -> list[float]:
        """The share of the objective's noise levels in each band."""
        starts = torch.tensor([b.sigma_min for b in self.bands[1:]], dtype=torch.float64)
        inner = self.objective.share_below(starts).clamp(0, 1).tolist() if len(starts) else []
        below = [0.0, *inner, 1.0]
        return [high - low for low, high in itertools.pairwise(below)]

    def __call__(
        self, denoiser: Denoiser, x: Tensor, cond: Conditioning, draws: Draws
    ) -> dict[str, Tensor]:
        """Loss terms as those of a `DenoisingObjective`, of x [B, C, H, W] or crops of it."""
        if draws.band is None:
            return self.objective(denoiser, x, cond, draws)
        band, part = self.bands[draws.band], self._by_bricks[draws.band]
        sigma = part.sigma(draws)
        denoiser = denoiser.for_step(band.sigma_min)
        error = part.elementwise(denoiser, x, cond, draws, sigma)
        if band.crop is not None and cond.coords is not None:
            error = error * crop_weights(cond.coords, band.halo, self._size)[:, None]
        quartile = (4 * self.objective.share_below(sigma)).long().clamp(0, 3)
        return {"loss": error.sum(dim=(1, 2, 3)), "quartile": quartile}


def _within(objective: DenoisingObjective, band: Band) -> DenoisingObjective:
    """The objective at the noise levels of a band, of those that are its own."""
    low = max(objective.sigma_range[0], band.sigma_min)
    high = min(objective.sigma_range[1], band.sigma_max)
    return replace(objective, sigma_range=(low, high))


def crop_weights(coords: Tensor, halo: int, size: tuple[int, int]) -> Tensor:
    """Weights [B, s, s] of a random crop's pixels, of which all crops together count each once.

    0 in the halo, which ends where the image does; elsewhere the number of places that a crop can
    have over the number of those in which the pixel counts.

    Args:
        coords: of the crops, [B, 2, s, s].
        halo: pixels; crops are larger than two of them.
        size: height and width of whole images.
    """
    sides = zip((1, 0), size, coords.shape[-2:], strict=True)
    rows, columns = (
        _axis_weights(coords[:, channel, 0, 0], halo, length, crop)
        for channel, length, crop in sides
    )
    return rows[:, :, None] * columns[:, None, :]


def _axis_weights(first: Tensor, halo: int, length: int, crop: int) -> Tensor:
    """Weights [B, s] along an axis of crops whose first pixels are at coordinates [B]."""
    places = length - crop + 1
    offsets = torch.arange(places, device=first.device)[:, None]
    steps = torch.arange(crop, device=first.device)
    from_begin, to_end = steps >= halo, steps < crop - halo
    counts = (from_begin | (offsets == 0)) & (to_end | (offsets == places - 1))
    pixels = (offsets + steps).reshape(-1)
    total = torch.zeros(length, device=first.device)
    total.index_add_(0, pixels, counts.reshape(-1).to(total.dtype))
    weights = counts * places / total[pixels].reshape(places, crop)
    chosen = ((first + 1) / 2 * (length - 1)).round().long()
    return weights[chosen.clamp(0, places - 1)]

"""What of the clean images a step trains on."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.conditioning import coordinates
from tessera.data.loader import StepPlan
from tessera.diffusion.bands import Band
from tessera.diffusion.objectives import Reduction
from tessera.errors import RecipeError
from tessera.randomness import Draws, derive_seed


@dataclass(frozen=True)
class PatchSize:
    """One of the sizes of patches.

    Attributes:
        side: in pixels of model space.
        probability: that a step has this size.
        multiplier: images of such a step, as a multiple of the batch.
    """

    side: int
    probability: float
    multiplier: int


class FullView:
    """Trains on whole images.

    Args:
        batch: size of the global batch.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def plan(self, images_seen: int) -> StepPlan:
        """The step that follows after `images_seen` images."""
        return StepPlan(images_seen, self.batch)

    def shares(self) -> list[tuple[StepPlan, float]]:
        """The kinds of steps, and the share of the steps that each has."""
        return [(StepPlan(0, self.batch), 1.0)]

    def apply(self, x: Tensor, draws: Draws, plan: StepPlan) -> tuple[Tensor, Tensor | None]:
        """The part of x [B, C, H, W] to train on, and its coordinates [B, 2, H, W] if it is one."""
        return x, None

    def loss_weight(self, plan: StepPlan) -> float:
        """Factor of the step's loss."""
        return 1.0


class PatchView:
    """Trains on random crops of one size per step, mostly small ones (Wang et al. 2023).

    Which size a step has is a function of the seed and the images seen, so that all processes and
    all rounds of a step agree.

    Args:
        resolution: side R of the full images.
        batch: images of a step of multiplier 1.
        sizes: from small to large, of positive probability together.
        seed: of the run.
        progressive: go from small to large patches, each for its share of the run, instead of
            drawing a size at each step.
        total_images: length of the run.
        per_pixel: let a patch count as much as a full image; otherwise each of its pixels counts
            as much as one of a full image.
        reduction: how the objective's loss comes from those of pixels. Of a sum, that of a patch
            is weighted by (R / s)² or 1; of a mean, by 1 or (s / R)².
        align: first rows and columns of patches are multiples of it; so must all sides be.

    Raises:
        RecipeError: patches or images whose sides are no multiples of `align`.
    """

    def __init__(
        self,
        resolution: int,
        batch: int,
        sizes: Sequence[PatchSize],
        *,
        seed: int,
        progressive: bool = False,
        total_images: int = 0,
        per_pixel: bool = False,
        reduction: Reduction = "sum",
        align: int = 1,
    ) -> None:
        self.resolution = resolution
        self.batch = batch
        self.sizes = [size for size in sizes if size.probability > 0]
        self._align = align
        for side in (resolution, *(size.side for size in self.sizes)):
            if side % align:
                raise RecipeError(
                    f"the objective works in blocks of {align}x{align} pixels, and {side} is no "
                    "multiple of that: choose other sides of images and patches (view.sizes)"
                )
        self._ends = list(itertools.accumulate(size.probability for size in self.sizes))
        self._seed = seed
        self._total = total_images if progressive else None
        self._per_pixel, self._reduction = per_pixel, reduction

    def size(self, images_seen: int) -> PatchSize:
        """The size of the patches of the step that follows after `images_seen` images."""
        if self._total is None:
            position = derive_seed(self._seed, "patch", images_seen) / 2**63
        else:
            position = images_seen / self._total
        # The last one also takes what rounding leaves of the sum, and images beyond the run's end.
        pairs = zip(self.sizes[:-1], self._ends, strict=False)
        return next((size for size, end in pairs if end > position), self.sizes[-1])

    def plan(self, images_seen: int) -> StepPlan:
        """The step that follows after `images_seen` images."""
        size = self.size(images_seen)
        return StepPlan(images_seen, self.batch * size.multiplier, size.side)

    def shares(self) -> list[tuple[StepPlan, float]]:
        """The kinds of steps, and the share of the steps that each has."""
        return [
            (StepPlan(0, self.batch * size.multiplier, size.side), size.probability)
            for size in self.sizes
        ]

    def apply(self, x: Tensor, draws: Draws, plan: StepPlan) -> tuple[Tensor, Tensor | None]:
        """One patch of each image x [B, C, R, R] and its coordinates [B, 2, s, s].

        Where the patch is the image, nothing is drawn, and its coordinates are None. Patches are
        channels-last in memory.
        """
        side, align = plan.patch, self._align
        if side is None or side == self.resolution:
            return x, None
        return random_crop(x, draws, side, align)

    def loss_weight(self, plan: StepPlan) -> float:
        """Factor of the step's loss."""
        share = 1.0 if plan.patch is None else (plan.patch / self.resolution) ** 2
        if self._reduction == "mean":
            return 1.0 if self._per_pixel else share
        return 1 / share if self._per_pixel else 1.0


@dataclass(frozen=True)
class BandShare:
    """A band of noise levels and what of the training it gets.

    Attributes:
        band: its noise levels, and what is seen there.
        share: of the steps.
        multiplier: images of such a step, as a multiple of the batch.
        weight: factor of such a step's loss.
    """

    band: Band
    share: float
    multiplier: int
    weight: float


class BandsView:
    """Trains each step on one band of the noise levels, and on what is worth seeing there.

    Which band a step has is a function of the seed and the images seen, so that all processes and
    all rounds of a step agree. The images come whole or as crops; of bands of coarse images the
    denoiser takes the means itself.

    Args:
        batch: images of a step of multiplier 1.
        parts: the bands from low noise to high; their shares add up to 1.
        seed: of the run.
    """

    def __init__(self, batch: int, parts: Sequence[BandShare], *, seed: int) -> None:
        self.batch, self.parts = batch, tuple(parts)
        self._ends = list(itertools.accumulate(part.share for part in parts))
        # The last one also takes what rounding leaves of the sum.
        self._last = max(index for index, part in enumerate(parts) if part.share > 0)
        self._seed = seed

    def plan(self, images_seen: int) -> StepPlan:
        """The step that follows after `images_seen` images."""
        position = derive_seed(self._seed, "band", images_seen) / 2**63
        return self._step(images_seen, min(bisect.bisect_right(self._ends, position), self._last))

    def shares(self) -> list[tuple[StepPlan, float]]:
        """The kinds of steps, and the share of the steps that each has."""
        return [(self._step(0, i), part.share) for i, part in enumerate(self.parts) if part.share]

    def _step(self, images_seen: int, index: int) -> StepPlan:
        part = self.parts[index]
        return StepPlan(images_seen, self.batch * part.multiplier, part.band.crop, index)

    def apply(self, x: Tensor, draws: Draws, plan: StepPlan) -> tuple[Tensor, Tensor | None]:
        """The images x [B, C, H, W], or one crop of each and its coordinates, as `PatchView`."""
        return (x, None) if plan.patch is None else random_crop(x, draws, plan.patch)

    def loss_weight(self, plan: StepPlan) -> float:
        """Factor of the step's loss."""
        return 1.0 if plan.band is None else self.parts[plan.band].weight


View = FullView | PatchView | BandsView


def random_crop(x: Tensor, draws: Draws, side: int, align: int = 1) -> tuple[Tensor, Tensor]:
    """A random square of each image x [B, C, R, R], and its coordinates [B, 2, s, s].

    Draws "patch.row" and "patch.column", its place in units of `align` pixels.
    """
    places = (x.shape[-1] - side) // align + 1
    rows = align * draws.integers("patch.row", places)
    columns = align * draws.integers("patch.column", places)
    return crop(x, rows, columns, side), patch_coordinates(rows, columns, side, x.shape[-1])


def crop(x: Tensor, rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """Squares of x [B, C, H, W] whose first rows and columns are given, int64 [B]: [B, C, s, s].

    One gather of any dtype, which reads the pixels of the patches only.
    """
    steps = torch.arange(side, device=x.device)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    patch = x[image, :, rows[:, None, None] + steps[:, None], columns[:, None, None] + steps]
    return patch.permute(0, 3, 1, 2)


def patch_coordinates(rows: Tensor, columns: Tensor, side: int, resolution: int) -> Tensor:
    """Coordinates of the patches that `crop` cuts from images of side R, float32 [B, 2, s, s]."""
    steps = torch.arange(side, device=rows.device)
    return coordinates(columns[:, None] + steps, rows[:, None] + steps, (resolution, resolution))


def patch_sizes(
    resolution: int,
    sides: Sequence[int],
    real_p: float,
    probabilities: Sequence[float] | None = None,
    multipliers: Sequence[int] | None = None,
) -> list[PatchSize]:
    """Patch sizes with the published probabilities and batches, or with others.

    Args:
        resolution: side R of the full images.
        sides: from small to large. Published: R/4, R/2, R for pixels, R/2, R for latents.
        real_p: p, the probability of the last side. The others get 2/5 (1 - p) and 3/5 (1 - p),
            or 1 - p if there is but one more.
        probabilities: in place of those.
        multipliers: of the batch; by default R / s, as many images as a full one has columns of
            patches.
    """
    if probabilities is None:
        if len(sides) > 3:
            raise ValueError(f"{len(sides)} sizes of patches need probabilities")
        smaller = ((), (1.0,), (0.4, 0.6))[len(sides) - 1]
        probabilities = [*(share * (1 - real_p) for share in smaller), real_p if smaller else 1.0]
    if multipliers is None:
        multipliers = [max(1, resolution // side) for side in sides]
    triples = zip(sides, probabilities, multipliers, strict=True)
    return [PatchSize(side, probability, k) for side, probability, k in triples]

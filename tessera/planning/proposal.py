"""From what a set of images lets a denoiser know to keys of recipes, each with its reason."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from tessera.diffusion.bands import Band
from tessera.errors import DataError
from tessera.planning.linear import LARGEST_CROP, smallest_sigma
from tessera.planning.sample import Reading
from tessera.planning.spectrum import measure_set
from tessera.planning.study import DataStudy, Sight, sampling_range, study_set, training_levels

BOUND = 1.03
"""Error that is worth its savings, relative to that of the full image."""

_OF_BRICKS = 1.10  # likewise of a local brick, which others follow
_WORTH = 0.05  # share of the training that an expert of its own is worth
_LEGO_DEPTH = 2


@dataclass(frozen=True)
class Advice:
    """One thing that is proposed, in words, and why."""

    name: str
    value: str
    why: str


@dataclass(frozen=True)
class DataProposal:
    """What a set of images asks for.

    Attributes:
        bound: relative error that is accepted.
        bands: from low noise to high, without gaps, from 0 to infinity.
        advice: rows of a table.
        recipe: keys of any recipe with EDM's objective, nested.
        others: keys of other recipes by what they are for: "bands" (views by noise level),
            "experts", "relay" (of its second stage), "lego".
    """

    bound: float
    bands: tuple[Band, ...]
    advice: tuple[Advice, ...]
    recipe: Mapping[str, Any]
    others: Mapping[str, Mapping[str, Any]]


def bands_for(
    path: str | os.PathLike[str],
    reading: Reading = Reading(),
    *,
    bound: float = BOUND,
    crops: bool = True,
    largest: int | None = None,
) -> tuple[Band, ...]:
    """The bands that a set of images or latents asks for, from low noise to high.

    Args:
        path: what `data.path` may be, or any collection of images.
        reading: how it is brought to what is trained on.
        bound: error that is accepted, relative to that of the full image; above 1.
        crops: propose crops at low noise; otherwise whole images.
        largest: factor of coarse images that may be proposed; None: any.

    Raises:
        DataError: nothing to read, or a bound that nothing can keep.

    Example:
        >>> bands_for("cifar10.zip")[-1].factor  # doctest: +SKIP
        4
    """
    study = study_set(measure_set(path, reading))
    return planned_bands(study, bound, crops=crops, largest=largest)


def planned_bands(
    study: DataStudy, bound: float = BOUND, *, crops: bool = True, largest: int | None = None
) -> tuple[Band, ...]:
    """The bands of a set that was looked at; see `bands_for`."""
    if not 1 < bound < math.inf:
        raise DataError(f"`bound={bound:g}`: errors are relative to the full image's; above 1")
    starts = {1: 0.0, **coarse_from(study, bound)}
    starts = {f: start for f, start in starts.items() if largest is None or f <= largest}
    # A coarser view that holds from where a finer one does leaves nothing to that.
    factors = [f for f in starts if all(starts[f] < starts[g] for g in starts if g > f)]
    ends = [*(starts[factor] for factor in factors[1:]), math.inf]
    bands = [Band(starts[factor], end, factor) for factor, end in zip(factors, ends, strict=True)]
    first = bands[0]
    if crops and first.factor == 1 and (best := _best_crop(study, first.sigma_max, bound)):
        bands[0] = Band(0.0, first.sigma_max, 1, *best)
    return tuple(bands)


def coarse_from(study: DataStudy, bound: float) -> dict[int, float]:
    """For factors of coarse images, the σ from which on their errors stay within a bound."""
    found: dict[int, float] = {}
    for sight, seen in study.curves.items():
        if sight.crop is None:
            start = smallest_sigma(seen.relative, study.sigmas, bound)
            if start is None:
                break
            found[sight.factor] = 0.0 if start <= study.sigmas[0] else float(f"{start:.3g}")
    return found


def _best_crop(study: DataStudy, below: float, bound: float) -> tuple[int, int] | None:
    """Side and halo of the largest crop that keeps a bound below a noise level, if there is any."""
    side, inside = min(study.measured.shape[1:]), study.sigmas < below
    for crop in (side // 2, side // 4):
        if crop < 8 or side % crop:
            continue
        # Of larger ones no less is known of pixels inside of the same halo.
        looked_at = min(crop, LARGEST_CROP)
        for sight, seen in sorted(study.curves.items(), key=lambda item: item[0].halo):
            if sight.crop == looked_at and np.max(seen.relative[inside], initial=1) <= bound:
                return crop, sight.halo
    return None


def propose(study: DataStudy, bound: float = BOUND) -> DataProposal:
    """Everything that is proposed for a set.

    Raises:
        DataError: a bound that nothing can keep.
    """
    parts = [
        _sampling(study), _spread(study), _training(study), _patches(study, bound),
        _experts(study, bound), _relay(study, bound), _lego(study),
    ]  # fmt: skip
    bands = planned_bands(study, bound)
    if len(bands) > 1:
        parts.append(_Part((), {"view": {"kind": "bands", "bands": band_sections(bands)}}, "bands"))
    shown = [_of_band(study, band, bound) for band in bands]
    advice = [*itertools.chain(*(part.advice for part in parts[:3])), *shown]
    advice += itertools.chain(*(part.advice for part in parts[3:]))
    recipe: dict[str, Any] = {}
    others: dict[str, dict[str, Any]] = {}
    for part in parts:
        target = recipe if part.of is None else others.setdefault(part.of, {})
        for section, keys in part.keys.items():
            if isinstance(keys, dict):
                target.setdefault(section, {}).update(keys)
            else:
                target[section] = keys
    return DataProposal(bound, bands, tuple(advice), recipe, others)


def band_sections(bands: Sequence[Band]) -> list[dict[str, float]]:
    """Bands as a recipe's view has them, without defaults."""
    sections = []
    for band in bands:
        keys = {"factor": band.factor, "crop": band.crop or 0, "halo": band.halo}
        defaults = {"factor": 1, "crop": 0, "halo": 0}
        section: dict[str, float] = {k: v for k, v in keys.items() if v != defaults[k]}
        if math.isfinite(band.sigma_max):
            section["below"] = band.sigma_max
        sections.append(section)
    return sections


@dataclass(frozen=True)
class _Part:
    """Keys of recipes (of all, or of those that `of` names), and how they are told."""

    advice: tuple[Advice, ...]
    keys: Mapping[str, Any]
    of: str | None = None


def _two(value: float) -> float:
    """Rounded to two digits."""
    return float(f"{value:.2g}")


def _sampling(study: DataStudy) -> _Part:
    measured = study.measured
    low, high = map(_two, sampling_range(measured.covariance, of_pixels=measured.of_pixels))
    step = "rounding to 8 bits" if measured.of_pixels else "a 250th of the spread"
    why = f"{step}; noise whose difference from images under it is 0.01 nats"
    told = Advice("noise levels", f"{low:g} to {high:g}", why)
    return _Part((told,), {"sampling": {"kind": "edm", "sigma_min": low, "sigma_max": high}})


def _spread(study: DataStudy) -> _Part:
    std = float(f"{study.measured.covariance.std:.3g}")
    told = Advice("spread of the data", f"{std:g}", "standard deviation about the mean image")
    edm = {"kind": "edm", "sigma_data": std}
    return _Part((told,), {"preconditioning": edm, "objective": dict(edm)})


def _training(study: DataStudy) -> _Part:
    mean, std = (float(f"{value:.2f}") for value in training_levels(study.measured.covariance))
    told = Advice(
        "training levels",
        f"ln σ = {mean:g} ± {std:g}",
        f"around {math.exp(mean):.2g} an estimate can gain most on what a network begins with",
    )
    return _Part((told,), {"objective": {"p_mean": mean, "p_std": std}})


def _of_band(study: DataStudy, band: Band, bound: float) -> Advice:
    name = f"σ {band.sigma_min:g} to {band.sigma_max:g}".replace("to inf", "on")
    inside = (study.sigmas >= band.sigma_min) & (study.sigmas < band.sigma_max)
    share = f"{study.weights[inside].sum():.0%} of the training levels"
    if band.factor > 1:
        cost = f"1/{band.factor**2} of the pixels"
        return Advice(name, str(band), f"error within {bound:g} from here on; {cost}; {share}")
    if band.crop is None:
        return Advice(name, str(band), f"less costs more than {bound:g} of the error; {share}")
    height, width = study.measured.shape[1:]
    counted = _counted(band.crop, band.halo, height) * _counted(band.crop, band.halo, width)
    why = f"error within {bound:g}; {counted:.0%} of a crop's pixels count; {share}"
    return Advice(name, str(band), why)


def _counted(crop: int, halo: int, length: int) -> float:
    """Share of a crop's rows that lie inside of the halo or at the image's edge, on average."""
    inner = 2 * (length - crop) / (length - crop + 1)  # of both ends, those within the image
    return (crop - halo * inner) / crop


def _patches(study: DataStudy, bound: float) -> _Part:
    """What today's patches, without halo, cost."""
    side = min(study.measured.shape[1:])
    crop = side // 2
    seen = study.curves.get(Sight(crop=min(crop, LARGEST_CROP)))
    if seen is None or side % 2:
        told = Advice("patches", "none", "the images are small")
        return _Part((told,), {"view": {"kind": "full"}})
    mean = float(study.weights @ seen.relative)
    if mean > bound:
        why = f"without a halo crops of {crop} cost {mean - 1:.0%} over the training levels"
        return _Part((Advice("patches", "none", why),), {"view": {"kind": "full"}})
    why = f"crops of {crop} cost {mean - 1:.1%} over the training levels, also without a halo"
    told = Advice("patches", f"{crop} and {side}", why)
    return _Part((told,), {"view": {"kind": "patches", "sizes": [crop, side]}})


def _experts(study: DataStudy, bound: float) -> _Part:
    mean, _ = training_levels(study.measured.covariance)
    split, why = math.exp(mean), "half of the training levels for each of two"
    start = coarse_from(study, bound).get(2)
    if start:
        share = float(study.weights[study.sigmas >= start].sum())
        if _WORTH <= share <= 1 - _WORTH:
            split, why = start, f"where half size suffices, for {share:.0%} of the training levels"
    ratio = _two(split**-2)
    told = Advice("experts", f"split at σ = {split:.3g}", f"{why} (SNR {ratio:g})")
    return _Part((told,), {"snr_splits": [ratio], "expert": 0}, "experts")


def _relay(study: DataStudy, bound: float) -> _Part:
    starts = coarse_from(study, bound)
    block = max((factor for factor in starts if factor <= 4 and starts[factor]), default=None)
    if block is None:
        told = Advice("relay", "none", f"no smaller image keeps the error within {bound:g}")
        return _Part((told,), {})
    mean, std = training_levels(study.measured.covariance)
    share = NormalDist(mean, std).cdf(math.log(starts[block]))
    share = min(max(float(f"{share:.2f}"), 0.5), 0.99)
    told = Advice(
        "relay",
        f"from 1/{block} of the size at σ = {starts[block]:g}",
        "from there on the small stage knows as much",
    )
    levels = {"p_mean": float(f"{mean:.2f}"), "p_std": float(f"{std:.2f}")}
    objective = {"kind": "blur", "block": block, "prob_length": share, **levels}
    objective["sigma_data"] = float(f"{study.measured.covariance.std:.3g}")
    sampling = {"kind": "relay", "sigma_start": starts[block]}
    return _Part((told,), {"objective": objective, "sampling": sampling}, "relay")


def _lego(study: DataStudy) -> _Part:
    side = min(study.measured.shape[1:])
    mean, _ = training_levels(study.measured.covariance)
    low = study.sigmas <= math.exp(mean)
    weights = study.weights[low] / study.weights[low].sum()
    for size in sorted({sight.crop for sight in study.curves if sight.crop}):
        if side % size or size == side:
            continue
        relative = study.curves[Sight(crop=size)].relative
        if float(weights @ relative[low]) <= _OF_BRICKS:
            above = np.flatnonzero(relative > _OF_BRICKS)
            until = _two(float(study.sigmas[above[0]])) if len(above) else math.inf
            bricks = [{"size": s, "patch": 2, "depth": _LEGO_DEPTH} for s in (size, side)]
            keys: dict[str, Any] = {"network": {"kind": "lego", "bricks": bricks}}
            why = f"of {size} pixels a brick knows nearly as much at low noise"
            if until < math.inf:
                why = f"{why}; below {until:g} it suffices"
                keys["view"] = {"kind": "bands", "bands": [{"below": until, "bricks": 1}, {}]}
            told = Advice("LEGO bricks", f"{size} and {side}", why)
            return _Part((told,), keys, "lego")
    told = Advice("LEGO bricks", f"{side} alone", "smaller ones know much less at all noise levels")
    return _Part((told,), {})

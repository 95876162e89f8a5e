"""A proposal as rows of text, and as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tessera.planning.proposal import DataProposal
from tessera.planning.study import TABLE_SIGMAS, DataStudy

HEAD = ("what it sees", *(f"σ {sigma:g}" for sigma in TABLE_SIGMAS))
"""Names of the columns of `error_rows`."""


def error_rows(study: DataStudy) -> list[list[str]]:
    """Errors relative to the full image's, a row for each thing that is seen."""
    return [
        [str(sight), *(_ratio(value) for value in values)]
        for sight, values in study.table().items()
    ]


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 1.095 else f"{value:.2f}"


def looked_at(study: DataStudy) -> str:
    """What was looked at and how, in sentences."""
    measured = study.measured
    channels, height, width = measured.shape
    kind = "images" if measured.of_pixels else "latents"
    size = f"{height}x{width}" + (f", {channels} channels" if channels != 1 else "")
    planes = "luma" if measured.planes == "luma" else "all channels"
    how = (
        "from their covariance"
        if measured.exact
        else "from the power spectrum of their DCT, as if they were stationary"
    )
    text = (
        f"{measured.images:,} of {measured.total:,} {kind} of {measured.name}, {size}: {planes}, "
        f"{how}."
    )
    if measured.skipped:
        text += f" {len(measured.skipped):,} cannot be used: {measured.skipped[0]}"
    return text


def as_plain(study: DataStudy, proposal: DataProposal) -> dict[str, Any]:
    """Everything as plain data that JSON can hold; infinity is null."""
    measured = study.measured
    return {
        "data": {
            "name": measured.name,
            "shape": list(measured.shape),
            "images": measured.images,
            "total": measured.total,
            "skipped": len(measured.skipped),
            "planes": measured.planes,
            "exact": measured.exact,
            "std": measured.covariance.std,
        },
        "bound": proposal.bound,
        "sigmas": study.sigmas.tolist(),
        "curves": [
            {
                "sees": str(sight),
                "factor": sight.factor,
                "crop": sight.crop,
                "halo": sight.halo,
                "relative": seen.relative.tolist(),
                "relative_to_image": seen.relative_to_image.tolist(),
            }
            for sight, seen in study.curves.items()
        ],
        "table": {
            "sigmas": list(TABLE_SIGMAS),
            "relative": {str(sight): row.tolist() for sight, row in study.table().items()},
        },
        "bands": [
            {
                "sigma_min": band.sigma_min,
                "sigma_max": band.sigma_max if math.isfinite(band.sigma_max) else None,
                "factor": band.factor,
                "crop": band.crop,
                "halo": band.halo,
            }
            for band in proposal.bands
        ],
        "advice": [
            {"name": advice.name, "value": advice.value, "why": advice.why}
            for advice in proposal.advice
        ],
        "recipe": dict(proposal.recipe),
        "others": {name: dict(keys) for name, keys in proposal.others.items()},
    }


def commented(lines: Sequence[str]) -> str:
    """Lines as comments of a YAML file."""
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)

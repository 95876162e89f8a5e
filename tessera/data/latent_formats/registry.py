"""Which formats of latents there are, and which of them is at a path or meant by its name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.data.codec import sample_posterior
from tessera.data.latent_formats.base import LatentFormat, LatentInfo, LatentPlan, Precision
from tessera.data.latent_formats.lego import LEGO
from tessera.data.latent_formats.npz import NPZ
from tessera.data.latent_formats.packed import PACKED
from tessera.data.latent_formats.ptshard import PTSHARD
from tessera.errors import DataError
from tessera.files import check_free
from tessera.randomness import AddressedDraws

FORMATS: tuple[LatentFormat, ...] = (PACKED, LEGO, NPZ, PTSHARD)
NAMES = tuple(form.name for form in FORMATS)


def find_format(path: Path) -> LatentFormat | None:
    """The format of the latents at `path`; None if there are none."""
    return next((form for form in FORMATS if form.recognise(path)), None)


def choose_format(path: Path, name: str | None, overwrite: bool) -> LatentFormat:
    """The format of a set that is to be written.

    Args:
        path: where; without a `name` its ending tells the format.
        name: of the format.
        overwrite: replace what is at `path`, if it is a set of latents.

    Raises:
        DataError: no such format, it has files of other names, or something is in the way.
    """
    ending = path.suffix.lower()
    fitting = [form for form in FORMATS if (form.name == name if name else ending in form.endings)]
    if not fitting:
        if name:
            raise DataError(f"format {name!r}: choose one of {', '.join(NAMES)}")
        raise DataError(
            f"{path}: a packed set of latents is one file; end its name in .safetensors, or choose "
            f"another format of latents: {', '.join(NAMES)}"
        )
    form = fitting[0]
    foreign = {e for other in FORMATS for e in other.endings} - set(form.endings)
    if ending not in form.endings and (not form.folder or ending in foreign):
        names = [*form.endings, *(["nothing, for a folder"] if form.folder else [])]
        raise DataError(f"{path}: the name of a {form.title} should end in {' or '.join(names)}")
    occupied = any(path.iterdir()) if path.is_dir() else path.exists()
    if occupied:
        check_free(path, overwrite)
    if path.is_dir() and ending in form.endings:
        raise DataError(f"{path}: there is a folder of that name; choose another one")
    if occupied and path.is_dir() and find_format(path) is None:
        raise DataError(
            f"{path} holds something else than a set of latents, which would be lost; choose "
            "another name"
        )
    return form


def choose_precision(
    path: Path, form: LatentFormat, wanted: Precision | None, default: Precision
) -> Precision:
    """The precision of the numbers of a set that is to be written.

    Raises:
        DataError: another one is wanted than the format holds.
    """
    if form.precision is None:
        return wanted or default
    if wanted not in (None, form.precision):
        raise DataError(
            f"{path}: a {form.title} holds {form.precision}; leave out --precision {wanted}"
        )
    return form.precision


class PutRows(Protocol):
    """Writes rows of a set from number `first` on; in order, each once."""

    def __call__(
        self, first: int, rows: Tensor, mirrored: Tensor | None = None, *, drawn: bool = False
    ) -> None: ...


@contextlib.contextmanager
def latent_sink(
    path: Path, form: LatentFormat, plan: LatentPlan, seed: int = 0
) -> Iterator[PutRows]:
    """A function that writes rows of a new set, which appears at `path` when the block ends well.

    It takes moments [n, 2 C, h, w], or, `drawn`, samples [n, C, h, w] in model space, whichever of
    them the format holds. Rows of mirrored images are given where the plan says that there are any.

    Args:
        seed: of the draws, addressed by the row, where a format holds samples of moments.

    Raises:
        DataError: the format cannot hold such a set.
    """
    check_mirrored(path, form, plan.mirrored)
    with form.create(path, plan) as writer:

        def put(
            first: int, rows: Tensor, mirrored: Tensor | None = None, *, drawn: bool = False
        ) -> None:
            def stored(values: Tensor) -> NDArray[np.float32]:
                if drawn and not form.drawn:
                    values = as_moments(values, plan.info)
                elif form.drawn and not drawn:
                    values = as_samples(values, plan.info, seed, first)
                return values.to("cpu", torch.float32).numpy()

            writer.put(first, stored(rows), None if mirrored is None else stored(mirrored))

        yield put


def check_mirrored(path: Path, form: LatentFormat, mirrored: bool) -> None:
    """Raise if a format cannot do with, or without, rows of the mirrored images.

    Raises:
        DataError: it cannot.
    """
    if form.mirrored and not mirrored:
        raise DataError(
            f"{path}: a {form.title} holds those of the mirrored images, too; encode the images "
            "with --xflip"
        )
    if form.drawn and mirrored:
        raise DataError(
            f"{path}: a {form.title} has no place for those of mirrored images; leave out --xflip"
        )


def as_moments(samples: Tensor, info: LatentInfo) -> Tensor:
    """Moments [n, 2 C, h, w] without variance of samples [n, C, h, w] in model space.

    The log-variance is -inf, so that every draw is the sample.

    Raises:
        DataError: the scale of the samples is not known.
    """
    scale, shift = _scaling(info)
    mean = samples.to(torch.float32) / scale + shift
    return torch.cat([mean, torch.full_like(mean, -torch.inf)], dim=1)


def as_samples(moments: Tensor, info: LatentInfo, seed: int, first: int) -> Tensor:
    """One sample in model space of each row, [n, C, h, w], of moments [n, 2 C, h, w].

    Args:
        seed: of the draws "latent".
        first: number of the first row, by which the draws are addressed.

    Raises:
        DataError: the scale of the samples is not known.
    """
    scale, shift = _scaling(info)
    draws = AddressedDraws(seed, torch.arange(first, first + len(moments)))
    return sample_posterior(moments, draws, scale, shift)


def _scaling(info: LatentInfo) -> tuple[float, float]:
    if info.scale is None:
        raise DataError(
            "the set does not say how its latents are scaled: give --scale, which is 0.18215 for "
            "the VAEs of Stable Diffusion and 0.2325 for KL-16 (and --shift, if there is one)"
        )
    return info.scale, info.shift or 0.0

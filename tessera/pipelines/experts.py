"""Pipelines of several experts, put together from pipelines that were trained one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Self

from torch import Tensor

from tessera.diffusion.experts import Experts, sigma_range
from tessera.errors import CheckpointError, TesseraError
from tessera.pipelines import counting
from tessera.pipelines import folder as folders
from tessera.pipelines.base import Pipeline
from tessera.pipelines.codecs import saved_codec
from tessera.pipelines.diffusion import DiffusionPipeline


class ExpertsPipeline(DiffusionPipeline):
    """Several models as one; each makes the noise levels that it owns.

    It samples by the first expert's recipe.

    Args:
        pipes: from the cleanest noise levels to the noisiest.
        thresholds: of the signal-to-noise ratio between them, falling.

    Raises:
        TesseraError: see `Experts`.
    """

    kind = "experts"
    of_model = None

    def __init__(self, pipes: Sequence[DiffusionPipeline], thresholds: Sequence[float]) -> None:
        first = pipes[0]
        checksums = "".join(pipe.checksum or "" for pipe in pipes)
        update = {"expert": None, "snr_splits": tuple(thresholds)}
        super().__init__(
            first.recipe.model_copy(update=update),
            Experts([pipe.denoiser for pipe in pipes], thresholds),
            images_seen=sum(pipe.images_seen for pipe in pipes),
            class_names=first.class_names,
            ema=first.ema,
            emas=first.emas,
            checksum=hashlib.sha256(checksums.encode()).hexdigest() if checksums else None,
            parts=first.own_parts,
        )
        self.keep_codec(saved_codec(pipes))
        self.pipes = tuple(pipes)

    @classmethod
    def open(cls, opened: folders.Opened) -> Self:
        pipes = [*opened.parts.values()]
        if not pipes or not all(isinstance(pipe, DiffusionPipeline) for pipe in pipes):
            raise CheckpointError(
                f"{opened.folder} names no experts. Save or download the pipeline again"
            )
        return cls(pipes, opened.recipe.snr_splits)

    def parts(self) -> dict[str, folders.WritePart]:
        def writer(pipe: DiffusionPipeline) -> folders.WritePart:
            return "pipeline", lambda folder: pipe.save(folder, codec=False)

        return {f"expert-{index}": writer(pipe) for index, pipe in enumerate(self.pipes)}

    def _states(self) -> dict[str, Mapping[str, Tensor]]:
        return {}

    def _training(self) -> counting.Training:
        return counting.together([pipe._training() for pipe in self.pipes])


def assemble(pipes: Sequence[Pipeline], thresholds: Sequence[float] = ()) -> ExpertsPipeline:
    """Experts from pipelines, from the cleanest to the noisiest.

    Args:
        thresholds: of the signal-to-noise ratio; by default those that the experts were trained
            with. Models that were trained for all noise levels become experts only if they are
            given.

    Raises:
        TesseraError: the pipelines are not the experts of these thresholds, in this order.
    """
    if not thresholds:
        thresholds = _trained_thresholds(pipes)
    own = [pipe for pipe in pipes if isinstance(pipe, DiffusionPipeline)]
    if len(own) < len(pipes):
        raise TesseraError("only denoisers can be experts: name pipelines of kind diffusion")
    for place, pipe in enumerate(pipes):
        recipe = pipe.recipe
        if recipe.expert is None:
            continue
        if recipe.expert != place:
            raise TesseraError(
                f"pipeline number {place} ({recipe.name}) was trained as expert {recipe.expert}. "
                "Name the experts from the cleanest, 0, to the noisiest"
            )
        known = sigma_range(recipe.snr_splits, place)
        if place > len(thresholds):
            break  # `Experts` says that there are too many
        low, high = sigma_range(thresholds, place)
        if not known[0] <= low < high <= known[1]:
            raise TesseraError(
                f"pipeline number {place} ({recipe.name}) was trained for noise levels "
                f"{_interval(known)}, and these thresholds would give it {_interval((low, high))}. "
                "Leave them out to use those that the experts were trained with"
            )
    return ExpertsPipeline(own, thresholds)


def _trained_thresholds(pipes: Sequence[Pipeline]) -> tuple[float, ...]:
    """Those that all pipelines were trained with, which must all be experts."""
    for place, pipe in enumerate(pipes):
        if pipe.recipe.expert is None:
            raise TesseraError(
                f"pipeline number {place} ({pipe.recipe.name}) is no expert: it was trained for "
                "all noise levels. To use it as one all the same, give the SNR thresholds "
                "(--thresholds)"
            )
    trained = {pipe.recipe.snr_splits for pipe in pipes}
    if len(trained) != 1:
        raise TesseraError(
            "the experts were trained with different SNR thresholds; say which to use"
        )
    return trained.pop()


def _interval(levels: tuple[float, float]) -> str:
    return f"{levels[0]:.4g} to {levels[1]:.4g}"

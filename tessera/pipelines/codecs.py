"""The autoencoders of pipelines that are put together."""

from __future__ import annotations

from collections.abc import Sequence

from tessera.data.codec import Codec
from tessera.pipelines.base import Pipeline


def saved_codec(pipes: Sequence[Pipeline]) -> Codec | None:
    """That of the first of some pipelines which is saved along with it; None if none is."""
    return next((pipe.codec for pipe in pipes if pipe.saves_codec), None)

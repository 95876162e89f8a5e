"""What of the clean images a step trains on."""

from __future__ import annotations

from torch import Tensor

from tessera.data.loader import StepPlan
from tessera.randomness import Draws


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

    def apply(self, x: Tensor, draws: Draws, plan: StepPlan) -> tuple[Tensor, Tensor | None]:
        """The part of x [B, C, H, W] to train on, and its coordinates [B, 2, H, W] if it is one."""
        return x, None

"""Training from images alone: what they are, what is chosen for them, and the run to its report."""

from tessera.starting.begin import PlannedRun, plan_training
from tessera.starting.trained import TrainedRun

__all__ = ["PlannedRun", "TrainedRun", "plan_training"]

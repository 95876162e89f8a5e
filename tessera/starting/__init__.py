"""From a folder of photographs to a trained model: a look at them, a plan, a run."""

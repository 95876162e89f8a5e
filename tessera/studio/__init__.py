"""A page in the browser over a folder of runs and pipelines: watch, steer, compare, sample, start."""

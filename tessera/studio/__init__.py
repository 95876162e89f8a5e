"""A page in the browser over a folder of runs and pipelines."""

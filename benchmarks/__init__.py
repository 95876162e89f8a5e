"""Side-by-side timings; ratios within one run are what counts, never absolute times."""

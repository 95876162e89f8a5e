"""Measurements behind the methods' claims; each takes long and is run by hand."""

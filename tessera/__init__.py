"""Train, sample and score image diffusion models at a fraction of the usual compute."""

from tessera._version import __version__

__all__ = ["__version__"]

"""Train, sample and score image diffusion models at a fraction of the usual compute."""

from typing import TYPE_CHECKING, Any

from tessera._version import __version__

if TYPE_CHECKING:
    from tessera.pipelines.base import Pipeline
    from tessera.pipelines.loading import load

__all__ = ["Pipeline", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # PyTorch is imported by the first use, not by `import tessera`.
    if name in ("Pipeline", "load"):
        from tessera.pipelines import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

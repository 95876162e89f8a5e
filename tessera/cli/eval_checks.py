"""What the commands of `tessera eval` refuse before they begin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from tessera.errors import TesseraError

if TYPE_CHECKING:
    from tessera.metrics.conventions import Convention, Metric
    from tessera.metrics.features import Features


def check_destination(
    out: Path, what: str, *, overwrite: bool, source: str | Path | None = None
) -> None:
    """Refuse a file to write that is no NPZ file, or is there already.

    Args:
        what: is written, for the message.
        overwrite: whether a file may be replaced; never `source`, which is read.

    Raises:
        TesseraError: the message says what to do.
    """
    if out.suffix != ".npz":
        raise TesseraError(f"{out}: a {what} file is an NPZ file; give it a name with .npz")
    if out.is_dir():
        raise TesseraError(f"{out} is a folder; give the {what} file another name")
    if out.exists() and source is not None and Path(source).exists() and out.samefile(source):
        raise TesseraError(f"{out}: the {what} file would replace its own source")
    if out.exists() and not overwrite:
        raise TesseraError(f"{out} exists already; choose another name or add --overwrite")


def known_features(name: str) -> Features:
    """The extractor of that name.

    Raises:
        TesseraError: there is none.
    """
    from tessera.metrics.features import FEATURES as KNOWN

    if name not in KNOWN:
        raise TesseraError(f"--features {name!r}: there are {', '.join(KNOWN)}")
    return name


def known_metrics(text: str | None) -> list[Metric] | None:
    """The metrics of a list like `fid,is`; None if none was given.

    Raises:
        TesseraError: one of them is none.
    """
    from tessera.metrics.conventions import METRICS

    if text is None:
        return None
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise TesseraError(f"--metrics {text!r}: there are {', '.join(METRICS)}")
    return cast("list[Metric]", names)


def check_metrics(metrics: list[Metric], features: Features) -> None:
    """Refuse metrics that are not made of these features.

    Raises:
        TesseraError: they need Inception features.
    """
    only = [metric for metric in metrics if metric in ("fid", "sfid", "is")]
    if features != "inception" and only:
        raise TesseraError(
            f"{', '.join(only)} are made of Inception features, not of {features} features; the "
            "distance on other features is called fd"
        )


def check_weights(weights: Path | None, features: Features) -> None:
    """Refuse weights for the classifier, which is trained.

    Raises:
        TesseraError: the features are the classifier's.
    """
    if weights is not None and features == "classifier":
        raise TesseraError(
            "--weights are those of inception or dinov2, but the features here are those of the "
            "in-domain classifier, which is trained on the real images. Leave them out, or name "
            "--features"
        )


def known_convention(name: str) -> Convention | Literal["all"]:
    """The tool of that name.

    Raises:
        TesseraError: there is none.
    """
    from tessera.metrics.conventions import CONVENTIONS

    if name not in (*CONVENTIONS, "all"):
        raise TesseraError(f"--convention {name!r}: there are {', '.join(CONVENTIONS)} and all")
    return cast('Convention | Literal["all"]', name)

"""What each tool of the field computes, by which rule, and what has to be measured for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from tessera.errors import DataError
from tessera.metrics.kid import SIZE

Metric = Literal["fid", "sfid", "is", "kid", "pr", "fd"]
Convention = Literal["edm", "adm", "rdm", "torch-fidelity"]
METRICS: tuple[Metric, ...] = get_args(Metric)
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)

# What each tool computes, and by which rule; the first is the default.
RULES: dict[Metric, dict[Convention, str]] = {
    "fid": {
        "edm": "float64 statistics",
        "adm": "float64 statistics; the tool's float32 mean moves the 7th digit",
        "rdm": "float64 statistics",
        "torch-fidelity": "float64 statistics; the tool's float32 mean moves the 7th digit",
    },
    "sfid": {
        "adm": "7 channels of 17x17 features; float64 statistics",
        "rdm": "7 channels of 17x17 features; float64 statistics",
    },
    "is": {
        "adm": "logits without bias; mean over splits of 5,000 in order",
        "rdm": "logits with bias; mean over splits of 5,000 in order",
        "torch-fidelity": "logits without bias; 10 equal splits, shuffled by seed 2020",
    },
    "kid": {"torch-fidelity": "100 subsets of 1,000, cubic kernel, seed 2020"},
    "pr": {
        "adm": "k = 3, these features, exact distances (the tool: float16)",
        "rdm": "k = 3, these features, exact distances, radii rounded to float32",
        "torch-fidelity": "k = 3, these features (the tool's default: VGG16), exact distances",
    },
    "fd": {"edm": "float64 statistics"},
}

_FEWEST: dict[Metric, int] = {"kid": SIZE, "pr": 4}


@dataclass(frozen=True)
class Result:
    """A score.

    Attributes:
        metric: its short name.
        convention: the tool whose rule it follows.
        values: by name; the first is the score, others belong to it (std, recall).
        rule: the convention in words.
    """

    metric: Metric
    convention: Convention
    values: dict[str, float]
    rule: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Needs:
    """What has to be kept while features are extracted, and how many images it takes at least.

    See `needs`. `recognised`: how many images the classifier takes for their class.
    """

    fewest: int = 2
    moments: bool = False
    spatial_moments: bool = False
    features: bool = False
    spatial: bool = False
    scores: tuple[Convention, ...] = ()
    recognised: bool = False


def chosen(
    metrics: Sequence[Metric], convention: Convention | Literal["all"] | None = None
) -> list[tuple[Metric, Convention]]:
    """Metrics with their conventions: their default one, the given one, or every one.

    Raises:
        DataError: the tool of that name has no such metric.
    """
    pairs: list[tuple[Metric, Convention]] = []
    for metric in metrics:
        known = RULES[metric]
        if convention == "all":
            pairs += [(metric, name) for name in known]
        elif convention is None:
            pairs.append((metric, next(iter(known))))
        elif convention in known:
            pairs.append((metric, convention))
        else:
            raise DataError(
                f"{metric} has no convention {convention!r}: that tool does not compute it. "
                f"It has {', '.join(known)}"
            )
    return pairs


def needs(pairs: Sequence[tuple[Metric, Convention]], *, reference: bool = False) -> Needs:
    """What of the samples (or of the reference) the metrics are computed from."""
    metrics = {metric for metric, _ in pairs}
    return Needs(
        fewest=max((_FEWEST.get(metric, 2) for metric in metrics), default=2),
        moments=bool(metrics & {"fid", "fd"}),
        spatial_moments="sfid" in metrics,
        features=bool(metrics & {"kid", "pr"}),
        scores=() if reference else tuple(c for metric, c in pairs if metric == "is"),
    )


def check_enough(name: str, total: int, wanted: Needs) -> None:
    """Refuse a set too small for a metric, before its features are extracted.

    Raises:
        DataError: it is.
    """
    if total < wanted.fewest:
        metric = next((m for m, n in _FEWEST.items() if n == wanted.fewest), "a score")
        raise DataError(
            f"{name}: {metric} needs at least {wanted.fewest:,} images, there are {total:,}"
        )

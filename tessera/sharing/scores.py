"""Scores for a model card, with their conventions: of a run, or of files of `tessera eval`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.errors import DataError
from tessera.files import read_json
from tessera.metrics.conventions import RULES, chosen
from tessera.recipes.schema import Recipe
from tessera.sharing.portable import last_name
from tessera.training.evaluation import SCORE
from tessera.training.tracking import read_metrics

_PREFIX = "evaluate/"
_CLASSIFIER_RULE = "features of a classifier of the real images; this is not FID"


@dataclass(frozen=True)
class ScoreTable:
    """Scores that were measured together.

    Attributes:
        title: of what, and against what.
        rows: name, value, convention, and its rule in words, for each number.
    """

    title: str
    rows: tuple[tuple[str, str, str, str], ...]


def run_scores(folder: Path, recipe: Recipe, images_seen: int) -> ScoreTable | None:
    """The scores that a run has measured of the pipeline in `folder`; None if there are none.

    Of the last pipeline these are the newest ones that are not of later weights.
    """
    if recipe.evaluate is None:
        return None
    lines = [*_best(folder.parent / SCORE), *_log(folder.parent)]
    lines = [line for line in lines if line.get("images", images_seen + 1) <= images_seen]
    if not lines:
        return None
    line = max(lines, key=lambda line: line["images"])
    config = recipe.evaluate
    reference = config.reference or recipe.data.path
    against = "real images" if reference is None else last_name(reference)
    seen = line["images"]
    when = f"after {seen:,} of them" if seen < images_seen else "of these weights"
    title = (
        f"Measured while training, {when}: {config.images:,} samples against {against}, "
        f"features: {config.features}"
    )
    first = {"pr": "precision"}
    starts = {first.get(metric, metric): (metric, tool) for metric, tool in chosen(config.metrics)}
    rows = []
    for key, value in line.items():
        if key.startswith(_PREFIX) and isinstance(value, int | float):
            name = key.removeprefix(_PREFIX)
            metric, tool = starts.get(name, (None, None))
            rule = "" if metric is None or tool is None else RULES[metric][tool]
            rows.append((name, f"{value:.6g}", tool or "", rule))
    return ScoreTable(title, tuple(rows)) if rows else None


def _best(path: Path) -> Iterator[dict[str, Any]]:
    """The score beside the best pipeline of a run."""
    if path.is_file():
        found = read_json(path)
        if isinstance(found, dict) and isinstance(found.get("images"), int):
            yield found


def _log(run: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's log that hold scores."""
    return (line for line in read_metrics(run) if any(key.startswith(_PREFIX) for key in line))


def read_scores(path: Path) -> ScoreTable:
    """Scores in a file that `tessera eval score --json` printed.

    Raises:
        DataError: there is no such file, or it is another.
    """
    try:
        found = read_json(path)
        return _by_classifier(found) if "fd_classifier" in found else _by_tool(found)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}. {_HOW}") from None
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} holds no scores ({type(error).__name__}: {error}). {_HOW}"
        ) from error


_HOW = "Make one by: tessera eval score SAMPLES REFERENCE --json > scores.json"


def _by_classifier(found: Mapping[str, Any]) -> ScoreTable:
    title = f"{found['n']:,} samples against {found['n_reference']:,} real images"
    rows = [("fd_classifier", f"{found['fd_classifier']:.6g}", "edm", _CLASSIFIER_RULE)]
    if found.get("recognised") is not None:
        rule = f"taken for their class by a classifier that is right on {found['accuracy']:.1%}"
        rows.append(("recognised", f"{found['recognised']:.1%}", "", rule))
    return ScoreTable(title, tuple(rows))


def _by_tool(found: Mapping[str, Any]) -> ScoreTable:
    samples, reference, features = (found[key] for key in ("samples", "reference", "features"))
    count = "an unknown number of" if samples["n"] is None else f"{samples['n']:,}"
    title = f"{count} samples"
    if reference:
        size = "" if reference["n"] is None else f" ({reference['n']:,} images)"
        title += f" against {last_name(reference['name'])}{size}"
    weights = f", weights {features['weights']}" if features["weights"] else ""
    title += f", features: {features['extractor']}{weights}"
    rows = []
    for result in found["results"]:
        for index, (name, value) in enumerate(result["values"].items()):
            tool, rule = (result["convention"], result["rule"]) if index == 0 else ("", "")
            rows.append((str(name), f"{value:.6g}", str(tool), str(rule)))
    return ScoreTable(title, tuple(rows))

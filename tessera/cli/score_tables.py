"""Tables of `tessera eval`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column

from tessera.cli.tables import make_table, print_facts

if TYPE_CHECKING:
    from tessera.metrics.conventions import Result
    from tessera.metrics.evaluate import Score
    from tessera.metrics.formats import Measured
    from tessera.metrics.reference import Reference


def reference_rows(result: Reference) -> list[tuple[str, str]]:
    """What there is to know of a reference with its classifier."""
    facts = result.extractor.facts
    channels, height, width = facts.shape
    task = "quarter turns (no labels)"
    return [
        ("real images", f"{result.statistics.n:,} of {result.name}, {width}x{height}x{channels}"),
        ("features", f"{result.extractor.dim} of the {result.extractor.name}"),
        ("classifier tells apart", f"{facts.outputs} classes" if facts.task == "classes" else task),
        (
            "right on held-out real images",
            f"{facts.accuracy:.1%} of {facts.held_out:,} (chance {1 / facts.outputs:.1%})",
        ),
    ]


def measured_rows(measured: Measured) -> list[tuple[str, str]]:
    """Images and features behind statistics."""
    weights = f", weights {measured.weights}" if measured.weights else ""
    count = "an unknown number" if measured.n is None else f"{measured.n:,}"
    return [
        ("images", f"{count} of {measured.name}"),
        ("features", f"{measured.dim} of {measured.extractor}{weights}"),
    ]


def print_score(result: Score, known: Reference, as_json: bool) -> None:
    """The score by the in-domain classifier, or JSON."""
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
        return
    rows = [("Fréchet distance (in-domain classifier)", f"{result.fd_classifier:.6g}")]
    if result.recognised is not None:
        rows.append(("recognised as their class", f"{result.recognised:.1%}"))
    rows.append(("samples", f"{result.n:,}"))
    print_facts([*rows, *reference_rows(known)], "Score", boxed=True)


def print_results(
    results: list[Result], ours: Measured, theirs: Measured | None, as_json: bool
) -> None:
    """A line for each metric and convention, or JSON."""
    if as_json:
        document = {
            "results": [result.as_dict() for result in results],
            "samples": {"name": ours.name, "n": ours.n},
            "reference": theirs and {"name": theirs.name, "n": theirs.n},
            "features": {"extractor": ours.extractor, "dim": ours.dim, "weights": ours.weights},
        }
        print(json.dumps(document, indent=2))
        return
    table = make_table(
        Column("metric", style="bold"), Column("value"), Column("as"), Column("rule"),
        title="Scores", boxed=True,
    )  # fmt: skip
    for result in results:
        for index, (name, value) in enumerate(result.values.items()):
            first = index == 0
            table.add_row(
                name,
                f"{value:.6g}",
                result.convention if first else "",
                result.rule if first else "",
            )
    Console().print(table)
    rows = [("samples", f"{ours.n:,}" if ours.n else "an unknown number")]
    if theirs is not None:
        rows += [(f"reference {key}", value) for key, value in measured_rows(theirs)]
    print_facts(rows, boxed=True)

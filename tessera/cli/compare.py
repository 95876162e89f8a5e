"""`tessera compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tessera.cli.completing import offer_words

if TYPE_CHECKING:
    from tessera.comparing.arms import Arm


def compare_models(
    words: list[str] = typer.Argument(
        metavar="[KEY=VALUE...] ARM [KEY=VALUE...] ARM...",
        help="Recipes, or folders of runs and pipelines. Changes before the first are of all "
        "recipes, others of the recipe before them.",
        autocompletion=offer_words,
    ),
    minutes: float = typer.Option(10, min=0.01, help="Training time of each recipe."),
    flops: float | None = typer.Option(
        None, min=0, help="TFLOP of training of each recipe, in place of the minutes."
    ),
    trainings: int = typer.Option(
        1, min=1, help="Trainings of each recipe, of as many seeds; means and spread are shown."
    ),
    points: int = typer.Option(4, min=1, help="Scores on the way; they do not count as training."),
    samples: int = typer.Option(500, min=2, help="Images of a score, of the same seeds."),
    sample: list[str] = typer.Option(
        [], metavar="KEY=VALUE", help="Option of sampling, of all; may be repeated."
    ),
    equal_cost: bool = typer.Option(
        False, "--equal-cost", help="Score others also with steps that cost the first's FLOPs."
    ),
    reference: str | None = typer.Option(
        None, help="Images, or a file of `tessera eval reference`. (default: data.path)"
    ),
    out: Path = typer.Option(Path("comparison"), help="Folder of runs, grids, table and page."),
    parallel: bool = typer.Option(
        False, "--parallel", help="Train all at once, each on its share of the cores."
    ),
    batch: int = typer.Option(100, min=1, help="Images sampled at once."),
    seed: int = typer.Option(0, help="Of the trainings."),
    device: str | None = typer.Option(None, help="cpu, cuda, ... (default: the fastest)"),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """Compare recipes at equal training time, and trained models, by the same samples.

    tessera compare data.path=cifar10.zip cifar10-small cifar10-small-patch --minutes 20

    tessera compare runs/a runs/b --samples 2000

    Repeated after an interruption, it goes on with the arms that are missing.
    """
    import json

    from tessera import distributed
    from tessera.cli.sample import parse_options, plain_warnings
    from tessera.cli.tables import print_rows
    from tessera.comparing import report
    from tessera.comparing.arms import CompareSettings
    from tessera.comparing.compare import compare_arms
    from tessera.files import atomic_file

    settings = CompareSettings(
        minutes=minutes,
        flops=None if flops is None else 1e12 * flops,
        trainings=trainings,
        equal_cost=equal_cost,
        points=points,
        samples=samples,
        batch=batch,
        seed=seed,
        sampling=parse_options(sample),
        reference=reference,
    )
    with distributed.session(device), plain_warnings():
        made = compare_arms(arms_of(words), out, settings, parallel=parallel)
    with atomic_file(out / "comparison.html") as file:
        file.write(report.comparison_page(made).encode())
    if as_json:
        print(json.dumps(made.as_dict(), indent=2, ensure_ascii=False))
        return
    print_rows(report.HEAD, report.table_rows(made))
    print(report.in_sentences(made))
    print(f"page: {out / 'comparison.html'}")


def arms_of(words: list[str]) -> list[Arm]:
    """What is compared, as the words of a command name it.

    Raises:
        TesseraError: there is nothing to compare.
    """
    from tessera.comparing.arms import Arm
    from tessera.errors import TesseraError
    from tessera.files import user_path

    shared: list[str] = []
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if "=" not in word:
            found.append((word, []))
        elif found:
            found[-1][1].append(word)
        else:
            shared.append(word)
    if len(found) < 2:
        raise TesseraError(
            "name at least two recipes, runs or pipelines to compare; KEY=VALUE is a change of the "
            "recipe before it"
        )
    arms = []
    for source, own in found:
        name = " ".join([Path(source).stem if "/" in source else source, *own])
        is_folder = user_path(source).is_dir()
        arms.append(Arm(name, source, tuple(own if is_folder else [*shared, *own])))
    return arms

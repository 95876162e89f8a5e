"""`tessera cost`: what a recipe costs, before anything is trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Column

from tessera.cli.parts import OwnParts, import_parts
from tessera.cli.tables import make_table
from tessera.errors import TesseraError

if TYPE_CHECKING:
    from tessera.pipelines.base import Pipeline
    from tessera.pipelines.counting import Cost
    from tessera.recipes.parts import Parts
    from tessera.recipes.schema import Recipe
    from tessera.training.forecast import Forecast


def cost(
    recipe: str = typer.Argument(
        help="A shipped recipe, a .yaml or .json file, or the folder of a pipeline or run."
    ),
    overrides: list[str] = typer.Argument(
        None, metavar="KEY=VALUE", help="Changes of a recipe, such as training.batch=64."
    ),
    sample: list[str] = typer.Option(
        [],
        "--sample",
        metavar="KEY=VALUE",
        help="An option of sampling, as of `tessera sample`, like guidance=1.5; may be repeated.",
    ),
    probe: bool = typer.Option(
        False, "--probe", help="Train for five seconds to tell the time and memory needed here."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print plain numbers as JSON."),
    own_parts: OwnParts = None,
) -> None:
    """Count parameters, FLOPs and memory of a recipe, without training anything, or of a model.

    With --probe, also what a recipe's training takes on this machine: from data.path if that is
    set, from blank images otherwise.
    """
    from tessera.cli.sample import parse_options
    from tessera.pipelines.loading import estimate
    from tessera.pipelines.stream import is_pipeline
    from tessera.recipes.loading import load_recipe, shipped

    parts, given = import_parts(own_parts), parse_options(sample)
    forecast: Forecast | None = None
    stages: Mapping[str, Cost] = {}
    if recipe not in shipped() and is_pipeline(Path(recipe)):
        pipe = _open(recipe, parts, [*(overrides or ()), *(["--probe"] if probe else [])])
        loaded, result, stages = pipe.recipe, pipe.cost(**given), pipe.costs(**given)
    else:
        loaded = load_recipe(recipe, overrides or (), parts)
        # First, because counting needs memory, too.
        forecast = _probe(loaded, parts, show=not as_json) if probe else None
        result = estimate(loaded, parts, **given)
    if as_json:
        _print_json(result, stages, forecast)
        return
    rows = [*_rows(loaded, result, given, several=bool(stages)), *_stage_rows(stages)]
    if forecast is not None:
        blank = "" if loaded.data.path or parts.dataset else "from blank images: "
        here = forecast.rows()
        rows += [("", "", ""), *((name, "", blank + text) for name, text in here.items())]
    table = make_table(
        Column(style="cyan", no_wrap=True), Column(justify="right", no_wrap=True),
        Column(style="dim"), title=f"[bold]{loaded.name}[/]  {loaded.description}",
    )  # fmt: skip
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _open(folder: str, parts: Parts, refused: Sequence[str]) -> Pipeline:
    """The pipeline of a folder.

    Args:
        refused: what was asked for beside it, that only recipes take.
    """
    from tessera.pipelines.loading import load

    if refused:
        raise TesseraError(
            f"{folder} is a trained model, and {', '.join(refused)} would be of a recipe. Give "
            "options of sampling as --sample KEY=VALUE, or name the recipe"
        )
    return load(folder, device="cpu", parts=parts)


def _print_json(result: Cost, stages: Mapping[str, Cost], forecast: Forecast | None) -> None:
    from tessera import distributed

    def plain(cost: Cost) -> dict[str, Any]:
        return dataclasses.asdict(cost) | {"train_bytes": cost.train_bytes}

    values = plain(result)
    if stages:
        values["stages"] = {name: plain(cost) for name, cost in stages.items()}
    if forecast is not None:
        values["probe"] = dataclasses.asdict(forecast)
    if distributed.is_main():
        print(json.dumps(values))


def _rows(
    recipe: Recipe, result: Cost, given: Mapping[str, Any], *, several: bool
) -> list[tuple[str, str, str]]:
    """Names, numbers and what they are of; `several`: of models in a row."""
    from tessera import distributed
    from tessera.precision import resolve
    from tessera.progress import human

    training = recipe.training
    asked = f" with {', '.join(f'{k}={v}' for k, v in given.items())}" if given else ""
    whole = result.evaluations * result.forward_flops
    skipped = 0.0 if several else 1 - result.sample_flops / whole
    asked += f", {skipped:.1%} skipped" if skipped >= 0.0005 else ""
    per_image = human(result.activation_bytes / result.micro_batch, "B")
    precision = resolve(training.precision, distributed.device())
    kept = f"{result.micro_batch:,} images x {per_image}, {precision}, estimated"
    largest = "of the largest stage" if several else ""
    return [
        ("parameters", human(result.parameters), "of all" if several else recipe.network.kind),
        ("", "", ""),
        (
            "one evaluation",
            human(result.forward_flops, "FLOP"),
            largest or "the network, one image",
        ),
        ("training, an image", human(result.train_flops, "FLOP"), "forward and backward"),
        ("training, all", human(result.run_flops, "FLOP"), f"{human(result.images)} images"),
        (
            "sampling, an image",
            human(result.sample_flops, "FLOP"),
            f"{result.evaluations} evaluations{asked}",
        ),
        ("", "", ""),
        ("weights", human(result.weight_bytes, "B"), largest or "float32"),
        ("gradients", human(result.gradient_bytes, "B"), ""),
        ("optimizer", human(result.optimizer_bytes, "B"), recipe.optimizer.kind),
        ("averages", human(result.ema_bytes, "B"), f"EMA, {len(recipe.ema)}x"),
        ("activations", human(result.activation_bytes, "B"), kept),
        (
            "memory in training",
            human(result.train_bytes, "B"),
            "these, on one device; less with micro_batch",
        ),
    ]


def _stage_rows(stages: Mapping[str, Cost]) -> list[tuple[str, str, str]]:
    """What each of several models in a row has of the sum: a line each."""
    from tessera.progress import human

    if not stages:
        return []
    lines = [
        (
            name,
            human(cost.sample_flops, "FLOP"),
            f"{cost.evaluations} evaluations, {human(cost.parameters)} parameters, training "
            f"{human(cost.run_flops, 'FLOP')}",
        )
        for name, cost in stages.items()
    ]
    return [("", "", ""), ("sampling, by stage", "", ""), *lines]


def _probe(recipe: Recipe, parts: Parts, *, show: bool) -> Forecast:
    """What a run of the recipe takes here, from its beginning to its end."""
    from tessera import distributed
    from tessera.training.feed import Feed
    from tessera.training.probe import blank_images, measure
    from tessera.training.validation import validation_images

    with distributed.session() as device:
        real = recipe.data.path is not None or parts.dataset is not None
        feed = Feed(recipe, device, parts, None if real else blank_images(recipe))
        images = validation_images(recipe, device, feed, parts) if real else None
        validated = 0 if images is None else images.count
        timings = measure(recipe, feed, device, parts=parts, validated=validated, show=show)
        return timings.forecast(recipe, feed.view, 0)

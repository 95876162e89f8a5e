"""`tessera cost`: what a recipe costs, before anything is trained."""

from __future__ import annotations

import dataclasses
import json

import typer
from rich.console import Console
from rich.table import Table


def cost(
    recipe: str = typer.Argument(help="A shipped recipe, or a .yaml or .json file."),
    overrides: list[str] = typer.Argument(
        None, metavar="KEY=VALUE", help="Changes, such as training.batch=64."
    ),
    guidance: float = typer.Option(1.0, help="Guidance weight while sampling; 1 is none."),
    guidance_interval: str | None = typer.Option(
        None, metavar="LOW,HIGH", help="Noise levels where guidance acts."
    ),
    skip: float = typer.Option(
        0.0, min=0, max=1, help="Share of the sampler's steps without the last brick (LEGO)."
    ),
    bricks: str | None = typer.Option(
        None, metavar="LOW-HIGH:N", help="Instead: run N bricks at these noise levels."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print plain numbers as JSON."),
) -> None:
    """Count parameters, FLOPs and memory of a recipe, without training anything."""
    from tessera import distributed
    from tessera.cli.sample import parse_interval
    from tessera.cost import estimate
    from tessera.precision import resolve
    from tessera.recipes.loading import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    interval = parse_interval(guidance_interval) if guidance_interval is not None else None
    result = estimate(loaded, guidance, interval, skip, bricks)
    if as_json:
        print(json.dumps(dataclasses.asdict(result) | {"train_bytes": result.train_bytes}))
        return
    training = loaded.training
    table = Table(
        box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0),
        title=f"[bold]{loaded.name}[/]  {loaded.description}", title_justify="left",
        title_style="",
    )  # fmt: skip
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    guided = f" with guidance {guidance:g}" if guidance != 1 else ""
    full = result.evaluations * result.forward_flops
    skipped = f", {1 - result.sample_flops / full:.1%} skipped" if skip or bricks else ""
    per_image = human(result.activation_bytes / result.micro_batch, "B")
    precision = resolve(training.precision, distributed.device())
    kept = f"{result.micro_batch:,} images x {per_image}, {precision}, estimated"
    rows = [
        ("parameters", human(result.parameters), loaded.network.kind),
        ("", "", ""),
        ("one evaluation", human(result.forward_flops, "FLOP"), "the denoiser, one image"),
        ("training, an image", human(result.train_flops, "FLOP"), "forward and backward"),
        ("training, all", human(result.run_flops, "FLOP"), f"{human(training.images)} images"),
        (
            "sampling, an image",
            human(result.sample_flops, "FLOP"),
            f"{result.evaluations} evaluations{guided}{skipped}",
        ),
        ("", "", ""),
        ("weights", human(result.weight_bytes, "B"), "float32"),
        ("gradients", human(result.gradient_bytes, "B"), ""),
        ("optimizer", human(result.optimizer_bytes, "B"), loaded.optimizer.kind),
        ("averages", human(result.ema_bytes, "B"), f"EMA, {len(loaded.ema)}x"),
        ("activations", human(result.activation_bytes, "B"), kept),
        (
            "memory in training",
            human(result.train_bytes, "B"),
            "on one device; less with micro_batch",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def human(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 42_380_000_000, "FLOP" to "42.4 GFLOP"."""
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z")
    power = 0
    while abs(value) >= 999.5 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if value >= 99.95 or power == 0 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {prefixes[power]}{unit}".rstrip()

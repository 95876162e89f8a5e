"""What every benchmark shares: interleaved timing, ceilings of the machine, tables, the record."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tessera.files import atomic_file
from tessera.pipelines.loading import estimate
from tessera.recipes.schema import Recipe

Key = TypeVar("Key")

RESULTS = Path(__file__).parent / "RESULTS.md"
README = Path(__file__).parents[1] / "README.md"


def device() -> torch.device:
    """The machine's accelerator, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait for the accelerator, so that a host clock measures its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forward_flops(recipe: Recipe, **options: Any) -> int:
    """FLOPs of one evaluation of a recipe's network for one image.

    Args:
        options: of sampling, under which all evaluations cost the same.
    """
    cost = estimate(recipe, **options)
    return round(cost.sample_flops / cost.evaluations)


def now() -> float:
    """Seconds on the host's clock, when the accelerator has done its work."""
    synchronize()
    return time.perf_counter()


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = now()
    function()
    return now() - start


def interleaved(
    variants: Mapping[Key, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[Key, float]:
    """Least seconds of each variant, as others on the machine only add; taken in turns."""
    for _ in range(warmup):
        for function in variants.values():
            function()
    times: dict[Key, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, function in variants.items():
            times[name].append(seconds(function))
    return {name: min(values) for name, values in times.items()}


def ceilings(dtype: torch.dtype) -> dict[str, float]:
    """Best FLOP/s of a large matrix product and of a 3x3 convolution (forward + backward)."""
    where = device()
    scale = 4 if where.type == "cuda" else 1
    a = torch.randn(2048 * scale, 2048 * scale, dtype=dtype, device=where)
    x = torch.randn(16 * scale**2, 256, 16, 16, dtype=dtype, device=where)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(256, 256, 3, 3, dtype=dtype, device=where)
    weight = weight.to(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn_like(x)

    def product() -> Tensor:
        return a @ a

    def convolution() -> None:
        torch.autograd.backward(torch.nn.functional.conv2d(x, weight, padding=1), gradient)

    product()
    convolution()
    flops = {"matrix product": 2 * a.shape[0] ** 3, "convolution": 6 * x.numel() * 256 * 9}
    calls = {"matrix product": product, "convolution": convolution}
    return {name: flops[name] / min(seconds(calls[name]) for _ in range(24)) for name in flops}


def machine() -> str:
    """Processor, accelerator and versions, in a line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        cpu = found.group(1) if found else cpu
    parts = [f"{cpu}, {os.cpu_count()} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    parts.append(f"Python {platform.python_version()}, torch {torch.__version__}")
    return "; ".join(parts)


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table to the terminal."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def section(title: str, columns: list[str], rows: list[list[str]]) -> str:
    """Print a table, and return it as Markdown below its title."""
    show(title, columns, rows)
    return f"{title}:\n\n{markdown(columns, rows)}"


def record(name: str, text: str) -> None:
    """Replace the section `name` of RESULTS.md, keeping all others; one for each accelerator."""
    if torch.cuda.is_available():
        name = f"{name} ({torch.cuda.get_device_name()})"
    body = RESULTS.read_text() if RESULTS.exists() else "# Results\n"
    section = f"## {name}\n\n{date.today().isoformat()}; {machine()}\n\n{text.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(name)}\n.*?(?=^## |\Z)", re.M | re.S)
    if pattern.search(body):
        body = pattern.sub(lambda _: section + "\n", body)
    else:
        body = body.rstrip() + "\n\n" + section
    with atomic_file(RESULTS, "w") as file:
        file.write(body.rstrip() + "\n")


def record_readme(name: str, text: str) -> None:
    """Replace what stands in README.md between `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Raises:
        ValueError: the marks are not there.
    """
    body = README.read_text()
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    before, found, rest = body.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{README} has no lines {begin.strip()} and {end.strip()}")
    with atomic_file(README, "w") as file:
        file.write(f"{before}{begin}{text.strip()}\n{end}{after}")

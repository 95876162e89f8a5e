"""What the commands of `tessera data` share: options, and what they print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from tessera.cli.tables import make_table

if TYPE_CHECKING:
    from tessera.data.inspect import ClassCount

_LISTED = 10

SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be used.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace DEST if it exists.")]


def class_table(classes: Sequence[ClassCount], count: int) -> Table:
    table = make_table(
        Column("class", justify="right"), Column("name"), Column("images", justify="right"),
        Column("share", justify="right"), Column(),
    )  # fmt: skip
    most = max(entry.count for entry in classes)
    shown = classes[:50]
    for entry in shown:
        table.add_row(
            str(entry.index),
            Text(entry.name or ""),
            f"{entry.count:,}",
            f"{100 * entry.count / count:.1f}%",
            "█" * max(1, round(24 * entry.count / most)),
        )
    if len(classes) > len(shown):
        table.add_row("...", f"{len(classes) - len(shown):,} more classes", "", "", "")
    return table


def add_listed(table: Table, lines: Sequence[str]) -> None:
    for line in lines[:_LISTED]:
        table.add_row("", Text(line))
    if len(lines) > _LISTED:
        table.add_row("", f"... and {len(lines) - _LISTED:,} more")


def plain_console() -> Console:
    return Console(highlight=False)


def counted(count: int, one: str, more: str) -> str:
    return f"{count:,} {one if count == 1 else more}"


def classes_text(count: int) -> str:
    return counted(count, "class", "classes") if count else "none"


def duration_text(count: int, seconds: float) -> str:
    speed = count / max(seconds, 1e-9)
    return f"{seconds:.1f} s ({speed:,.0f} images/s)"


def size_text(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"

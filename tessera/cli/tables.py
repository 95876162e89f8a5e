"""How tables look, in every command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Column, Table


def make_table(*columns: Column, title: str = "", boxed: bool = False) -> Table:
    """An empty table; with a head if a column has a name. Without a box it starts at the margin."""
    look: dict[str, Any] = {} if boxed else {"box": None, "pad_edge": False}
    return Table(
        *columns,
        title=title or None,
        title_justify="left",
        title_style="",
        header_style="bold",
        show_header=any(column.header for column in columns),
        padding=(0, 1) if boxed else (0, 2, 0, 0),
        **look,
    )


def facts_table(title: str = "", *, boxed: bool = False) -> Table:
    """An empty table of names and values."""
    columns = Column(style="bold", no_wrap=True), Column(overflow="fold")
    return make_table(*columns, title=title, boxed=boxed)


def print_facts(
    rows: Mapping[str, object] | Iterable[tuple[str, object]],
    title: str = "",
    *,
    boxed: bool = False,
) -> None:
    """Print names and values."""
    table = facts_table(title, boxed=boxed)
    for name, value in rows.items() if isinstance(rows, Mapping) else rows:
        table.add_row(name, str(value))
    Console().print(table)


def print_rows(head: Iterable[str], rows: Iterable[Iterable[str]], title: str = "") -> None:
    """Print a table with a head."""
    table = make_table(*(Column(name, overflow="fold") for name in head), title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)

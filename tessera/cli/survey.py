"""`tessera data inspect` of collections that are not converted yet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from tessera.cli.data_text import add_listed, class_table, classes_text, counted, plain_console
from tessera.cli.tables import facts_table

if TYPE_CHECKING:
    from tessera.data.sources import Options
    from tessera.data.survey import Survey

_SIZES = 5  # that are listed


def inspect_foreign(
    path: Path,
    options: Options,
    out: Path | None,
    columns: int,
    max_images: int | None,
    seed: int,
    skip_bad: bool,
) -> None:
    """Print what is in a collection and write a picture of samples; see `data.survey.survey`."""
    from tessera.data.survey import survey
    from tessera.images import save_png

    found = survey(
        path, options, columns=columns, max_images=max_images, seed=seed, skip_bad=skip_bad
    )
    _print_survey(found)
    out = out or Path(f"{found.name}-samples.png")
    save_png(out, found.picture)
    print(f"samples: {out}")


def _print_survey(found: Survey) -> None:
    table = facts_table()
    table.add_row("set", Text(f"{found.name} ({found.kind}, not converted)"))
    table.add_row("images", f"{found.count:,}")
    table.add_row("sizes", _sizes_text(found))
    kinds = {1: "grey", 3: "RGB", 4: "RGBA"}
    words = [
        f"{kinds.get(channels, f'{channels} channels')} ({number:,})"
        for channels, number in found.channels
    ]
    table.add_row("channels", ", ".join(words))
    if found.mean:
        table.add_row("mean", " ".join(f"{value:7.2f}" for value in found.mean) + "  of 0..255")
        table.add_row("std", " ".join(f"{value:7.2f}" for value in found.std))
    labels = classes_text(len(found.classes))
    if found.label_vectors:
        labels = f"vectors of {found.label_vectors} numbers"
    elif found.unlabelled:
        labels += f"; {found.unlabelled:,} images without one"
    table.add_row("labels", labels)
    if found.skipped:
        table.add_row("left out", f"{len(found.skipped):,} that cannot be used:")
        add_listed(table, found.skipped)
    if found.ignored:
        table.add_row("ignored", counted(len(found.ignored), "file", "files") + ", no image:")
        add_listed(table, found.ignored)
    console = plain_console()
    console.print(table)
    if found.classes:
        console.print(class_table(found.classes, found.count))


def _sizes_text(found: Survey) -> str:
    """All sizes if they are few, else the range and the most frequent ones."""
    if len(found.sizes) <= _SIZES:
        return ", ".join(f"{w}x{h} ({number:,})" for (w, h), number in found.sizes)
    (least, _), *_, (most, _) = found.sizes
    often = sorted(found.sizes, key=lambda pair: -pair[1])[:3]
    words = ", ".join(f"{w}x{h} ({number:,})" for (w, h), number in often)
    return f"{least[0]}x{least[1]} to {most[0]}x{most[1]}; most often {words}"

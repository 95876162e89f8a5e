"""`tessera data`: convert image collections and look into them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tessera.errors import DataError

if TYPE_CHECKING:
    from tessera.data.convert import Report
    from tessera.data.dataset import ImageDataset
    from tessera.data.inspect import Summary

data_app = typer.Typer(
    help="Make image sets for training, and look into them.", no_args_is_help=True
)
_LISTED = 10


@data_app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="Folder or ZIP of images, cifar-10-python.tar.gz, *-images-idx3-ubyte.gz (MNIST), "
            "LSUN *_lmdb folder, or a packed set.",
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="DEST", help="NAME.zip (archive), NAME.safetensors (packed), or a folder."
        ),
    ],
    resolution: Annotated[
        str | None, typer.Option(metavar="N|WxH", help="Size of the result, pixels.")
    ] = None,
    transform: Annotated[
        str, typer.Option(help="none (plain resize), center-crop or center-crop-wide.")
    ] = "none",
    filter_: Annotated[
        str,
        typer.Option(
            "--filter", help="For resizing: lanczos, bicubic, bilinear, hamming, box, nearest."
        ),
    ] = "lanczos",
    channels: Annotated[
        int | None,
        typer.Option(min=1, max=3, help="3 makes all images RGB, 1 grey; otherwise as they are."),
    ] = None,
    max_images: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many images of the source.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="zip, packed or folder; otherwise told by the name DEST."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out images that cannot be used.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DEST if it exists.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Threads; by default one per core.")
    ] = None,
    ignore_orientation: Annotated[
        bool,
        typer.Option(
            "--ignore-orientation", help="Do not turn photos as the camera's tag (EXIF) says."
        ),
    ] = False,
    legacy_wide_crop: Annotated[
        bool,
        typer.Option(
            "--legacy-wide-crop",
            help="center-crop-wide as in EDM's released tool, which stretches most pictures.",
        ),
    ] = False,
) -> None:
    """Make a training set from a collection of images.

    Class sub-folders become labels. DEST appears when it is whole, or not at all.
    """
    from tessera.data.convert import convert as run
    from tessera.data.transforms import parse_size

    if channels == 2:
        raise DataError("--channels: 1 (grey) or 3 (RGB)")
    report = run(
        source,
        target,
        resolution=None if resolution is None else parse_size(resolution),
        transform=transform,  # type: ignore[arg-type]
        resample=filter_,  # type: ignore[arg-type]
        channels=channels,
        max_images=max_images,
        form=form,  # type: ignore[arg-type]
        skip_bad=skip_bad,
        overwrite=overwrite,
        upright=not ignore_orientation,
        released_wide_crop=legacy_wide_crop,
        workers=workers,
    )
    _print_report(report)


@data_app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Archive, packed set or folder of images.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="PNG of samples to write; by default NAME-samples.png here."),
    ] = None,
    columns: Annotated[int, typer.Option(min=1, max=100, help="Samples in a row.")] = 10,
    max_images: Annotated[
        int | None, typer.Option(min=1, help="Look at a random subset of this size.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the samples and the subset.")] = 0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out images that cannot be used.")
    ] = False,
) -> None:
    """Print what is in a set, and write a picture of samples."""
    from tessera.data.dataset import open_dataset
    from tessera.data.inspect import sample_grid, summarise
    from tessera.images import save_png

    dataset = open_dataset(path, max_images=max_images, seed=seed, skip_bad=skip_bad)
    _print_summary(dataset, summarise(dataset, path))
    out = out or Path(f"{dataset.name}-samples.png")
    if out.suffix.lower() != ".png":
        raise DataError(f"{out}: the picture of samples is a PNG file; end its name in .png")
    save_png(out, sample_grid(dataset, columns, seed=seed))
    print(f"samples: {out}")


def _print_report(report: Report) -> None:
    from tessera.data.decode import shape_text

    table = _table()
    table.add_row("source", report.kind)
    table.add_row("images", f"{report.count:,} of {shape_text(report.shape)}")
    table.add_row(
        "labels", _counted(report.num_classes, "class", "classes") if report.num_classes else "none"
    )
    if report.too_small:
        table.add_row("left out", f"{report.too_small:,} smaller than the resolution")
    if report.bad:
        table.add_row("left out", f"{len(report.bad):,} that cannot be used:")
        _add_listed(table, report.bad)
    if report.ignored:
        table.add_row("ignored", _counted(len(report.ignored), "file", "files") + ", no image:")
        _add_listed(table, report.ignored)
    for note in report.notes:
        table.add_row("[yellow]note", _plain(note))
    speed = report.count / max(report.seconds, 1e-9)
    table.add_row("time", f"{report.seconds:.1f} s ({speed:,.0f} images/s)")
    table.add_row("written", _plain(f"{report.path} ({report.format})"))
    _console().print(table)


def _print_summary(dataset: ImageDataset, summary: Summary) -> None:
    from tessera.data.decode import shape_text

    table = _table()
    table.add_row("set", _plain(f"{dataset.name} ({dataset.kind}, {_size_text(summary.bytes)})"))
    table.add_row("images", f"{summary.count:,} of {shape_text(summary.shape)}")
    table.add_row("mean", " ".join(f"{value:7.2f}" for value in summary.mean) + "  of 0..255")
    table.add_row("std", " ".join(f"{value:7.2f}" for value in summary.std))
    if summary.label_vectors:
        table.add_row("labels", f"vectors of {summary.label_vectors} numbers")
    elif not summary.classes:
        table.add_row("labels", "none")
    else:
        counts = [entry.count for entry in summary.classes]
        balance = (
            f"{counts[0]:,} per class"
            if min(counts) == max(counts)
            else f"{min(counts):,} to {max(counts):,} per class"
        )
        absent = summary.num_classes - len(counts)
        table.add_row(
            "labels",
            f"{_counted(summary.num_classes, 'class', 'classes')}, {balance}"
            + (f"; {absent} empty" if absent else ""),
        )
    if dataset.skipped:
        table.add_row("left out", f"{len(dataset.skipped):,} that cannot be used:")
        _add_listed(table, dataset.skipped)
    console = _console()
    console.print(table)
    if summary.classes:
        console.print(_class_table(summary))


def _class_table(summary: Summary) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("class", justify="right")
    table.add_column("name")
    table.add_column("images", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    most = max(entry.count for entry in summary.classes)
    shown = summary.classes[:50]
    for entry in shown:
        table.add_row(
            str(entry.index),
            _plain(entry.name or ""),
            f"{entry.count:,}",
            f"{100 * entry.count / summary.count:.1f}%",
            "█" * max(1, round(24 * entry.count / most)),
        )
    if len(summary.classes) > len(shown):
        table.add_row("...", f"{len(summary.classes) - len(shown):,} more classes", "", "", "")
    return table


def _add_listed(table: Any, lines: Any) -> None:
    for line in lines[:_LISTED]:
        table.add_row("", _plain(line))
    if len(lines) > _LISTED:
        table.add_row("", f"... and {len(lines) - _LISTED:,} more")


def _table() -> Any:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)


def _counted(count: int, one: str, more: str) -> str:
    return f"{count:,} {one if count == 1 else more}"


def _size_text(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"

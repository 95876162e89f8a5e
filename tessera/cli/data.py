"""`tessera data`: convert image collections and look into them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from tessera.cli.app import App
from tessera.cli.tables import facts_table, make_table
from tessera.errors import DataError
from tessera.files import check_free

if TYPE_CHECKING:
    from tessera.data.convert import Format, Report
    from tessera.data.dataset import ImageDataset
    from tessera.data.inspect import ClassCount, Summary
    from tessera.data.latents import LatentReport, Precision
    from tessera.data.transforms import Filter, Transform

data_app = App(help="Make image sets for training, and look into them.", no_args_is_help=True)
_LISTED = 10

LatentPrecision = StrEnum("LatentPrecision", ["float16", "float32"])
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be used.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace DEST if it exists.")]
Collection = Annotated[
    Path,
    typer.Argument(
        metavar="SRC",
        help="Folder or ZIP of images, cifar-10-python.tar.gz, *-images-idx3-ubyte.gz (MNIST), "
        "LSUN *_lmdb folder, or a packed set.",
    ),
]
Destination = Annotated[
    Path,
    typer.Argument(
        metavar="DEST", help="NAME.zip (archive), NAME.safetensors (packed), or a folder."
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(min=1, help="Refuse larger images. (default: 67,108,864, 8192 x 8192)"),
]
TransformName = Annotated[
    str,
    typer.Option(
        help="none (plain resize), center-crop, center-crop-wide, adm-center-crop (as "
        "guided-diffusion, DiT and PDM) or lsun-crop (as their LSUN tool)."
    ),
]


@data_app.command("convert")
def convert_data(
    source: Collection,
    target: Destination,
    resolution: Annotated[
        str | None, typer.Option(metavar="N|WxH", help="Size of the result, pixels.")
    ] = None,
    transform: TransformName = "none",
    resample: Annotated[
        str | None,
        typer.Option(
            "--filter",
            help="For resizing: lanczos (the default), bicubic, bilinear, hamming, box, nearest.",
        ),
    ] = None,
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
    skip_bad: SkipBad = False,
    overwrite: Overwrite = False,
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
    max_file_size: Annotated[
        int,
        typer.Option(min=1, metavar="MIB", help="Refuse larger files of a folder or ZIP."),
    ] = 256,
    max_pixels: MaxPixels = None,
) -> None:
    """Make a training set from a collection of images.

    Class sub-folders become labels. DEST appears when it is whole, or not at all.
    """
    from tessera.data.convert import convert_images
    from tessera.data.transforms import parse_size
    from tessera.images import MAX_PIXELS

    if channels == 2:
        raise DataError("--channels: 1 (grey) or 3 (RGB)")
    # What is no transform, filter or format is refused by the conversion, in words of its own.
    report = convert_images(
        source,
        target,
        resolution=None if resolution is None else parse_size(resolution),
        transform=cast("Transform", transform),
        resample=cast("Filter | None", resample),
        channels=channels,
        max_images=max_images,
        form=cast("Format | None", form),
        skip_bad=skip_bad,
        overwrite=overwrite,
        upright=not ignore_orientation,
        released_wide_crop=legacy_wide_crop,
        max_file_bytes=max_file_size * 2**20,
        max_pixels=max_pixels or MAX_PIXELS,
        workers=workers,
    )
    _print_report(report)


@data_app.command()
def latents(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Archive, packed set or folder of RGB images.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DEST", help="NAME.safetensors.")],
    vae: Annotated[
        str,
        typer.Option(metavar="MODEL", help="Folder or Hugging Face id of an AutoencoderKL."),
    ],
    batch: Annotated[int, typer.Option(min=1, help="Images read and encoded at once.")] = 16,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ... (default: the fastest)")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(min=0, help="Factor of the latents. (default: the VAE's)")
    ] = None,
    shift: Annotated[
        float | None, typer.Option(help="Taken off before scaling. (default: the VAE's)")
    ] = None,
    xflip: Annotated[
        bool, typer.Option("--xflip", help="Encode the mirrored images, too (for data.xflip).")
    ] = False,
    precision: Annotated[
        LatentPrecision, typer.Option(help="Of the numbers in the file.")
    ] = LatentPrecision.float16,
    max_images: Annotated[
        int | None, typer.Option(min=1, help="Encode a random subset of this size.")
    ] = None,
    skip_bad: SkipBad = False,
    overwrite: Overwrite = False,
) -> None:
    """Encode a set of images by a VAE, once, for training on latents.

    Means and log-variances are kept, so that training draws a fresh sample of each image every
    time. DEST appears when it is whole, or not at all.
    """
    from tessera import distributed
    from tessera.data.codec import VaeCodec
    from tessera.data.dataset import open_dataset
    from tessera.data.latents import write_latents

    if scale == 0:
        raise DataError("--scale 0 would leave nothing of the latents; give a positive number")
    codec = VaeCodec(vae, scale=scale, shift=shift)
    codec.prepare()
    report = write_latents(
        open_dataset(source, max_images=max_images, skip_bad=skip_bad),
        codec,
        target,
        batch=batch,
        device=distributed.device(device),
        xflip=xflip,
        precision=cast("Precision", precision.value),
        overwrite=overwrite,
    )
    _print_latents(report)


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
    skip_bad: SkipBad = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file of --out.")
    ] = False,
) -> None:
    """Print what is in a set, and write a picture of samples (of images, not of latents)."""
    from tessera.data.latents import is_latents

    if is_latents(path):
        _inspect_latents(path, max_images, seed)
        return
    from tessera.data.dataset import open_dataset
    from tessera.data.inspect import sample_grid, summarise
    from tessera.images import save_png

    if out is not None:
        if out.suffix.lower() != ".png":
            raise DataError(f"{out}: the picture of samples is a PNG file; end its name in .png")
        check_free(out, overwrite)
    dataset = open_dataset(path, max_images=max_images, seed=seed, skip_bad=skip_bad)
    _print_summary(dataset, summarise(dataset, path))
    out = out or Path(f"{dataset.name}-samples.png")
    save_png(out, sample_grid(dataset, columns, seed=seed))
    print(f"samples: {out}")


def _print_latents(report: LatentReport) -> None:
    table, info = facts_table(), report.info
    table.add_row("VAE", Text(f"{info.vae}, scale {info.scale:g}, shift {info.shift:g}"))
    table.add_row("latents", f"{report.count:,} of {_latent_text(report.shape)}")
    table.add_row("mirrored", "encoded, too" if report.flips else "no")
    table.add_row("labels", _classes(report.num_classes))
    table.add_row("time", _duration(report))
    size = _size_text(report.path.stat().st_size)
    table.add_row("written", Text(f"{report.path} ({size})"))
    _console().print(table)


def _inspect_latents(path: Path, max_images: int | None, seed: int) -> None:
    from tessera.data.inspect import count_labels
    from tessera.data.latents import channel_statistics, open_latents

    dataset = open_latents(path, max_images=max_images, seed=seed)
    info, classes = dataset.info, count_labels(dataset.labels, dataset.class_names)
    mean, std = channel_statistics(dataset)
    table = facts_table()
    table.add_row("set", Text(f"{dataset.name} (latents, {_size_text(path.stat().st_size)})"))
    table.add_row("latents", f"{len(dataset):,} of {_latent_text(dataset.shape)}")
    table.add_row("images", f"{info.resolution}x{info.resolution} RGB")
    table.add_row("VAE", Text(f"{info.vae}, scale {info.scale:g}, shift {info.shift:g}"))
    table.add_row("mirrored", "encoded, too" if dataset.flips else "no")
    table.add_row("mean", " ".join(f"{value:7.3f}" for value in mean) + "  scaled")
    table.add_row("std", " ".join(f"{value:7.3f}" for value in std))
    table.add_row("labels", _classes(dataset.num_classes if classes else 0))
    console = _console()
    console.print(table)
    if classes:
        console.print(_class_table(classes, len(dataset)))


def _latent_text(shape: tuple[int, int, int]) -> str:
    return f"{shape[2]}x{shape[1]}, {_counted(shape[0], 'channel', 'channels')}"


def _print_report(report: Report) -> None:
    from tessera.data.decode import shape_text

    table = facts_table()
    table.add_row("source", report.kind)
    table.add_row("images", f"{report.count:,} of {shape_text(report.shape)}")
    table.add_row("labels", _classes(report.num_classes))
    if report.too_small:
        table.add_row("left out", f"{report.too_small:,} smaller than the resolution")
    if report.bad:
        table.add_row("left out", f"{len(report.bad):,} that cannot be used:")
        _add_listed(table, report.bad)
    if report.ignored:
        table.add_row("ignored", _counted(len(report.ignored), "file", "files") + ", no image:")
        _add_listed(table, report.ignored)
    for note in report.notes:
        table.add_row("[yellow]note", Text(note))
    table.add_row("time", _duration(report))
    table.add_row("written", Text(f"{report.path} ({report.format})"))
    _console().print(table)


def _print_summary(dataset: ImageDataset, summary: Summary) -> None:
    from tessera.data.decode import shape_text

    table = facts_table()
    table.add_row("set", Text(f"{dataset.name} ({dataset.kind}, {_size_text(summary.bytes)})"))
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
            f"{_classes(summary.num_classes)}, {balance}" + (f"; {absent} empty" if absent else ""),
        )
    if dataset.skipped:
        table.add_row("left out", f"{len(dataset.skipped):,} that cannot be used:")
        _add_listed(table, dataset.skipped)
    console = _console()
    console.print(table)
    if summary.classes:
        console.print(_class_table(summary.classes, summary.count))


def _class_table(classes: Sequence[ClassCount], count: int) -> Table:
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


def _add_listed(table: Table, lines: Sequence[str]) -> None:
    for line in lines[:_LISTED]:
        table.add_row("", Text(line))
    if len(lines) > _LISTED:
        table.add_row("", f"... and {len(lines) - _LISTED:,} more")


def _console() -> Console:
    return Console(highlight=False)


def _counted(count: int, one: str, more: str) -> str:
    return f"{count:,} {one if count == 1 else more}"


def _classes(count: int) -> str:
    return _counted(count, "class", "classes") if count else "none"


def _duration(report: Report | LatentReport) -> str:
    speed = report.count / max(report.seconds, 1e-9)
    return f"{report.seconds:.1f} s ({speed:,.0f} images/s)"


def _size_text(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"

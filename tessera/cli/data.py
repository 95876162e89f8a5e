"""`tessera data`: convert image collections and look into them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.text import Text

from tessera.cli.app import App
from tessera.cli.data_text import (
    Overwrite,
    SkipBad,
    add_listed,
    class_table,
    classes_text,
    counted,
    duration_text,
    plain_console,
    size_text,
)
from tessera.cli.latents import (
    SourceImages,
    VaeModel,
    inspect_latents,
    latents,
    show_latents,
)
from tessera.cli.survey import inspect_foreign
from tessera.cli.tables import facts_table
from tessera.errors import DataError
from tessera.files import check_free

if TYPE_CHECKING:
    from tessera.data.convert import Format, Report
    from tessera.data.dataset import ImageDataset
    from tessera.data.inspect import Summary
    from tessera.data.transforms import Filter, Transform

data_app = App(help="Make image sets for training, and look into them.", no_args_is_help=True)

Collection = Annotated[
    Path,
    typer.Argument(
        metavar="SRC",
        help="Folder or ZIP of images, parquet, datasets folder (save_to_disk), WebDataset shards, "
        "list of files (.csv, .tsv, .jsonl), cifar-10-python.tar.gz, *-images-idx3-ubyte.gz "
        "(MNIST), LSUN *_lmdb folder, or a packed set.",
    ),
]
ImageColumn = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Column of images (or ending, as png, of shards)."),
]
LabelColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="Column of labels; none: without labels.")
]
Split = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of parquet or a datasets folder, as train.")
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
Channels = Annotated[
    int | None,
    typer.Option(min=1, max=4, help="3 makes all images RGB, 1 grey, 4 RGBA; else as they are."),
]
LegacyWideCrop = Annotated[
    bool,
    typer.Option(
        "--legacy-wide-crop",
        help="center-crop-wide as in EDM's released tool, which stretches most pictures.",
    ),
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
    channels: Channels = None,
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
    legacy_wide_crop: LegacyWideCrop = False,
    max_file_size: Annotated[
        int,
        typer.Option(min=1, metavar="MIB", help="Refuse larger files of a folder or ZIP."),
    ] = 256,
    max_pixels: MaxPixels = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    split: Split = None,
) -> None:
    """Make a training set from a collection of images.

    Class sub-folders become labels. DEST appears when it is whole, or not at all.
    """
    from tessera.data.convert import convert_images
    from tessera.data.transforms import parse_size
    from tessera.images import MAX_PIXELS

    if channels == 2:
        raise DataError("--channels: 1 (grey), 3 (RGB) or 4 (RGBA)")
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
        image_column=image_column,
        label_column=label_column,
        split=split,
        workers=workers,
    )
    _print_report(report)


data_app.command()(latents)


@data_app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="Archive, packed set or folder of images, or any other SRC."
        ),
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
    vae: VaeModel = None,
    images: SourceImages = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    split: Split = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file of --out.")
    ] = False,
) -> None:
    """Print what is in a set, and write a picture of samples; of latents, decoded by --vae.

    What could be converted is looked at as it is: tables, shards, lists, databases.
    """
    from tessera.data.latents import is_latents
    from tessera.data.sources import Options, is_foreign

    if out is not None:
        if out.suffix.lower() != ".png":
            raise DataError(f"{out}: the picture of samples is a PNG file; end its name in .png")
        check_free(out, overwrite)
    if is_latents(path):
        inspect_latents(path, max_images, seed)
        if vae is not None:
            show_latents(path, vae, images, out, columns, max_images, seed)
        elif images is not None or out is not None:
            raise DataError("a picture of latents needs the VAE that decodes them: --vae MODEL")
        return
    if vae is not None or images is not None:
        raise DataError(f"{path} holds images; --vae and --images are for a set of latents")
    options = Options(image_column=image_column, label_column=label_column, split=split)
    if is_foreign(path):
        inspect_foreign(path, options, out, columns, max_images, seed, skip_bad)
        return
    if options != Options():
        raise DataError(f"{path}: columns and splits are those of tables, shards and lists")
    from tessera.data.dataset import open_dataset
    from tessera.data.inspect import sample_grid, summarise
    from tessera.images import save_png

    dataset = open_dataset(path, max_images=max_images, seed=seed, skip_bad=skip_bad)
    _print_summary(dataset, summarise(dataset, path))
    out = out or Path(f"{dataset.name}-samples.png")
    save_png(out, sample_grid(dataset, columns, seed=seed))
    print(f"samples: {out}")


def _print_report(report: Report) -> None:
    from tessera.data.decode import shape_text

    table = facts_table()
    table.add_row("source", report.kind)
    table.add_row("images", f"{report.count:,} of {shape_text(report.shape)}")
    table.add_row("labels", classes_text(report.num_classes))
    if report.too_small:
        table.add_row("left out", f"{report.too_small:,} smaller than the resolution")
    if report.bad:
        table.add_row("left out", f"{len(report.bad):,} that cannot be used:")
        add_listed(table, report.bad)
    if report.ignored:
        table.add_row("ignored", counted(len(report.ignored), "file", "files") + ", no image:")
        add_listed(table, report.ignored)
    for note in report.notes:
        table.add_row("[yellow]note", Text(note))
    table.add_row("time", duration_text(report.count, report.seconds))
    table.add_row("written", Text(f"{report.path} ({report.format})"))
    plain_console().print(table)


def _print_summary(dataset: ImageDataset, summary: Summary) -> None:
    from tessera.data.decode import shape_text

    table = facts_table()
    table.add_row("set", Text(f"{dataset.name} ({dataset.kind}, {size_text(summary.bytes)})"))
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
            f"{classes_text(summary.num_classes)}, {balance}"
            + (f"; {absent} empty" if absent else ""),
        )
    if dataset.skipped:
        table.add_row("left out", f"{len(dataset.skipped):,} that cannot be used:")
        add_listed(table, dataset.skipped)
    console = plain_console()
    console.print(table)
    if summary.classes:
        console.print(class_table(summary.classes, summary.count))

"""`tessera data latents`: encode a set of images; `tessera data inspect`, of latents."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.text import Text

from tessera.cli.data_text import (
    Overwrite,
    SkipBad,
    class_table,
    classes_text,
    counted,
    duration_text,
    plain_console,
    size_text,
)
from tessera.cli.tables import facts_table
from tessera.errors import DataError

if TYPE_CHECKING:
    from tessera.data.encoding import LatentReport
    from tessera.data.latent_formats.base import Precision

LatentPrecision = StrEnum("LatentPrecision", ["float16", "float32"])


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
    from tessera.data.encoding import write_latents

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


def _print_latents(report: LatentReport) -> None:
    table, info = facts_table(), report.info
    table.add_row("VAE", Text(f"{info.vae}, scale {info.scale:g}, shift {info.shift:g}"))
    table.add_row("latents", f"{report.count:,} of {_latent_text(report.shape)}")
    table.add_row("mirrored", "encoded, too" if report.flips else "no")
    table.add_row("labels", classes_text(report.num_classes))
    table.add_row("time", duration_text(report.count, report.seconds))
    size = size_text(report.path.stat().st_size)
    table.add_row("written", Text(f"{report.path} ({size})"))
    plain_console().print(table)


def inspect_latents(path: Path, max_images: int | None, seed: int) -> None:
    """Print what is in a set of latents."""
    from tessera.data.inspect import count_labels
    from tessera.data.latents import channel_statistics, open_latents

    dataset = open_latents(path, max_images=max_images, seed=seed)
    info, classes = dataset.info, count_labels(dataset.labels, dataset.class_names)
    mean, std = channel_statistics(dataset)
    table = facts_table()
    table.add_row("set", Text(f"{dataset.name} (latents, {size_text(path.stat().st_size)})"))
    table.add_row("latents", f"{len(dataset):,} of {_latent_text(dataset.shape)}")
    table.add_row("images", f"{info.resolution}x{info.resolution} RGB")
    table.add_row("VAE", Text(f"{info.vae}, scale {info.scale:g}, shift {info.shift:g}"))
    table.add_row("mirrored", "encoded, too" if dataset.flips else "no")
    table.add_row("mean", " ".join(f"{value:7.3f}" for value in mean) + "  scaled")
    table.add_row("std", " ".join(f"{value:7.3f}" for value in std))
    table.add_row("labels", classes_text(dataset.num_classes if classes else 0))
    console = plain_console()
    console.print(table)
    if classes:
        console.print(class_table(classes, len(dataset)))


def _latent_text(shape: tuple[int, int, int]) -> str:
    return f"{shape[2]}x{shape[1]}, {counted(shape[0], 'channel', 'channels')}"

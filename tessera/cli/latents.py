"""`tessera data latents`: encode images or convert latents; `tessera data inspect`, of latents."""

from __future__ import annotations

from collections.abc import Mapping
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
    from tessera.data.latent_convert import LatentConversion
    from tessera.data.latent_formats.base import LatentInfo, Precision

_MOMENTS = "mean and log-variance"
_DRAWN = "one sample of each image, scaled"
LatentPrecision = StrEnum("LatentPrecision", ["float16", "float32"])

Form = Annotated[
    str | None,
    typer.Option("--format", help="packed, lego, npz or ptshard. (default: by DEST's ending)"),
]
ToForm = Annotated[
    str | None,
    typer.Option("--to", metavar="FORMAT", help="Convert latents to this; encode nothing."),
]
SampleSeed = Annotated[
    int, typer.Option(help="Of the sample, where a format holds one of each image.")
]
ShardSize = Annotated[
    int, typer.Option(min=1, help="Images in a file, where a format has several files.")
]


def latents(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="Archive, packed set or folder of RGB images; latents for --to."
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DEST", help="NAME.safetensors, NAME.zip, or a folder.")
    ],
    vae: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Folder or Hugging Face id of an AutoencoderKL."),
    ] = None,
    form: Form = None,
    to: ToForm = None,
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
        LatentPrecision | None,
        typer.Option(help="Of the numbers. (default: float16; the source's with --to)"),
    ] = None,
    seed: SampleSeed = 0,
    shard_size: ShardSize = 64,
    max_images: Annotated[
        int | None, typer.Option(min=1, help="Encode a random subset of this size.")
    ] = None,
    skip_bad: SkipBad = False,
    overwrite: Overwrite = False,
) -> None:
    """Encode a set of images by a VAE, once, for training on latents.

    Means and log-variances are kept, so that training draws a fresh sample of each image every
    time; some formats hold one sample instead. DEST appears when it is whole, or not at all.
    """
    from tessera import distributed
    from tessera.data.codec import VaeCodec
    from tessera.data.dataset import open_dataset
    from tessera.data.encoding import write_latents
    from tessera.data.latent_convert import convert_latents

    if scale == 0:
        raise DataError("--scale 0 would leave nothing of the latents; give a positive number")
    numbers = None if precision is None else cast("Precision", precision.value)
    if to is not None:
        _refuse({"--vae": vae, "--format": form, "--device": device, "--max-images": max_images,
                 "--skip-bad": skip_bad or None})  # fmt: skip
        report = convert_latents(
            source, target, to, precision=numbers, scale=scale, shift=shift, xflip=xflip,
            seed=seed, shard=shard_size, batch=batch, overwrite=overwrite,
        )  # fmt: skip
        _print_conversion(report)
        return
    if vae is None:
        raise DataError("say by which VAE: --vae MODEL encodes images (--to converts latents)")
    codec = VaeCodec(vae, scale=scale, shift=shift)
    codec.prepare()
    images = open_dataset(source, max_images=max_images, skip_bad=skip_bad)
    encoded = write_latents(
        images, codec, target, batch=batch, device=distributed.device(device), xflip=xflip,
        precision=numbers, form=form, seed=seed, shard=shard_size, overwrite=overwrite,
    )  # fmt: skip
    _print_latents(encoded)


def _refuse(options: Mapping[str, object]) -> None:
    """Raise for options of encoding that were given where latents are converted."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise DataError(f"--to converts latents and encodes no images: leave out {given[0]}")


def _print_latents(report: LatentReport) -> None:
    table, info = facts_table(), report.info
    table.add_row("VAE", Text(f"{info.vae}, scale {info.scale:g}, shift {info.shift:g}"))
    table.add_row("latents", f"{report.count:,} of {_latent_text(report.shape)}")
    table.add_row("mirrored", "encoded, too" if report.flips else "no")
    table.add_row("labels", classes_text(report.num_classes))
    table.add_row("time", duration_text(report.count, report.seconds))
    table.add_row("written", Text(f"{report.path} ({_size_text(report.path)})"))
    plain_console().print(table)


def _print_conversion(report: LatentConversion) -> None:
    table = facts_table()
    table.add_row("latents", f"{report.count:,} of {_latent_text(report.shape)}")
    table.add_row("mirrored", "converted, too" if report.flips else "no")
    for note in report.notes:
        table.add_row("[yellow]note", Text(note))
    table.add_row("time", duration_text(report.count, report.seconds))
    size = _size_text(report.path)
    table.add_row("written", Text(f"{report.path} ({report.form}, {size}; from {report.source})"))
    plain_console().print(table)


def inspect_latents(path: Path, max_images: int | None, seed: int) -> None:
    """Print what is in a set of latents."""
    from tessera.data.inspect import count_labels
    from tessera.data.latents import channel_statistics, open_latents

    dataset = open_latents(path, max_images=max_images, seed=seed)
    info, classes = dataset.info, count_labels(dataset.labels, dataset.class_names)
    mean, std = channel_statistics(dataset)
    table = facts_table()
    table.add_row("set", Text(f"{dataset.name} (latents, {dataset.form}, {_size_text(path)})"))
    table.add_row("latents", f"{len(dataset):,} of {_latent_text(dataset.shape)}")
    table.add_row("numbers", f"{dataset.precision}, {_DRAWN if dataset.drawn else _MOMENTS}")
    if info.resolution is not None:
        table.add_row("images", f"{info.resolution}x{info.resolution} RGB")
    table.add_row("VAE", Text(_vae_text(info)))
    table.add_row("mirrored", "encoded, too" if dataset.flips else "no")
    scaled = "scaled" if dataset.drawn or info.scale is not None else "not scaled"
    table.add_row("mean", " ".join(f"{value:7.3f}" for value in mean) + f"  {scaled}")
    table.add_row("std", " ".join(f"{value:7.3f}" for value in std))
    table.add_row("labels", classes_text(dataset.num_classes if classes else 0))
    console = plain_console()
    console.print(table)
    if classes:
        console.print(class_table(classes, len(dataset)))


def _vae_text(info: LatentInfo) -> str:
    """What a set says of its VAE."""
    scaling = [
        f"{name} {value:g}"
        for name, value in (("scale", info.scale), ("shift", info.shift))
        if value is not None
    ]
    return ", ".join([info.vae or "not said, as by most sets of released code", *scaling])


def _size_text(path: Path) -> str:
    from tessera.data.inspect import bytes_on_disk

    return size_text(bytes_on_disk(path))


def _latent_text(shape: tuple[int, int, int]) -> str:
    return f"{shape[2]}x{shape[1]}, {counted(shape[0], 'channel', 'channels')}"

"""`tessera edit`: pictures of which a part is kept and the rest made anew."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from tessera.cli.parts import OwnParts, import_parts
from tessera.cli.sample import Format, Places, Precision
from tessera.errors import TesseraError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tessera.pipelines.editing import Edit

_SIZES = {"box": 4, "keep": 4, "place": 2}


def edit(
    pipeline: str = typer.Argument(help="Pipeline folder, run folder, or Hugging Face id."),
    rest: list[str] = typer.Argument(
        metavar="IMAGE... KEY=VALUE...",
        help="Pictures; one of mask=FILE (white is made anew), box=X,Y,W,H (made anew), "
        "keep=X,Y,W,H (the rest is made), place=X,Y (of smaller pictures; the rest is made); and "
        "options of sampling, as of `tessera sample`.",
    ),
    seeds: str | None = typer.Option(
        None, help="Seed s edits picture s modulo their number. (default: each picture once)"
    ),
    out: Path = typer.Option(Path("edited"), help="Folder; or a file .npz or .png (a grid)."),
    labels: str | None = typer.Option(
        None, "--class", metavar="CLASS", help="Index or name. (default: no class)"
    ),
    batch: int = typer.Option(64, min=1, help="Most images at once on one device."),
    overwrite: bool = typer.Option(
        False, "--overwrite", help="Replace an NPZ or a grid of the same name."
    ),
    ema: str | None = typer.Option(None, help="Average of the weights, by its half-life."),
    vae: str | None = typer.Option(
        None, help="Folder or Hugging Face id of the VAE of a model of latents."
    ),
    device: str | None = typer.Option(None, help="cpu, cuda, ... (default: the fastest)"),
    precision: Precision = typer.Option(
        Precision.auto, help="Arithmetic of the network; auto: bf16 where it is fast, else fp32."
    ),
    own_parts: OwnParts = None,
) -> None:
    """Keep a part of pictures and make the rest, by a model that can (network.kind=mar)."""
    from tessera import distributed
    from tessera.cli.sample import parse_options, plain_warnings, print_summary, write_images
    from tessera.pipelines.generate import Job
    from tessera.pipelines.loading import load
    from tessera.precision import Precision as Arithmetic
    from tessera.precision import resolve
    from tessera.sampling.seeds import parse_seeds

    files = [word for word in rest if "=" not in word or Path(word).is_file()]
    given = parse_options([word for word in rest if word not in files])
    kind = {".npz": "npz", ".png": "grid"}.get(out.suffix.lower(), "png")
    places = Places.choose(out, Format(kind), False, None)
    places.check(overwrite)
    parts = import_parts(own_parts)
    with distributed.session(device) as target, plain_warnings():
        pipe = load(pipeline, ema=ema, vae=vae, device=target, parts=parts)
        pipe.check_edits()
        wanted = parse_seeds(seeds) if seeds is not None else list(range(len(files)))
        chosen = _edit(files, given, pipe.codec.image_shape(pipe.model.shape))
        arithmetic = resolve(cast("Arithmetic", precision.value), target, together=True)
        given |= {"edit": chosen, "precision": arithmetic}
        label = "-1" if labels in (None, "none") and pipe.model.num_classes else labels
        job = Job(pipe, wanted, label, batch, given)
        summary = write_images(job, kind, places, False, None)
        if distributed.is_main():
            print_summary(summary, [places.main])


def _edit(files: list[str], given: dict[str, Any], shape: tuple[int, int, int]) -> Edit:
    """The pictures and what is made of them; takes its own keys out of those given."""
    from tessera.pipelines.editing import choose_edit

    boxes: dict[str, Any] = {}
    for name, size in _SIZES.items():
        if (text := given.pop(name, None)) is None:
            continue
        numbers = text.replace("x", ",").split(",")
        if len(numbers) != size or not all(part.strip().lstrip("-").isdigit() for part in numbers):
            form = "X,Y,WIDTH,HEIGHT" if size == 4 else "X,Y"
            raise TesseraError(f"{name}={text}: give {form} in pixels, whole numbers")
        boxes[name] = tuple(map(int, numbers))
    mask = given.pop("mask", None)
    grey = None if mask is None else _read(mask, 1)[:, :, 0]
    return choose_edit([_read(file, shape[0]) for file in files], shape, mask=grey, **boxes)


def _read(file: str, channels: int) -> NDArray[np.uint8]:
    """A picture, uint8 [h, w, channels]."""
    import numpy as np

    from tessera.files import user_path
    from tessera.images import open_image

    path = user_path(file)
    if not path.is_file():
        raise TesseraError(f"there is no image {file!r}")
    pixels = np.asarray(open_image(path).convert("L" if channels == 1 else "RGB"), np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels

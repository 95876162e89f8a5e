"""`tessera eval nll`: bits per dimension of real images under a model."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from tessera.cli.eval_checks import check_destination
from tessera.cli.parts import OwnParts, import_parts
from tessera.cli.tables import print_facts
from tessera.errors import TesseraError


def nll(
    pipeline: str = typer.Argument(help="Pipeline folder, run folder, or Hugging Face id."),
    data: Path = typer.Argument(help="Real images: archive, packed set, folder or NPZ."),
    num: int = typer.Option(1000, min=1, help="Images to evaluate, the first ones."),
    batch: int = typer.Option(16, min=1, help="Images at once."),
    steps: str = typer.Option("", help="Steps of the process, like 250. (default: all)"),
    noise_schedule: str | None = typer.Option(
        None, help="For models of continuous noise levels: linear, cosine, ..."
    ),
    clip: bool = typer.Option(True, help="Cut estimates of the image to [-1, 1]."),
    seed: int = typer.Option(0, min=0, help="Of the noise."),
    ema: str | None = typer.Option(None, help="Average of the weights, by its half-life."),
    device: str | None = typer.Option(None, help="cpu, cuda, ... (default: the fastest)"),
    out: Path | None = typer.Option(None, help="NPZ for the terms of every image and step."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the NPZ if it exists."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
    own_parts: OwnParts = None,
) -> None:
    """Bits per dimension: an upper bound of what a model needs to code real images."""
    import numpy as np

    from tessera import distributed
    from tessera.files import atomic_file
    from tessera.metrics.images import open_images
    from tessera.metrics.likelihood import dataset_bits
    from tessera.pipelines.diffusion import DiffusionPipeline
    from tessera.pipelines.loading import load
    from tessera.progress import progress

    if out is not None:
        check_destination(out, "terms", overwrite=overwrite, source=data)
    parts = import_parts(own_parts)
    with distributed.session(device) as where:
        pipe, images = load(pipeline, ema=ema, device=where, parts=parts), open_images(data)
        if not isinstance(pipe, DiffusionPipeline):
            raise TesseraError(
                f"{pipeline} is a pipeline of kind {pipe.kind}, whose likelihood is not known; "
                "name one of kind diffusion or experts"
            )
        pipe.check_complete()
        count = min(num, len(images))
        with progress("bits per dimension", count, unit="images") as bar:
            bits = dataset_bits(
                pipe.denoiser, images, count, batch=batch, seed=seed, device=pipe.device,
                steps=steps, noise_schedule=noise_schedule, clip=clip,
                low_resolution=pipe.recipe.low_resolution, advance=bar.advance,
            )  # fmt: skip
    if out is not None:
        names = ("vb", "mse", "noise_mse", "prior")
        with atomic_file(out) as file:
            np.savez(file, **{name: getattr(bits, name).numpy() for name in names})
    total = bits.total.mean().item()
    values = {
        "bits_per_dimension": total,
        "prior": bits.prior.mean().item(),
        "images": count,
        "steps": bits.vb.shape[1],
    }
    if as_json:
        print(json.dumps(values, indent=2))
    else:
        rows = {
            "bits per dimension, at most": f"{total:.4f}",
            "of which about noise alone": f"{values['prior']:.2g}",
            "images": f"{count:,}",
            "steps": values["steps"],
        }
        print_facts(rows, "Likelihood", boxed=True)

"""Opening saved pipelines of every kind."""

from __future__ import annotations

from pathlib import Path

import torch

from tessera import distributed
from tessera.errors import CheckpointError, TesseraError
from tessera.pipelines import folder as folders
from tessera.pipelines.experts import load_experts
from tessera.pipelines.pipeline import Pipeline
from tessera.recipes.build import build_codec, build_denoiser
from tessera.recipes.loading import parse_recipe
from tessera.recipes.schema import PixelCodec


def load(
    source: str | Path,
    *,
    ema: str | int | None = None,
    device: torch.device | str | None = None,
    vae: str | Path | None = None,
) -> Pipeline:
    """Open a pipeline folder, the folder of a run, or `user/name` on the Hugging Face hub.

    Args:
        ema: name of another average than the default, see `Pipeline.emas`.
        device: where the model goes; by default the fastest of this machine, as on the command
            line: a GPU, Apple's, or the CPU.
        vae: folder or hub id of the VAE of a model of latents, in place of the recipe's.

    Raises:
        CheckpointError: there is none, or it is damaged or of a kind not known here.
        TesseraError: a VAE for a model of pixels, or a device that this machine has not.

    Example:
        >>> pipe = tessera.load("runs/a", device="cpu")  # doctest: +SKIP
    """
    where = distributed.device(None if device is None else str(device))
    folder = folders.find_folder(source)
    config = folders.read_config(folder)
    if config.kind == "experts":
        return _with_vae(load_experts(folder, config, ema=ema, device=where), source, vae)
    if config.kind != "diffusion":
        raise CheckpointError(
            f"{folder} is a pipeline of kind {config.kind!r}, which this tessera does not "
            "know. Install a newer tessera"
        )
    entry = folders.choose_weights(config, None if ema is None else str(ema))
    recipe = parse_recipe(config.recipe)
    # A model that is built draws initial weights; the caller's random state is not ours.
    with torch.random.fork_rng(devices=[]):
        denoiser = build_denoiser(recipe)
    folders.load_weights(folder, entry, denoiser.network)
    if recipe.training.channels_last:
        denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pipe = Pipeline(
        recipe,
        denoiser,
        images_seen=config.images_seen,
        class_names=config.class_names,
        ema=entry.name,
        emas=[weights.name for weights in config.weights],
        checksum=entry.sha256,
    )
    return _with_vae(pipe.to(where), source, vae)


def _with_vae(pipe: Pipeline, source: str | Path, vae: str | Path | None) -> Pipeline:
    if vae is not None:
        if isinstance(pipe.recipe.codec, PixelCodec):
            raise TesseraError(f"{source} makes pixels, not latents; leave out the VAE")
        pipe.codec = build_codec(pipe.recipe.codec, str(vae))
    return pipe

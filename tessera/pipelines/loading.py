"""Opening saved pipelines of every kind."""

from __future__ import annotations

from pathlib import Path

import torch

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
    device: torch.device | str = "cpu",
    vae: str | Path | None = None,
) -> Pipeline:
    """Open a pipeline folder, the folder of a run, or `user/name` on the Hugging Face hub.

    Args:
        ema: name of another average than the default, see `Pipeline.emas`.
        vae: folder or hub id of the VAE of a model of latents, in place of the recipe's.

    Raises:
        CheckpointError: there is none, or it is damaged or of a kind not known here.
        TesseraError: a VAE for a model of pixels.
    """
    folder = folders.find_folder(source)
    config = folders.read_config(folder)
    if config.kind == "experts":
        return load_experts(folder, config, ema=ema, device=device)
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
    if vae is not None:
        if isinstance(recipe.codec, PixelCodec):
            raise TesseraError(f"{source} makes pixels, not latents; leave out the VAE")
        pipe.codec = build_codec(recipe.codec, str(vae))
    return pipe.to(device)

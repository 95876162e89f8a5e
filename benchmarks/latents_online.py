"""What encoding in the step costs: training steps on a cache of latents and on its images."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import device, interleaved, record, seconds, section
from benchmarks.patch import learner, write_images
from tessera.data.codec import VaeCodec
from tessera.data.dataset import open_dataset
from tessera.data.encoding import write_latents
from tessera.recipes.loading import load_recipe
from tessera.recipes.schema import Recipe
from tessera.training.feed import Feed

RESOLUTION, BATCH, IMAGES = 64, 8, 16


def save_vae(folder: Path) -> int:
    """An autoencoder with the proportions of Stable Diffusion's and random weights; its size."""
    diffusers: Any = importlib.import_module("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
    )
    vae.save_pretrained(folder)
    return sum(p.numel() for p in [*vae.encoder.parameters(), *vae.quant_conv.parameters()])


def recipe_of(data: Path, vae: Path, *overrides: str) -> Recipe:
    """`cifar10-small`'s U-Net on latents of 8x8."""
    return load_recipe(
        "cifar10-small",
        [f"data.path={data}", f"data.resolution={RESOLUTION}", "data.num_classes=0",
         "data.xflip=false", "augment=null", "codec.kind=vae", f"codec.model={vae}",
         f"training.batch={BATCH}", "training.images=1e12", *overrides],
    )  # fmt: skip


def stepper(recipe: Recipe, stack: ExitStack) -> tuple[Callable[[], Any], Feed]:
    """A function that reads a batch and makes a step of it, and where it is from."""
    feed, target, seen = Feed(recipe, device()), learner(recipe), 0
    batches = stack.enter_context(feed.batches(0))

    def step() -> None:
        nonlocal seen
        batch = next(batches)
        target.update(feed.micro_batches(batch), batch.plan.images, seen)
        seen += batch.plan.images

    return step, feed


def run(rounds: int, record_figures: bool) -> None:
    """Time steps on a cache and with the encoder in them."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        size = save_vae(folder / "vae")
        write_images(folder / "images.safetensors", RESOLUTION)
        cache = folder / "latents.safetensors"
        codec = VaeCodec(str(folder / "vae"), scale=0.18215)
        write_latents(
            open_dataset(folder / "images.safetensors", max_images=IMAGES), codec, cache,
            device=device(),
        )  # fmt: skip
        images = folder / "images.safetensors", folder / "vae", "codec.encode=online"
        made = {
            "cached": stepper(recipe_of(cache, folder / "vae"), stack),
            "online": stepper(recipe_of(*images), stack),
        }
        times = interleaved({name: step for name, (step, _) in made.items()}, rounds)
        rows = []
        for name, (step, feed) in made.items():
            feed.reports(1.0)
            share = feed.reports(seconds(step)).get("encoder_share", 0.0)
            rows.append(
                [name, f"{1000 * times[name]:.0f}", f"{BATCH / times[name]:.1f}",
                 f"{times[name] / times['cached']:.2f}x", f"{share:.0%}"]
            )  # fmt: skip
    text = section(
        f"Steps of {BATCH} images of {RESOLUTION}x{RESOLUTION} (latents of 8x8) with the U-Net of "
        f"cifar10-small; the encoder has {size / 1e6:.1f} M parameters",
        ["training", "ms a step", "images/s", "time / cached", "encoder's share"],
        rows,
    )
    if record_figures:
        record("Latents: encoded in the step", text)

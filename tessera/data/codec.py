"""Between uint8 images and model space: the pixels themselves, or the latents of a VAE."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tessera.errors import CheckpointError, TesseraError, require_extra
from tessera.files import atomic_folder, is_hub_id, split_hub_id
from tessera.images import from_uint8, to_uint8
from tessera.randomness import Draws

_PIXELS_AT_ONCE = 4 * 256 * 256


class Codec(Protocol):
    """Turns samples into images."""

    def prepare(self) -> None:
        """Load what decoding needs, so that it cannot fail later.

        Raises:
            TesseraError: it is missing; the message says where it belongs.
        """
        ...

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the image of a sample of `shape` in model space."""
        ...

    def encode_mean(self, images: Tensor) -> Tensor:
        """uint8 images [B, C', H', W'] to model space [B, C, H, W]; of latents, their mean."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Model space [B, C, H, W] to uint8 images [B, C', H', W']."""
        ...

    def train(self, images: Tensor, draws: Draws) -> Tensor:
        """What a data set of this codec holds, [B, ...], as it is trained on, [B, C, H, W].

        Pixels may stay uint8, so that only those that are trained on need be converted.
        """
        ...

    def describe(self) -> dict[str, Any] | None:
        """What decides how images are decoded, as plain JSON values; None for pixels."""
        ...

    def save(self, folder: Path) -> None:
        """Write what decoding needs as a folder that `codec.model` may name.

        Raises:
            TesseraError: nothing is needed.
        """
        ...


class PixelCodec:
    """Model space is the pixels, -1 to 1."""

    def prepare(self) -> None:
        """Nothing is needed."""

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The sample's own."""
        return shape

    def encode_mean(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to model space."""
        return from_uint8(images)

    def decode(self, x: Tensor) -> Tensor:
        """Model space [B, C, H, W] to uint8 of the same shape."""
        return to_uint8(x)

    def train(self, images: Tensor, draws: Draws) -> Tensor:
        """The pixels themselves."""
        return images

    def describe(self) -> dict[str, Any] | None:
        """Nothing but the recipe decides."""
        return None

    def save(self, folder: Path) -> None:
        """Refused."""
        raise TesseraError("a model of pixels has no autoencoder to save along; leave out `codec`")


class VaeCodec:
    """Model space is the latents z of a KL autoencoder, (z - shift) * scale.

    The autoencoder is loaded when it is first needed, and computes in float32.

    Args:
        model: folder with `config.json` and safetensors weights as diffusers writes them, or
            Hugging Face id.
        channels: of the latents; None for the autoencoder's own.
        downsample: side of the images / side of the latents; None for the autoencoder's own.
        scale, shift: of the latents; None for those in its configuration.
    """

    def __init__(
        self,
        model: str,
        channels: int | None = None,
        downsample: int | None = None,
        scale: float | None = None,
        shift: float | None = None,
    ) -> None:
        self.model = os.path.expanduser(model)
        self._channels, self._downsample = channels, downsample
        self._scale, self._shift = scale, shift
        self._vae: Any = None

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self._channels or int(self._load().config.latent_channels)

    @property
    def downsample(self) -> int:
        """Side of the images / side of the latents."""
        return self._downsample or _downsample(self._load())

    @property
    def scale(self) -> float:
        """Factor of the latents."""
        return self._scale or float(self._load().config.scaling_factor)

    @property
    def shift(self) -> float:
        """What is taken from the latents before they are scaled."""
        if self._shift is None:
            return float(getattr(self._load().config, "shift_factor", None) or 0)
        return self._shift

    def prepare(self) -> None:
        """Load the autoencoder.

        Raises:
            TesseraError: it is missing or another one than the recipe says, or diffusers is not
                installed.
        """
        self._load()

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(3, H, W) in pixels of the image of latents of `shape`."""
        return 3, shape[1] * self.downsample, shape[2] * self.downsample

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] to mean and log-variance, float32 [B, 2 C, H/f, W/f].

        The log-variance is cut to [-30, 20], as whenever it is used.
        """
        vae = self._load().to(images.device)
        with _float32(images.device):
            parts = [
                torch.cat([posterior.mean, posterior.logvar], dim=1)
                for chunk in torch.split(images, _chunk(images.shape[2] * images.shape[3]))
                for posterior in (vae.encode(from_uint8(chunk)).latent_dist,)
            ]
        return torch.cat(parts)

    def encode_mean(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] to the means of their latents, [B, C, H/f, W/f]."""
        mean, _ = self.encode(images).chunk(2, dim=1)
        return (mean - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Latents [B, C, H, W] to uint8 images [B, 3, f H, f W]; a few at a time, in float32."""
        vae = self._load().to(x.device)
        latents = x.to(torch.float32) / self.scale + self.shift
        pixels = x.shape[2] * x.shape[3] * self.downsample**2
        with _float32(x.device):
            return torch.cat(
                [to_uint8(vae.decode(z).sample) for z in torch.split(latents, _chunk(pixels))]
            )

    def train(self, images: Tensor, draws: Draws) -> Tensor:
        """Latents in model space from means and log-variances [B, 2 C, h, w]; draws "latent".

        Samples in model space [B, C, h, w], which some sets hold in their place, are used as such.
        """
        if images.shape[1] == self.channels:
            return images.to(torch.float32)
        return sample_posterior(images, draws, self.scale, self.shift)

    def save(self, folder: Path) -> None:
        """Write the autoencoder as diffusers does, weights as safetensors; whole or not at all."""
        with atomic_folder(folder) as part:
            self._load().save_pretrained(part, safe_serialization=True)

    def describe(self) -> dict[str, Any] | None:
        """The autoencoder, by its weights wherever they lie, and the scaling."""
        return {"vae": _digest(self._load()), "scale": self.scale, "shift": self.shift}

    def _load(self) -> Any:
        if self._vae is None:
            vae = _open(self.model)
            found = {"channels": int(vae.config.latent_channels), "downsample": _downsample(vae)}
            for key, value in found.items():
                wanted = getattr(self, f"_{key}")
                if wanted not in (None, value):
                    raise CheckpointError(
                        f"the VAE {self.model} has codec.{key} {value}, but the recipe says "
                        f"{wanted}. Name another VAE, or use the recipe that fits this one"
                    )
            self._vae = vae
        return self._vae


def sample_posterior(moments: Tensor, draws: Draws, scale: float, shift: float = 0.0) -> Tensor:
    """Latents in model space from means and log-variances [B, 2 C, h, w]: float32 [B, C, h, w].

    Draws "latent", the posterior's noise. A log-variance above 20 is cut, as released code does.
    """
    mean, log_variance = moments.to(torch.float32).chunk(2, dim=1)
    noise = draws.normal("latent", *mean.shape[1:])
    return (mean + (0.5 * log_variance.clamp(max=20)).exp() * noise - shift) * scale


def _open(model: str) -> Any:
    """diffusers' AutoencoderKL of a folder or a hub id, in float32 on the CPU, frozen."""
    folder = Path(model)
    put = (
        "Name a folder that holds config.json and diffusion_pytorch_model.safetensors, by --vae "
        "or codec.model; `hf download stabilityai/sd-vae-ft-ema --local-dir sd-vae-ft-ema` fetches "
        "one where there is a network"
    )
    is_folder = folder.is_dir()
    if is_folder and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} holds no weights of a VAE as safetensors (pickles, .bin or .ckpt, are never "
            f"loaded). {put}"
        )
    if not is_folder and not is_hub_id(model):
        raise CheckpointError(f"there is no VAE folder {model!r}. {put}")
    diffusers = require_extra("diffusers", "latents", f"the VAE {model}")
    name, revision = (model, None) if is_folder else split_hub_id(model)
    try:
        with _quiet():
            vae = diffusers.AutoencoderKL.from_pretrained(
                name,
                revision=revision,
                use_safetensors=True,
                local_files_only=is_folder,
                low_cpu_mem_usage=False,
                torch_dtype=torch.float32,
            )
    except Exception as error:  # of many kinds: the hub's, the network's, damaged files
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"the VAE {model} cannot be loaded ({reason[0]}). {put}") from error
    return vae.eval().requires_grad_(False)


def _digest(vae: Any) -> str:
    """SHA-256 of an autoencoder's weights and their names."""
    found = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().contiguous().numpy())
    return found.hexdigest()


def _downsample(vae: Any) -> int:
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _chunk(pixels: int) -> int:
    """Images at once; decoding takes about half a gigabyte for one of 256x256."""
    return max(1, _PIXELS_AT_ONCE // pixels)


def _float32(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that diffusers logs while it loads."""
    logger = logging.getLogger("diffusers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

"""The unconditional image generation example of diffusers, on its public API, by the clock.

Network, optimiser, loss, schedule and averages are those that the example documents: `UNet2DModel`
with attention at one level, `DDPMScheduler` of 1,000 steps with linear betas, the noise as what is
predicted, AdamW at 1e-4 with betas 0.95 and 0.999 and a weight decay of 1e-6, gradients clipped at
1, 500 steps of warm-up and then a cosine, averages with warm-up up to 0.9999. What is kinder than
the example: images are decoded before the clock starts, the quicker of two memory layouts is used,
and a network may be told the classes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tessera.errors import require_extra
from tessera.images import from_uint8
from tessera.precision import Concrete, autocast
from tessera.sampling.seeds import SeedNoise

STEPS = 1000  # of the process that is learnt
WARMUP = 500  # steps of the optimiser
_CHANNELS_OF_GROUP = 4  # as 32 groups of 128 channels have
_SAMPLERS: dict[str, tuple[str, str]] = {
    "ddpm": ("DDPMScheduler", "DDPM"),
    "ddim": ("DDIMScheduler", "DDIM"),
    "dpm": ("DPMSolverMultistepScheduler", "DPM-Solver++"),
}


def _diffusers() -> ModuleType:
    return require_extra("diffusers", "latents", "the training loop of its example")


@dataclass(frozen=True)
class Sampler:
    """A scheduler of diffusers with a number of steps; each step evaluates the network once.

    Attributes:
        kind: ddpm, ddim or dpm.
        steps: of sampling, at most `STEPS`.
    """

    kind: str
    steps: int

    @property
    def label(self) -> str:
        """In words."""
        return f"{_SAMPLERS[self.kind][1]}, {self.steps} steps"

    def scheduler(self) -> Any:
        """A fresh one, of the process that is learnt."""
        module = _diffusers()
        config = module.DDPMScheduler(num_train_timesteps=STEPS, beta_schedule="linear").config
        made = getattr(module, _SAMPLERS[self.kind][0]).from_config(config)
        made.set_timesteps(self.steps)
        return made


def parse_samplers(text: str) -> list[Sampler]:
    """An option `ddim-50,dpm-25` as a list; nothing for an empty text."""
    found = []
    for word in text.split(",") if text else []:
        kind, _, steps = word.partition("-")
        if kind not in _SAMPLERS or not steps.isdecimal() or not 0 < int(steps) <= STEPS:
            raise argparse.ArgumentTypeError(
                f"{word!r} is not ddpm, ddim or dpm with steps, like ddim-50"
            )
        found.append(Sampler(kind, int(steps)))
    return found


def unet(side: int, channels: int, classes: int, width: int) -> nn.Module:
    """UNet2DModel of a width: for 32x32 as diffusers' models of CIFAR-10, else as its example.

    Args:
        side, channels: of the images.
        classes: that it is told; 0 for none, as in the example.
        width: channels of the first level, a multiple of 4; those models have 128.
    """
    small = side <= 32
    multiples: Sequence[int] = (1, 2, 2, 2) if small else (1, 1, 2, 2, 4, 4)
    attended = 1 if small else 4
    # No level can be smaller than a pixel.
    levels = min(len(multiples), side.bit_length())
    attended = min(attended, levels - 1)
    down = ["AttnDownBlock2D" if i == attended else "DownBlock2D" for i in range(levels)]
    made: nn.Module = _diffusers().UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=2,
        block_out_channels=tuple(width * multiple for multiple in multiples[:levels]),
        norm_num_groups=width // _CHANNELS_OF_GROUP,
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        num_class_embeds=classes or None,
    )
    return made


def parameters(network: nn.Module) -> int:
    """Numbers that are learnt."""
    return sum(p.numel() for p in network.parameters())


def nearest_width(side: int, channels: int, classes: int, size: int) -> int:
    """The width whose network is nearest to `size` parameters; a multiple of 8."""

    def distance(width: int) -> int:
        with torch.device("meta"):
            return abs(parameters(unet(side, channels, classes, width)) - size)

    best = 8
    while distance(best + 8) < distance(best):
        best += 8
    return best


class Example:
    """The example's training of one network, step by step, and its sampling.

    Args:
        network: of `unet`.
        images: uint8 [N, C, H, W], all of them.
        labels: int64 [N], or None where the network is told no classes.
        batch: images of a step; 16 in the example.
        flip: mirror half of the images, an option of the example.
        seed: of all that is drawn.
        precision: that networks compute in.
        device: where.
    """

    def __init__(
        self,
        network: nn.Module,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64] | None,
        *,
        batch: int,
        flip: bool,
        seed: int,
        precision: Concrete,
        device: torch.device,
    ) -> None:
        module = _diffusers()
        self.device, self.precision, self.batch, self.seed = device, precision, batch, seed
        self._flip = 0.5 if flip else 0.0
        self.network = network.to(device)
        self._images = torch.from_numpy(images)
        self._labels = None if labels is None else torch.from_numpy(labels)
        self._draws = torch.Generator().manual_seed(seed)
        self._process = module.DDPMScheduler(num_train_timesteps=STEPS, beta_schedule="linear")
        self.layout = self._faster_layout()
        self.network.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self._average = module.training_utils.EMAModel(
            network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4
        )
        self._average.to(device)
        self.steps = 0

    @property
    def images_seen(self) -> int:
        """By the training so far."""
        return self.steps * self.batch

    def train(self, seconds: float) -> Iterator[float]:
        """Train for so long; the seconds so far after each step. What is done between is free.

        The cosine falls to zero at the end of the time: the number of steps, which the example
        knows, is not known here, but steps are as good as time while all take the same. The
        warm-up is of as many steps as there; its time does not count in the cosine, as there.
        """
        spent, warm = 0.0, 0.0
        order = self._order()
        while spent < seconds:
            if self.steps <= WARMUP:
                warm = spent
            if self.steps < WARMUP:
                rate = self.steps / WARMUP
            else:
                rate = 0.5 * (1 + math.cos(math.pi * (spent - warm) / (seconds - warm)))
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-4 * rate
            spent += self._timed(lambda: self._step(next(order)))
            yield spent

    def sample(
        self, sampler: Sampler, seeds: range, classes: int
    ) -> tuple[NDArray[np.uint8], Tensor | None]:
        """Samples uint8 [B, H, W, C] of the averaged weights, and their classes, in turn."""
        scheduler = sampler.scheduler()
        labels = torch.tensor(seeds) % classes if self._labels is not None else None
        told = None if labels is None else labels.to(self.device)
        noise = torch.Generator().manual_seed(self.seed + seeds.start)
        z = SeedNoise(seeds).normal(tuple(self._images.shape[1:])).to(self.device)
        z = z * scheduler.init_noise_sigma
        self._average.store(self.network.parameters())
        self._average.copy_to(self.network.parameters())
        self.network.eval()
        try:
            with torch.inference_mode():
                for t in scheduler.timesteps:
                    out = self._predict(scheduler.scale_model_input(z, t), t.to(self.device), told)
                    z = scheduler.step(out, t, z, generator=noise).prev_sample
        finally:
            self.network.train()
            self._average.restore(self.network.parameters())
        # As the pipelines of diffusers round.
        images = ((z / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
        return images.permute(0, 2, 3, 1).contiguous().numpy(), labels

    def _order(self) -> Iterator[Tensor]:
        """Rows of each step: every image once an epoch, in a new order."""
        while True:
            rows = torch.randperm(len(self._images), generator=self._draws)
            whole = rows[: len(rows) // self.batch * self.batch or None]
            yield from torch.split(whole, self.batch)

    def _step(self, rows: Tensor) -> None:
        clean = from_uint8(self._images[rows])
        flipped = torch.rand(len(clean), generator=self._draws) < self._flip
        clean = torch.where(flipped[:, None, None, None], clean.flip(3), clean).to(self.device)
        told = None if self._labels is None else self._labels[rows].to(self.device)
        noise = torch.randn(clean.shape, generator=self._draws).to(self.device)
        times = torch.randint(0, STEPS, (len(clean),), generator=self._draws).to(self.device)
        noisy = self._process.add_noise(clean, noise, times)
        loss = nn.functional.mse_loss(self._predict(noisy, times, told), noise)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._average.step(self.network.parameters())
        self.steps += 1

    def _predict(self, noisy: Tensor, times: Tensor, labels: Tensor | None) -> Tensor:
        noisy = noisy.contiguous(memory_format=self.layout)
        with autocast(self.device, self.precision):
            out: Tensor = self.network(noisy, times, class_labels=labels).sample
        return out.float()

    def _timed(self, function: Callable[[], None]) -> float:
        begin = perf_counter()
        function()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter() - begin

    def _faster_layout(self) -> torch.memory_format:
        """The memory layout in which forward and backward passes are quicker here."""
        z = torch.zeros(self.batch, *self._images.shape[1:], device=self.device)
        times = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
        told = None if self._labels is None else torch.zeros_like(times)

        def passes() -> None:
            torch.autograd.backward(self._predict(z, times, told).square().mean())

        layouts = (torch.contiguous_format, torch.channels_last)
        best: dict[torch.memory_format, float] = {}
        for attempt in range(3):
            for self.layout in layouts:
                self.network.to(memory_format=self.layout)  # type: ignore[call-overload]
                took = self._timed(passes)
                if attempt:  # the first calls are slow
                    best[self.layout] = min(took, best.get(self.layout, math.inf))
        self.network.zero_grad()
        return min(layouts, key=lambda layout: best[layout])

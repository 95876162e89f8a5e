"""One random stream per image, so that a seed gives the same image in any batch on any device."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.errors import TesseraError

MAX_SEEDS = 10_000_000


class SeedNoise:
    """Random numbers of B images, each from its own generator (a `NoiseSource`).

    The order of use fixes a seed's image: first the latents (float32), then the class index of
    conditional models (drawn also where it is then overridden), then the sampler's noise.

    Args:
        seeds: one per image; taken modulo 2^32.
        device: where the numbers are wanted.
        generator_device: where they are drawn. The CPU, the default, gives the same images on all
            devices; a GPU's own generators repeat the images that the released EDM code makes
            there.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        generator_device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.generators = [
            torch.Generator(generator_device).manual_seed(int(seed) % 2**32) for seed in seeds
        ]

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers [B, *shape]."""
        rows = [
            torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
            for generator in self.generators
        ]
        return self._deliver(torch.stack(rows))

    def integers(self, high: int) -> Tensor:
        """Uniform int64 numbers in 0..high-1, [B]."""
        rows = [
            torch.randint(high, (), generator=generator, device=generator.device)
            for generator in self.generators
        ]
        return self._deliver(torch.stack(rows))

    def _deliver(self, numbers: Tensor) -> Tensor:
        if self.device.type == "cuda" and numbers.device.type == "cpu":
            numbers = numbers.pin_memory()
        return numbers.to(self.device, non_blocking=True)


def parse_seeds(text: str) -> list[int]:
    """Seeds from a list of numbers and inclusive ranges: "0-2,100" is [0, 1, 2, 100].

    Raises:
        TesseraError: a part is no number or range, runs backwards, or repeats a seed.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:\s*-\s*([0-9]+))?\s*", part)
        if match is None:
            raise TesseraError(
                f"seeds {text!r}: {part.strip()!r} is neither a number nor a range. "
                "Write seeds like 0-63,100"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise TesseraError(
                f"seeds {text!r}: the range {part.strip()!r} runs backwards. "
                f"Write it as {last}-{first}"
            )
        if len(seeds) + last - first >= MAX_SEEDS:
            raise TesseraError(
                f"seeds {text!r}: {part.strip()!r} makes it more than {MAX_SEEDS:,} images. "
                "Split the work into several commands"
            )
        seeds.extend(range(first, last + 1))
    seen: set[int] = set()
    for seed in seeds:
        if seed in seen:
            raise TesseraError(f"seeds {text!r}: seed {seed} occurs twice. Name each seed once")
        seen.add(seed)
    return seeds

"""Relay diffusion: block DCT, blur and block noise beside others; a relay beside one model.

All variants of a table work on the same images and are timed in turns; each first shows that it
gives the same numbers. The FFT route is that of the usual DCT packages: a complex FFT of reordered
pixels (Makhoul 1980), axis by axis, on blocks that were cut out. The last table compares whole
images: of a small relay and of a single model of its high resolution, with as many evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import device, interleaved, record, section
from tessera.diffusion.blur import (
    Blur,
    BlurCorruption,
    block_dct,
    block_idct,
    block_noise,
    dct_matrix,
)
from tessera.pipelines.base import Pipeline
from tessera.pipelines.loading import build_pipeline
from tessera.pipelines.relay import assemble_relay
from tessera.randomness import AddressedDraws
from tessera.recipes.loading import load_recipe

SIDE, BLOCK = 256, 4
REPEATS = 10
"""Timed calls of each variant in a round, as one takes milliseconds."""

Variants = dict[str, Callable[[], Tensor]]
OURS, FFT, LOOP = "matrix products", "FFT", "loop over blocks"
WINDOW, ROLLS = "window sums", "loop over shifts"


def fft_dct(x: Tensor) -> Tensor:
    """The orthonormal DCT-II along the last axis by a complex FFT."""
    size = x.shape[-1]
    reordered = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    k = torch.arange(size, device=x.device, dtype=x.dtype)
    turn = torch.polar(torch.ones_like(k), -math.pi * k / (2 * size))
    coefficients: Tensor = (torch.fft.fft(reordered) * turn).real * math.sqrt(2 / size)
    coefficients[..., 0] /= math.sqrt(2)
    return coefficients


def fft_idct(coefficients: Tensor) -> Tensor:
    """The inverse of `fft_dct`."""
    size = coefficients.shape[-1]
    scaled = coefficients / math.sqrt(2 / size)
    scaled[..., 0] *= math.sqrt(2)
    k = torch.arange(size, device=scaled.device, dtype=scaled.dtype)
    turn = torch.polar(torch.ones_like(k), math.pi * k / (2 * size))
    mirrored = torch.cat([torch.zeros_like(scaled[..., :1]), scaled[..., 1:].flip(-1)], dim=-1)
    reordered = torch.fft.ifft(torch.complex(scaled, -mirrored) * turn).real
    x = torch.empty_like(scaled)
    half = (size + 1) // 2
    x[..., ::2], x[..., 1::2] = reordered[..., :half], reordered[..., half:].flip(-1)
    return x


def cut(x: Tensor) -> Tensor:
    """Images [B, C, H, W] to their blocks [B, C, H / s, W / s, s, s]."""
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, channels, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    return parts.transpose(3, 4)


def joined(blocks: Tensor) -> Tensor:
    """The inverse of `cut`."""
    batch, channels, rows, columns = blocks.shape[:4]
    shape = (batch, channels, rows * BLOCK, columns * BLOCK)
    return blocks.transpose(3, 4).reshape(shape)


def both_axes(transform: Callable[[Tensor], Tensor], blocks: Tensor) -> Tensor:
    return transform(transform(blocks).transpose(-1, -2)).transpose(-1, -2)


def fft_block_dct(x: Tensor) -> Tensor:
    return joined(both_axes(fft_dct, cut(x)))


def fft_blur(x: Tensor, factors: Tensor) -> Tensor:
    """The blur by DCT and inverse, with tables [B, s, s]."""
    blocks = both_axes(fft_dct, cut(x)) * factors[:, None, None, None]
    return joined(both_axes(fft_idct, blocks))


def fft_block_noise(white: Tensor) -> Tensor:
    """The circular convolution with a window as a product of FFTs."""
    window = torch.zeros(white.shape[-2:], device=white.device)
    window[:BLOCK, :BLOCK] = 1 / BLOCK
    product = torch.fft.rfft2(white) * torch.fft.rfft2(window)
    noise: Tensor = torch.fft.irfft2(product, s=white.shape[-2:])
    return noise


def loop_blocks(x: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """`transform` [B, C, s, s] of each block of all images, one by one."""
    y = torch.empty_like(x)
    for row in range(0, x.shape[-2], BLOCK):
        for column in range(0, x.shape[-1], BLOCK):
            here = (..., slice(row, row + BLOCK), slice(column, column + BLOCK))
            y[here] = transform(x[here])
    return y


def loop_blur(x: Tensor, factors: Tensor, matrix: Tensor) -> Tensor:
    def one(block: Tensor) -> Tensor:
        return matrix.mT @ (matrix @ block @ matrix.mT * factors[:, None]) @ matrix

    return loop_blocks(x, one)


def loop_block_noise(white: Tensor) -> Tensor:
    """The sum of all shifted fields."""
    total = torch.zeros_like(white)
    for i in range(BLOCK):
        for j in range(BLOCK):
            total += white.roll((i, j), dims=(-2, -1))
    return total / BLOCK


def agreeing(variants: Variants) -> Variants:
    """The variants, after a look at whether they give the same."""
    first, *others = (function() for function in variants.values())
    for name, other in zip(list(variants)[1:], others, strict=True):
        error = float((other - first).abs().max())
        if error > 2e-5:
            raise AssertionError(f"{name} is {error:g} off")
    return variants


def operations(batch: int) -> dict[str, Variants]:
    """The tables' variants, on `batch` images."""
    where = device()
    x = torch.randn(batch, 3, SIDE, SIDE, device=where)
    sigma = torch.linspace(0.02, 1.5, batch, device=where)
    blur, matrix = Blur(block=BLOCK), dct_matrix(BLOCK, torch.float32, where)
    factors = blur.factors(sigma)
    return {
        "Block DCT": {
            OURS: lambda: block_dct(x, BLOCK),
            FFT: lambda: fft_block_dct(x),
            LOOP: lambda: loop_blocks(x, lambda block: matrix @ block @ matrix.mT),
        },
        "Block DCT and its inverse": {
            OURS: lambda: block_idct(block_dct(x, BLOCK), BLOCK),
            FFT: lambda: joined(both_axes(fft_idct, both_axes(fft_dct, cut(x)))),
            LOOP: lambda: loop_blocks(
                x, lambda block: matrix.mT @ (matrix @ block @ matrix.mT) @ matrix
            ),
        },
        "Blur": {
            OURS: lambda: blur(x, sigma),
            FFT: lambda: fft_blur(x, factors),
            LOOP: lambda: loop_blur(x, factors, matrix),
        },
        "Block noise": {
            WINDOW: lambda: block_noise(x, BLOCK),
            FFT: lambda: fft_block_noise(x),
            ROLLS: lambda: loop_block_noise(x),
        },
    }


def corruption_parts(batch: int) -> Variants:
    """The whole forward process of a batch, and its parts that are not relay's own."""
    where = device()
    x = torch.randn(batch, 3, SIDE, SIDE, device=where)
    sigma = torch.linspace(0.02, 1.5, batch, device=where)
    draws = AddressedDraws(0, torch.arange(batch, device=where))
    corruption = BlurCorruption(blur=Blur(block=BLOCK))
    return {
        "blur, noise and block noise": lambda: corruption(x, sigma, draws),
        "two draws of white noise": lambda: (
            draws.normal("noise", 3, SIDE, SIDE) + draws.normal("block_noise", 3, SIDE, SIDE)
        ),
    }


def models() -> dict[str, tuple[Pipeline, dict[str, Any]]]:
    """A small relay and a single model of its high resolution, and how they sample.

    Their weights are fresh; both make as many evaluations for an image.
    """
    stages = [
        build_pipeline(load_recipe(f"cifar10-small-relay-{stage}")) for stage in ("first", "second")
    ]
    relay, single = assemble_relay(stages), build_pipeline(load_recipe("cifar10-small"))
    steps: dict[str, Any] = {"first.steps": 9, "second.steps": 18}
    evaluations = relay.cost(**steps).evaluations
    return {
        "relay, 8x8 to 32x32": (relay, steps),
        "single, 32x32": (single, {"solver": "euler", "steps": evaluations}),
    }


def model_rows(rounds: int, images: int) -> list[list[str]]:
    """Evaluations, FLOPs and time of an image of each model, and both beside the single one's."""
    pipes = {name: (pipe.to(device()), options) for name, (pipe, options) in models().items()}

    def sampling(pipe: Pipeline, options: dict[str, Any]) -> Callable[[], object]:
        return lambda: pipe.sample(range(images), batch=images, **options)

    times = interleaved({name: sampling(*pipe) for name, pipe in pipes.items()}, rounds)
    costs = {name: pipe.cost(**options) for name, (pipe, options) in pipes.items()}
    *_, single = costs
    return [
        [
            name,
            str(cost.evaluations),
            f"{cost.sample_flops / 1e9:.3g}",
            f"{times[name] / images * 1e3:.3g}",
            f"{cost.sample_flops / costs[single].sample_flops:.2f}",
            f"{times[name] / times[single]:.2f}",
        ]
        for name, cost in costs.items()
    ]


def run(rounds: int, record_figures: bool) -> None:
    """Time all variants, print the tables, and keep them if asked to."""
    batch = 64 if device().type == "cuda" else 8
    rows = []
    for name, variants in operations(batch).items():
        times = interleaved(agreeing(variants), rounds * REPEATS)
        first = next(iter(times))
        rows += [
            [name, kind, f"{value / batch * 1e3:.3f}", f"{value / times[first]:.1f}x"]
            for kind, value in times.items()
        ]
    columns = ["operation", "by", "ms an image", "of the first"]
    title = f"{SIDE}x{SIDE} images in blocks of {BLOCK}x{BLOCK}, {batch} at once, float32"
    text = [section(title, columns, rows)]
    parts = interleaved(corruption_parts(batch), rounds * REPEATS)
    whole = [[name, f"{value / batch * 1e3:.3f}"] for name, value in parts.items()]
    text.append(section("The forward process of a training step", ["part", "ms an image"], whole))
    columns = ["model", "evaluations", "GFLOP an image", "ms an image", "FLOPs of single", "time"]
    title = f"Whole images at equal evaluations, {batch} at once"
    text.append(section(title, columns, model_rows(rounds, batch)))
    if record_figures:
        record("Relay diffusion: blur and block noise", "\n\n".join(text))

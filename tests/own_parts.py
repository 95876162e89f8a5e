"""A user's own parts, small enough to train in a test; also a module for `--with own_parts`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from data_files import random_images
from torch import nn

from tessera.model import Tuning
from tessera.sampling.core import Sampler, SamplerState, denoise
from tessera.sampling.edm import edm_sampler
from tessera.sampling.levels import edm_levels

TUNED = {"scale": Tuning(lr=0.1), "plain.weight": Tuning(decay=False)}


class Net(nn.Module):
    """Two convolutions, the noise level and the class."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.told = nn.Linear(1 + classes, width)
        self.plain = nn.Conv2d(width, channels, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.classes = classes

    def forward(self, x, noise, cond):
        told = noise[:, None]
        if self.classes:
            known = torch.arange(self.classes, device=x.device) == cond.labels[:, None]
            told = torch.cat([told, known.to(x.dtype)], dim=1)
        hidden = self.first(x) + self.told(told)[:, :, None, None]
        return self.plain(nn.functional.silu(hidden)) * self.scale

    def tuning(self) -> dict[str, Tuning]:
        return TUNED


def network(recipe, width=4):
    return Net(recipe.shape[0], recipe.data.num_classes, width)


class Objective(nn.Module):
    """The squared error at one noise level, with a weight that is learned, too."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma
        self.log_weight = nn.Parameter(torch.zeros(()))

    def forward(self, model, x, cond, draws):
        sigma = torch.full((len(x),), self.sigma, device=x.device)
        z = x + self.sigma * draws.normal("noise", *x.shape[1:])
        error = (model(z, sigma, cond).mean - x).square().sum((1, 2, 3))
        return {"loss": error * self.log_weight.exp() - self.log_weight, "mse": error}


def objective(recipe, sigma=0.5):
    return Objective(sigma)


def walk(denoiser, latents, cond, noise, levels, *, gain=1.0, refine=None) -> Iterator[Any]:
    x = latents.double() * levels[0]
    for i, (sigma, to) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True)):
        denoised = denoise(denoiser, x, sigma, cond)
        x = denoised + gain * to / sigma * (x - denoised)
        x = x if refine is None else refine(denoiser, x, to, cond, noise)
        yield SamplerState(i + 1, len(levels), to, x, denoised)


def sampler(steps=2, **options):
    return Sampler(partial(edm_levels, steps=steps), partial(walk, **options))


def refine(shift=0.0):
    return lambda denoiser, x, sigma, cond, noise: x + shift


class Images:
    """A data set over a list of arrays."""

    def __init__(self, count: int = 30) -> None:
        self.name, self.images = "mine", [*random_images(count)]
        self.shape = self.images[0].shape
        self.labels = np.arange(count) % 2
        self.class_names, self.num_classes = ("even", "odd"), 2

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices):
        return np.stack([self.images[index] for index in indices])

    def close(self) -> None:
        pass


def dataset(recipe):
    return Images()


def euler(steps=3):
    """A sampler of the library under the caller's name."""
    return edm_sampler(steps=steps, solver="euler")

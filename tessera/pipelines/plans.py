"""How a denoiser samples: the options of a call, and the plan that is made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.data.codec import Codec
from tessera.diffusion.denoiser import Denoiser
from tessera.errors import TesseraError
from tessera.pipelines.base import Pipeline
from tessera.pipelines.canvas import Canvas
from tessera.pipelines.options import (
    Precision,
    choose_sampler,
    fill,
    foreign_sampler_options,
)
from tessera.recipes.schema import (
    BricksConfig,
    CanvasConfig,
    GuidanceConfig,
    LargerConfig,
    Recipe,
    SamplerConfig,
    Section,
)
from tessera.sampling.core import NoiseSource, Report, Sampler, SamplerState, enlarged

Pictures = NDArray[np.uint8] | Tensor
"""Pictures to start from: images, uint8 [N, h, w, C], or what is in model space, [N, C, h, w]."""


@dataclass(frozen=True)
class SampleOptions:
    """Everything that decides how a denoiser samples.

    Attributes:
        sampler: noise levels and solver.
        guidance: by the model without class, or by `guide`.
        canvas: the part of the picture that is made, or a larger one.
        network: what this kind of network can do while sampling; None for nothing.
        guide: a weaker model to guide by.
        start_from: the pictures that a model starts from; seed s takes number s modulo N.
        latents: [N, C, H, W], unit normal numbers in place of the seeds' own; seed s takes number
            s modulo N.
        precision: arithmetic of the network: "bf16" computes it in bfloat16 where that is safe,
            "auto" only where it is fast, too.
    """

    sampler: SamplerConfig
    guidance: GuidanceConfig
    canvas: LargerConfig
    network: Section | None = None
    guide: Pipeline | Denoiser | None = None
    start_from: Pictures | None = None
    latents: Tensor | None = None
    precision: Precision = "auto"

    @classmethod
    def choose(
        cls,
        recipe: Recipe,
        *,
        guide: Pipeline | Denoiser | None = None,
        start_from: Pictures | None = None,
        latents: Tensor | None = None,
        precision: Precision = "auto",
        sampler: str | None = None,
        **given: Any,
    ) -> SampleOptions:
        """The recipe's own options, with those given in their place.

        Args:
            sampler: another kind of sampler, with its own defaults.
            given: keys of the sections; values may be text.

        Raises:
            TesseraError: an option is unknown, not for this model, or of a value that it cannot
                have.
        """
        sections: dict[str, Section] = dict(cls.sections(recipe, sampler))
        refused = foreign_sampler_options(cast(SamplerConfig, sections["sampler"]))
        refused |= _refused(recipe, sections)
        filled: dict[str, Any] = fill(sections, given, refused)
        try:
            filled["sampler"] = recipe.fit(filled["sampler"])
        except ValueError as error:
            raise TesseraError(str(error)) from None
        return cls(
            **filled, guide=guide, start_from=start_from, latents=latents, precision=precision
        )

    @staticmethod
    def sections(recipe: Recipe, sampler: str | None = None) -> dict[str, Section]:
        """What a model made from `recipe` takes, by name of the attribute."""
        sections: dict[str, Section] = {
            "sampler": choose_sampler(recipe.sampling, sampler),
            "guidance": GuidanceConfig(),
            "canvas": LargerConfig() if recipe.coord_frequencies is None else CanvasConfig(),
        }
        own = recipe.network.sampling_options
        return sections if own is None else {**sections, "network": own}


def _refused(recipe: Recipe, sections: Mapping[str, Section]) -> dict[str, str]:
    """Names that models of other kinds take, and why this one does not."""
    blind = (
        "this model does not know where its pixels lie, so it makes whole pictures only. Leave out "
        "`{}`, or train with view.kind=patches or coords.frequencies=0"
    )
    whole = (
        "only networks made of bricks (network.kind=lego) can skip any; this one is a "
        f"{recipe.network.kind}. Leave out `{{}}`"
    )
    reasons = {name: blind.format(name) for name in CanvasConfig.model_fields}
    reasons |= {name: whole.format(name) for name in BricksConfig.model_fields}
    taken = {name for section in sections.values() for name in type(section).model_fields}
    return {name: reason for name, reason in reasons.items() if name not in taken}


@dataclass(frozen=True)
class Start:
    """What a sampler begins with.

    Attributes:
        latents: [B, C, H, W], unit normal numbers, or pictures enlarged to the canvas.
        image: what the network sees of the pictures, [B, C, h, w]; None for nothing.
    """

    latents: Tensor
    image: Tensor | None = None


@dataclass(frozen=True)
class DiffusionPlan:
    """How the images of one call are made; see `Plan`.

    Attributes:
        canvas: the part of the picture that is made.
        sampler, denoiser: the latter with all wrappers that were asked for.
        autocast: the arithmetic of the network.
        codec: of the pictures to start from.
        start_shape: (C, h, w) of the pictures to start from; None to start from noise.
        seen: the network sees them.
    """

    seeds: Sequence[int]
    classes: NDArray[np.int64] | None
    options: SampleOptions
    canvas: Canvas
    sampler: Sampler
    denoiser: Denoiser
    autocast: torch.autocast
    codec: Codec
    start_shape: tuple[int, int, int] | None = None
    seen: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    def report(self) -> Report:
        """What the refinement says about all samples so far."""
        return self.sampler.report()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample in model space."""
        return self.canvas.channels, *self.canvas.shown

    def networks(self) -> list[nn.Module]:
        """All networks that run, parts of a network that run alone included."""
        return self.denoiser.networks()

    def helpers(self) -> list[nn.Module]:
        """None."""
        return []

    def noise(self, source: NoiseSource) -> NoiseSource:
        """The seeds' noise, or the canvas's part of it."""
        return self.canvas.noise(source)

    def start(
        self, seeds: Sequence[int], noise: NoiseSource, pictures: Tensor | None = None
    ) -> Start:
        """Unit normal numbers (the seeds' own, or the latents given), or enlarged pictures.

        Args:
            pictures: [B, *start_shape] in model space, in place of `start_from`.
        """
        if pictures is None:
            pictures = self.pictures(seeds)
        block, image = self.options.sampler.enlarges, pictures if self.seen else None
        if block is not None:
            assert pictures is not None
            return Start(enlarged(pictures, block), image)
        latents = noise.normal(self.canvas.shape)
        given = self.options.latents
        return Start(latents if given is None else given[_rows(seeds, given)].to(latents), image)

    def states(
        self, seeds: Sequence[int], start: Start, labels: Tensor | None, noise: NoiseSource
    ) -> Iterator[SamplerState]:
        """The steps of the sampler."""
        cond = self._conditioning(labels, start.image, start.latents)
        with self.autocast:
            yield from self.sampler(self.denoiser, start.latents, cond, noise)

    def conditioning(self, seeds: Sequence[int], labels: Tensor | None, x: Tensor) -> Conditioning:
        """What the network is told about the images x [B, C, H, W] of `seeds`."""
        return self._conditioning(labels, self.pictures(seeds) if self.seen else None, x)

    def _conditioning(self, labels: Tensor | None, image: Tensor | None, x: Tensor) -> Conditioning:
        if image is not None:
            image = image.to(torch.float32)
        return Conditioning(labels, coords=self.canvas.coords(len(x), x.device), image=image)

    def pictures(self, seeds: Sequence[int]) -> Tensor | None:
        """The given pictures of these seeds, in model space [B, C, h, w]."""
        given = self.options.start_from
        if given is None:
            return None
        device = next(self.denoiser.parameters()).device
        if isinstance(given, Tensor):
            return given[_rows(seeds, given)].to(device)
        chosen = torch.from_numpy(given[_rows(seeds, given)]).to(device)
        return self.codec.encode_mean(chosen.permute(0, 3, 1, 2))

    def picture(self, x: Tensor) -> Tensor:
        """The part of the canvas x [B, C, H, W] that is shown."""
        return self.canvas.picture(x)


def _rows(seeds: Sequence[int], items: Any) -> list[int]:
    return [seed % len(items) for seed in seeds]


def digest(values: NDArray[Any] | Tensor) -> str:
    """SHA-256 of the numbers."""
    array = values.cpu().numpy() if isinstance(values, Tensor) else values
    return hashlib.sha256(array.tobytes()).hexdigest()


def start_shape(
    recipe: Recipe, sampler: SamplerConfig, canvas: Canvas
) -> tuple[int, int, int] | None:
    """(C, h, w) of the pictures that the canvas starts from; None if it starts from noise.

    Raises:
        TesseraError: the canvas cannot be made of enlarged pictures.
    """
    block = sampler.enlarges
    if block is None:
        return recipe.start_shape
    if canvas.height % block or canvas.width % block or canvas.shown != canvas.shape[1:]:
        raise TesseraError(
            f"pictures of {canvas.shown[0]}x{canvas.shown[1]} pixels (height x width) are not made "
            f"by enlarging others {block} times. Give sides that are multiples of {block}, and "
            "leave out `layout=pad`"
        )
    if canvas.x % block or canvas.y % block:
        raise TesseraError(
            f"the window begins at column {canvas.x} and row {canvas.y}, between the pixels that "
            f"are enlarged {block} times. Let it begin at multiples of {block}"
        )
    return canvas.channels, canvas.height // block, canvas.width // block


def fits_start(shape: tuple[int, int, int], pictures: Pictures, codec: Codec) -> bool:
    """Whether pictures may be started from, by a model that starts from `shape` (C, h, w)."""
    if isinstance(pictures, Tensor):
        return tuple(pictures.shape[1:]) == shape and len(pictures) > 0
    channels, height, width = codec.image_shape(shape)
    return pictures.shape[1:] == (height, width, channels) and len(pictures) > 0


def check_start(plan: DiffusionPlan) -> None:
    """Check that pictures to start from are given exactly where the model wants some.

    Raises:
        TesseraError: they are not.
    """
    shape, pictures = plan.start_shape, plan.options.start_from
    if shape is None and pictures is not None:
        raise TesseraError(
            "`start_from`: this model starts from noise, not from pictures. Leave it out, or train "
            "with low_resolution or objective.kind=blur"
        )
    if shape is None:
        return
    if pictures is None or not fits_start(shape, pictures, plan.codec):
        channels, height, width = plan.codec.image_shape(shape)
        given = "none were given" if pictures is None else f"these are {tuple(pictures.shape)}"
        raise TesseraError(
            f"this model starts from pictures of shape ({height}, {width}, {channels}), and "
            f"{given}. Give them as `start_from`"
        )


def check_latents(options: SampleOptions, shape: tuple[int, int, int]) -> None:
    """Check that latents, if there are any, are [N, *shape].

    Raises:
        TesseraError: they are not.
    """
    latents = options.latents
    if latents is not None and options.sampler.enlarges is not None:
        raise TesseraError("`latents`: this model starts from pictures; give them as `start_from`")
    if latents is not None and (latents.shape[1:] != shape or not len(latents)):
        raise TesseraError(
            f"latents of shape {tuple(latents.shape)}: this model begins with [N, "
            f"{', '.join(map(str, shape))}]"
        )

"""Pipelines of denoisers: noise to images by a sampler, with guidance and on any canvas."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.conditioning import NO_CLASS
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.experts import sigma_range
from tessera.diffusion.guidance import Guided
from tessera.errors import TesseraError
from tessera.model import Model
from tessera.pipelines.base import Pipeline
from tessera.pipelines.canvas import Canvas, choose_canvas
from tessera.pipelines.labels import Label, Seeds, list_seeds
from tessera.pipelines.options import Option, autocast_for, check_batch, listed, samplers
from tessera.pipelines.plans import (
    DiffusionPlan,
    SampleOptions,
    check_latents,
    check_start,
    digest,
    start_shape,
)
from tessera.precision import resolve
from tessera.recipes.build import build_sampler, wrap_network
from tessera.recipes.schema import DdimSamplerConfig, LargerConfig
from tessera.sampling.ddpm import encode_ddim


class DiffusionPipeline(Pipeline):
    """A denoiser, its codec and its recipe.

    Example:
        >>> pipe = tessera.load("runs/a")  # doctest: +SKIP
        >>> pipe.sample(range(4), steps=32, s_churn=10)  # doctest: +SKIP
    """

    kind = "diffusion"
    of_model: ClassVar[type[Model] | None] = Denoiser

    @property
    def denoiser(self) -> Denoiser:
        """The model, as what it is."""
        assert isinstance(self.model, Denoiser)
        return self.model

    def without_weights(self) -> Self:
        # An expert alone makes no images, but costs what it would among the others.
        other = super().without_weights()
        other.recipe = self.recipe.model_copy(update={"expert": None})
        return other

    def options(self, sampler: str | None = None) -> list[Option]:
        sections = SampleOptions.sections(self.recipe, sampler)
        kind = sampler or self.recipe.sampling.kind
        known = tuple(samplers(self.recipe.sampling))
        meaning = f"another: {', '.join(known)}; each has options of its own"
        own = [option for name, section in sections.items() for option in listed(name, section)]
        return [Option("sampler", "sampler", kind, meaning, Literal[known]), *own]

    def plan(
        self, seeds: Seeds, labels: Label | Iterable[Label] | None = None, **options: Any
    ) -> DiffusionPlan:
        """What `sample_batches` was asked for, checked and ready for `run`.

        Args:
            options: `guidance`, its weight, 1 for none; `guidance_interval`, (low, high), the noise
                levels where it acts; `guide`, a weaker model to guide by instead of the model
                without class; `start_from`, `latents`, `precision`: see `SampleOptions`; `sampler`,
                another kind of sampler; options of the sampler in place of the recipe's (`steps`,
                `sigma_max`, `s_churn`, ...); of models that know coordinates, which part of the
                picture to make (`window`, `resolution`, `window_noise`, `mask_coords`); or a larger
                picture (`size`, `layout`, `overlap`); of stacks of bricks, which run (`skip`,
                `bricks`).

        Raises:
            TesseraError: a class or an option that this model cannot have.
        """
        plan = self.open_plan(list_seeds(seeds), labels, **options)
        check_start(plan)
        return plan

    def open_plan(
        self, seeds: Sequence[int], labels: Label | Iterable[Label] | None, **options: Any
    ) -> DiffusionPlan:
        """As `plan`, but pictures to start from may come later, see `DiffusionPlan.start`."""
        return self._plan(seeds, labels, SampleOptions.choose(self.recipe, **options))

    def with_start(self, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("start_from") is not None:
            return options
        shape = self.open_plan([0], None, **options).start_shape
        return options if shape is None else {**options, "start_from": torch.zeros(1, *shape)}

    def _plan(
        self,
        seeds: Sequence[int],
        labels: Label | Iterable[Label] | None,
        options: SampleOptions,
    ) -> DiffusionPlan:
        self.check_complete()
        if isinstance(options.guide, DiffusionPipeline):
            options.guide.check_complete()
        classes = self.choose_labels(seeds, labels)
        if classes is not None and NO_CLASS in classes:
            self._warn_if_classes_are_needed()
        canvas = choose_canvas(self.recipe, options.canvas)
        sampler = build_sampler(options.sampler, self.own_parts)
        start = start_shape(self.recipe, options.sampler, canvas)
        check_latents(options, canvas.shape)
        sampler.levels(self.denoiser)  # by which networks may decide what they leave out
        model = wrap_network(self.denoiser, options.network, sampler)
        model = canvas.wrap(self._guided(model, options, classes))
        sampler.check(model)
        if self.device.type != "meta":  # where nothing is decoded
            self.codec.prepare()
        facts = self._facts(options, canvas)
        autocast = autocast_for(self.device, options.precision)
        return DiffusionPlan(
            seeds, classes, options, canvas, sampler, model, autocast, self.codec, start,
            self.recipe.low_resolution is not None, facts,
        )  # fmt: skip

    def check_complete(self) -> None:
        """Check that the model knows all noise levels.

        Raises:
            TesseraError: it is an expert alone.
        """
        recipe = self.recipe
        if recipe.expert is None:
            return
        low, high = sigma_range(recipe.snr_splits, recipe.expert)
        names = [f"EXPERT-{k}" for k in range(len(recipe.snr_splits) + 1)]
        raise TesseraError(
            f"the model {recipe.name} is expert {recipe.expert} of 0 to {len(names) - 1}: it knows "
            f"noise levels from {low:.4g} to {high:.4g} only, and images need all of them. Put the "
            "experts together first, from the cleanest to the noisiest: tessera experts NAME "
            + " ".join(names)
        )

    def _guided(
        self, model: Denoiser, options: SampleOptions, classes: NDArray[np.int64] | None
    ) -> Denoiser:
        """The denoiser with the guidance that was asked for."""
        scale, guide = options.guidance.guidance, options.guide
        if scale == 1:
            for name, given in (
                ("guidance_interval", options.guidance.guidance_interval),
                ("guide", guide),
            ):
                if given is not None:
                    raise TesseraError(
                        f"`{name}` does nothing at `guidance=1`. Give a weight, like 1.5"
                    )
            return model
        weak = guide.model if isinstance(guide, Pipeline) else guide
        if weak is not None and not isinstance(weak, Denoiser):
            raise TesseraError("`guide`: only a denoiser can guide another one")
        _check_guidance(scale, weak is not None, classes)
        if weak is None:
            self._warn_if_classes_are_needed()
        return Guided(model, scale, options.guidance.guidance_interval, weak)

    def _facts(self, options: SampleOptions, canvas: Canvas) -> dict[str, Any]:
        guide, pictures, latents = options.guide, options.start_from, options.latents
        plain = canvas == choose_canvas(self.recipe, LargerConfig())
        own = {} if options.network is None else options.network.model_dump(exclude_defaults=True)
        return {
            **options.guidance.model_dump(mode="json"),
            "guide": guide.checksum if isinstance(guide, Pipeline) else None,
            "precision": resolve(options.precision, self.device),
            "canvas": None if plain else _plain(asdict(canvas)),
            **own,
            "start_from": None if pictures is None else digest(pictures),
            **({} if latents is None else {"latents": digest(latents)}),
            "sampler": {
                k: "inf" if v == math.inf else v for k, v in options.sampler.model_dump().items()
            },
        }

    def encode(
        self,
        images: NDArray[np.uint8],
        labels: Label | Iterable[Label] | None = None,
        *,
        batch: int = 64,
        **options: Any,
    ) -> Tensor:
        """The latents [N, C, H, W] that DDIM makes images of; float32 on the CPU.

        DDIM without noise, backwards (Song et al. 2021). `sample(range(N), labels, sampler="ddim",
        latents=...)` with the same options makes the images again, the better the more steps.

        Args:
            images: uint8 [N, H, W, C].
            labels: one class for all, or one for each image; None: they have none.
            batch: most images at once.
            options: see `plan`; of the sampler ddim: steps, clip, quantile, noise_schedule.

        Raises:
            TesseraError: images, a class or options that this model cannot have.

        Example:
            >>> latents = pipe.encode(photos, steps="250")  # doctest: +SKIP
            >>> pipe.sample("0-3", sampler="ddim", steps="250", latents=latents)  # doctest: +SKIP
        """
        check_batch(batch)
        _check_images(images, self.codec.image_shape(self.recipe.shape))
        chosen = SampleOptions.choose(self.recipe, **{**options, "sampler": "ddim"})
        section = chosen.sampler
        assert isinstance(section, DdimSamplerConfig)
        if section.eta > 0:
            raise TesseraError(
                f"`eta={section.eta:g}`: only DDIM without noise can be gone backwards; set it to 0"
            )
        if labels is None and self.model.num_classes:
            labels = NO_CLASS
        plan = self._plan(range(len(images)), labels, chosen)
        check_start(plan)
        levels = plan.sampler.levels(plan.denoiser)
        parts: list[Tensor] = []
        for rows in np.array_split(np.arange(len(images)), math.ceil(len(images) / batch)):
            pixels = torch.from_numpy(images[rows]).to(self.device).permute(0, 3, 1, 2)
            x = self.codec.encode_mean(pixels)
            classes = None
            if plan.classes is not None:
                classes = torch.from_numpy(plan.classes[rows]).to(self.device)
            cond = replace(plan.conditioning(rows.tolist(), classes, x), coords=None)
            with plan.autocast:
                *_, last = encode_ddim(
                    plan.denoiser, x, cond, levels, clip=section.clip, quantile=section.quantile
                )
            parts.append(last.x.to("cpu", torch.float32))
        return torch.cat(parts)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _check_guidance(scale: float, by_weaker: bool, classes: NDArray[np.int64] | None) -> None:
    """Raise where guidance has nothing to act on and costs two evaluations all the same."""
    if not by_weaker and classes is not None and len(classes) and (classes == NO_CLASS).all():
        raise TesseraError(
            f"`guidance={scale:g}` does nothing for images without a class, and costs twice as "
            "much. Leave it out, give classes by `labels`, or guide by a weaker model (`guide`)"
        )


def _check_images(images: NDArray[np.uint8], shape: tuple[int, int, int]) -> None:
    """Raise unless there are images, uint8 [N, H, W, C] of `shape` (C, H, W)."""
    channels, height, width = shape
    if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels) or not len(images):
        raise TesseraError(
            f"images of shape {images.shape}, {images.dtype}: this model encodes uint8 images "
            f"[N, {height}, {width}, {channels}]"
        )

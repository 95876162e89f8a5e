"""Pipelines of denoisers: noise to images by a sampler, with guidance and on any canvas."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tessera.conditioning import NO_CLASS, Conditioning
from tessera.data.codec import Codec
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.experts import sigma_range
from tessera.diffusion.guidance import Guided
from tessera.errors import TesseraError
from tessera.pipelines import folder as folders
from tessera.pipelines.base import Pipeline
from tessera.pipelines.canvas import Canvas, choose_canvas
from tessera.pipelines.labels import Label, Seeds, list_seeds
from tessera.pipelines.options import (
    Option,
    Precision,
    autocast_for,
    check_batch,
    choose_sampler,
    fill,
    foreign_sampler_options,
    listed,
)
from tessera.precision import resolve
from tessera.recipes.build import build_model, build_sampler, wrap_network
from tessera.recipes.schema import (
    BricksConfig,
    CanvasConfig,
    DdimSamplerConfig,
    GuidanceConfig,
    LargerConfig,
    Recipe,
    SamplerConfig,
    Section,
)
from tessera.sampling.core import NoiseSource, Sampler, SamplerState, enlarged
from tessera.sampling.ddpm import encode_ddim


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
            filled["sampler"] = filled["sampler"].fitted(
                recipe.objective, bounded=recipe.codec.of_pixels
            )
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
        "this model does not know where its pixels lie, so it makes whole pictures only. Leave it "
        "out, or train with view.kind=patches or coords.frequencies=0"
    )
    whole = (
        "only networks made of bricks (network.kind=lego) can skip any; this one is a "
        f"{recipe.network.kind}. Leave it out"
    )
    reasons = dict.fromkeys(CanvasConfig.model_fields, blind)
    reasons |= dict.fromkeys(BricksConfig.model_fields, whole)
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

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample in model space."""
        return self.canvas.channels, *self.canvas.shown

    def networks(self) -> list[nn.Module]:
        """All networks that run, parts of a network that run alone included."""
        return self.denoiser.networks()

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


class DiffusionPipeline(Pipeline):
    """A denoiser, its codec and its recipe.

    Example:
        >>> pipe = tessera.load("runs/a")  # doctest: +SKIP
        >>> pipe.sample(range(4), steps=32, s_churn=10)  # doctest: +SKIP
    """

    kind = "diffusion"
    _warned = False

    @property
    def denoiser(self) -> Denoiser:
        """The model, as what it is."""
        assert isinstance(self.model, Denoiser)
        return self.model

    @classmethod
    def open(cls, opened: folders.Opened) -> Self:
        model = build_model(opened.recipe, opened.own_parts)
        entry = opened.load_weights(model.network)
        if opened.recipe.training.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(
            opened.recipe,
            model,
            images_seen=opened.config.images_seen,
            class_names=opened.config.class_names,
            ema=entry.name,
            emas=[weights.name for weights in opened.config.weights],
            checksum=entry.sha256,
            parts=opened.own_parts,
        )

    def options(self) -> list[Option]:
        sections = SampleOptions.sections(self.recipe)
        titles = {"sampler": f"sampler {self.recipe.sampling.kind}", "network": "network"}
        return [
            option
            for name, section in sections.items()
            for option in listed(titles.get(name, name), section)
        ]

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
        start_shape = _start_shape(self.recipe, options.sampler, canvas)
        _check_latents(options, canvas.shape)
        sampler.levels(self.denoiser)  # what cannot be visited is said before anything is made
        model = wrap_network(self.denoiser, options.network, sampler)
        model = canvas.wrap(self._guided(model, options, classes))
        self.codec.prepare()
        facts = self._facts(options, canvas)
        autocast = autocast_for(self.device, options.precision)
        return DiffusionPlan(
            seeds, classes, options, canvas, sampler, model, autocast, self.codec, start_shape,
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
            "start_from": None if pictures is None else _digest(pictures),
            **({} if latents is None else {"latents": _digest(latents)}),
            "sampler": {
                k: "inf" if v == math.inf else v for k, v in options.sampler.model_dump().items()
            },
        }

    def _warn_if_classes_are_needed(self) -> None:
        if self.recipe.objective.label_dropout > 0 or self._warned:
            return
        self._warned = True
        warnings.warn(
            "this model was trained without label dropout, so it has not learned to do without a "
            "class, which guidance relies on; expect poor images. Train with "
            "objective.label_dropout=0.1, or guide by a weaker model",
            stacklevel=5,
        )

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


def _digest(values: NDArray[Any] | Tensor) -> str:
    array = values.cpu().numpy() if isinstance(values, Tensor) else values
    return hashlib.sha256(array.tobytes()).hexdigest()


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _check_guidance(scale: float, by_weaker: bool, classes: NDArray[np.int64] | None) -> None:
    """Raise where guidance has nothing to act on and costs two evaluations all the same."""
    if not by_weaker and classes is not None and len(classes) and (classes == NO_CLASS).all():
        raise TesseraError(
            f"`guidance={scale:g}` does nothing for images without a class, and costs twice as "
            "much. Leave it out, give classes by `labels`, or guide by a weaker model (`guide`)"
        )


def _start_shape(
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


def _check_images(images: NDArray[np.uint8], shape: tuple[int, int, int]) -> None:
    """Raise unless there are images, uint8 [N, H, W, C] of `shape` (C, H, W)."""
    channels, height, width = shape
    if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels) or not len(images):
        raise TesseraError(
            f"images of shape {images.shape}, {images.dtype}: this model encodes uint8 images "
            f"[N, {height}, {width}, {channels}]"
        )


def _check_latents(options: SampleOptions, shape: tuple[int, int, int]) -> None:
    """Raise unless latents, if there are any, are [N, *shape]."""
    latents = options.latents
    if latents is not None and options.sampler.enlarges is not None:
        raise TesseraError(
            "`latents`: this model starts from pictures; give them as `start_from`"
        )
    if latents is not None and (latents.shape[1:] != shape or not len(latents)):
        raise TesseraError(
            f"latents of shape {tuple(latents.shape)}: this model begins with [N, "
            f"{', '.join(map(str, shape))}]"
        )

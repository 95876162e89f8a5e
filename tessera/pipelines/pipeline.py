"""A model ready to make images: recipe, denoiser and codec, saved as one folder."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from tessera.conditioning import NO_CLASS, Conditioning
from tessera.cost import Cost, choose_bricks, estimate_model
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.experts import Experts
from tessera.diffusion.guidance import Guided
from tessera.diffusion.preconditioning import Preconditioned
from tessera.diffusion.skipping import BrickSchedule, cut_bricks
from tessera.errors import TesseraError
from tessera.files import user_path
from tessera.images import from_uint8, to_pil
from tessera.pipelines import folder as folders
from tessera.pipelines.canvas import OPTIONS as CANVAS_OPTIONS
from tessera.pipelines.canvas import choose_canvas
from tessera.pipelines.description import description
from tessera.pipelines.options import (
    Label,
    Output,
    Plan,
    Precision,
    Seeds,
    autocast_for,
    check_batch,
    check_guidance,
    check_images,
    check_latents,
    check_low_res,
    check_output,
    choose_labels,
    choose_sampler,
    list_seeds,
)
from tessera.recipes.build import build_codec, build_sampler
from tessera.recipes.loading import dump_recipe
from tessera.recipes.schema import DdimSampler, Recipe
from tessera.sampling.core import NoiseSource, SamplerState
from tessera.sampling.ddpm import encode_ddim
from tessera.sampling.seeds import SeedNoise


@dataclass(frozen=True)
class SampledBatch:
    """Finished images of one batch.

    Attributes:
        seeds: one per image.
        labels: int64 [n] class indices; None for models without classes.
        images: uint8 [n, H, W, C].
    """

    seeds: list[int]
    labels: NDArray[np.int64] | None
    images: NDArray[np.uint8]


OnStep = Callable[[Sequence[int], SamplerState], None]
"""Called after every sampler step with the batch's seeds and the sampler's state."""


class Pipeline:
    """A trained diffusion model.

    Attributes:
        kind: what `config.json` calls models of this class.
        recipe: how the model was made, with the sampler that it is used with.
        denoiser: the model; its weights are an average over the training.
        codec: turns its samples into images.
        images_seen: images that it was trained on.
        class_names: one for each class, or None.
        ema: name of the average, its half-life in images; one of `emas`.
        emas: names of the averages that the folder holds, the default first.
        checksum: SHA-256 of the weights file; None for a model that was not loaded from a folder.

    Example:
        >>> pipe = tessera.load("runs/a")  # doctest: +SKIP
        >>> images = pipe.sample(range(16), labels=3, guidance=1.5)  # doctest: +SKIP
    """

    kind = "diffusion"

    def __init__(
        self,
        recipe: Recipe,
        denoiser: Preconditioned | Experts,
        *,
        images_seen: int = 0,
        class_names: Sequence[str] | None = None,
        ema: str | None = None,
        emas: Sequence[str] = (),
        checksum: str | None = None,
    ) -> None:
        self.recipe = recipe
        self.recipes: tuple[Recipe, ...] = (recipe,)  # of each of `networks()`
        self.denoiser: Any = denoiser.eval()
        self.codec = build_codec(recipe.codec)
        self.images_seen = images_seen
        self.class_names = None if class_names is None else tuple(class_names)
        self.ema = ema if ema is not None else recipe.ema_names[0]
        self.emas = tuple(emas) or (self.ema,)
        self.checksum = checksum
        self._others: dict[str, Mapping[str, Tensor]] = {}
        self._warned = False

    # ------------------------------------------------------------------------- saving, loading

    @classmethod
    def from_denoiser(
        cls,
        recipe: Recipe,
        denoiser: Preconditioned,
        *,
        images_seen: int = 0,
        class_names: Sequence[str] | None = None,
        other_emas: Sequence[Mapping[str, Tensor]] = (),
    ) -> Self:
        """A pipeline around a model in memory.

        Args:
            denoiser: with the weights of the recipe's first average.
            other_emas: network state dicts of the recipe's further averages, in its order; they
                are saved along.
        """
        names = recipe.ema_names[: 1 + len(other_emas)]
        if len(names) != 1 + len(other_emas):
            raise ValueError(f"{1 + len(other_emas)} averages, but the recipe has {len(names)}")
        pipe = cls(
            recipe, denoiser, images_seen=images_seen, class_names=class_names, emas=tuple(names)
        )
        pipe._others = dict(zip(names[1:], other_emas, strict=True))
        return pipe

    @staticmethod
    def load(
        source: str | Path,
        *,
        ema: str | int | None = None,
        device: torch.device | str | None = None,
        vae: str | Path | None = None,
    ) -> Pipeline:
        """Open a saved pipeline; see `tessera.load`."""
        from tessera.pipelines.loading import load

        return load(source, ema=ema, device=device, vae=vae)

    def save(self, folder: str | Path) -> None:
        """Write the pipeline folder, whole or not at all; an existing one is replaced.

        The weights in memory are saved; of a loaded pipeline, that is the average it was loaded
        with.

        Raises:
            CheckpointError: something else than a pipeline is in the way.
        """
        states = {self.ema: self.denoiser.network.state_dict(), **self._others}
        folders.write_folder(
            user_path(folder),
            dump_recipe(self.recipe),
            states,
            images_seen=self.images_seen,
            class_names=self.class_names,
        )

    def __repr__(self) -> str:
        return description(self)

    def to(self, device: torch.device | str) -> Self:
        """Move the model to `device`."""
        self.denoiser.to(device)
        return self

    def networks(self) -> list[nn.Module]:
        """The networks of the model: one, or one of each expert."""
        return [m.network for m in self.denoiser.modules() if isinstance(m, Preconditioned)]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.denoiser.parameters()).device
        return device

    # -------------------------------------------------------------------------------- sampling

    @overload
    def sample(
        self, seeds: Seeds, labels: Label | Iterable[Label] | None = None,
        *, output: Literal["numpy"] = "numpy", **options: Any,
    ) -> NDArray[np.uint8]: ...  # fmt: skip

    @overload
    def sample(
        self, seeds: Seeds, labels: Label | Iterable[Label] | None = None,
        *, output: Literal["pil"], **options: Any,
    ) -> list[Image.Image]: ...  # fmt: skip

    @overload
    def sample(
        self, seeds: Seeds, labels: Label | Iterable[Label] | None = None,
        *, output: Literal["tensor"], **options: Any,
    ) -> Tensor: ...  # fmt: skip

    def sample(
        self,
        seeds: Seeds,
        labels: Label | Iterable[Label] | None = None,
        *,
        output: Output = "numpy",
        **options: Any,
    ) -> NDArray[np.uint8] | list[Image.Image] | Tensor:
        """Make one image for each seed.

        Args:
            seeds: numbers like range(4) or [17], or text like "0-63,100". One number alone is
                refused: 4 might mean one image, that of seed 4, or four.
            labels: see `sample_batches`.
            output: "numpy", uint8 [N, H, W, C]; "pil", a list of Pillow images; "tensor", uint8
                [N, C, H, W] on the CPU.
            options: those of `sample_batches`.

        Raises:
            TesseraError: no seeds, no such output, or what `sample_batches` raises.
        """
        seeds = list_seeds(seeds)
        if not seeds:
            raise TesseraError("`seeds` is empty; give at least one, like [0] or range(16)")
        check_output(output)
        batches = list(self.sample_batches(seeds, labels, **options))
        images = np.concatenate([batch.images for batch in batches])
        if output == "pil":
            return [to_pil(image) for image in images]
        if output == "tensor":
            return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return images

    def sample_batches(
        self,
        seeds: Seeds,
        labels: Label | Iterable[Label] | None = None,
        *,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        guide: Pipeline | Denoiser | None = None,
        skip: float = 0.0,
        bricks: str | BrickSchedule | None = None,
        low_res: NDArray[np.uint8] | None = None,
        latents: Tensor | None = None,
        batch: int = 64,
        precision: Precision = "auto",
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Iterator[SampledBatch]:
        """Make one image for each seed, batch by batch, in the order of the seeds.

        A seed's image does not depend on the other seeds, on the batch size or on the device, but
        for the rounding of the network's arithmetic.

        Args:
            seeds: numbers, or text like "0-63,100".
            labels: one class for all, or one for each seed: index, name, or -1 for no class;
                "balanced" for seed modulo the number of classes; None to draw one per seed.
            guidance: weight of guidance; 1 for none.
            guidance_interval: (low, high), the noise levels where guidance acts.
            guide: a weaker model to guide by, instead of the model without class.
            skip: share of the sampler's steps in which the last brick of a stack is left out: the
                last steps if it is the largest (PG, U), the first ones if the smallest (PR).
            bricks: instead of `skip`, how many bricks run at which noise levels, like
                "0-0.5:2,20-inf:1"; all run elsewhere.
            low_res: uint8 [N, h, w, C], the small images that a super-resolution model enlarges;
                seed s enlarges number s modulo N.
            latents: [N, C, H, W], unit normal numbers to begin with in place of the seeds' own,
                like those of `encode`; seed s takes number s modulo N.
            batch: most images at once; the seeds are divided evenly.
            precision: "bf16" computes the network in bfloat16 where that is safe, "fp32" in
                float32; "auto" is bf16 where the device multiplies it natively, else fp32.
            on_step: called after every step of every batch.
            options: of the sampler, in place of the recipe's (steps, sigma_max, s_churn, ...); and
                for models with coordinates which part of the picture to make: `window`,
                `resolution`, `window_noise`, `mask_coords`; or a larger picture: `size`,
                `layout`, `overlap`; see `choose_canvas`.

        Raises:
            TesseraError: a class, guidance, window or sampler option that this model cannot have.
        """
        seeds = list_seeds(seeds)
        if not seeds:
            return
        check_batch(batch)
        plan = self._plan(
            seeds, labels, guidance=guidance, guidance_interval=guidance_interval, guide=guide,
            skip=skip, bricks=bricks, low_res=low_res, latents=latents, precision=precision,
            **options,
        )  # fmt: skip
        classes, canvas = plan.classes, plan.canvas
        for rows in np.array_split(np.arange(len(seeds)), math.ceil(len(seeds) / batch)):
            ours = [seeds[row] for row in rows]
            noise = canvas.noise(SeedNoise(ours, self.device))
            start = noise.normal(canvas.shape)
            if latents is not None:
                start = latents[[seed % len(latents) for seed in ours]].to(start)
            cond = self._conditioning(noise, None if classes is None else classes[rows])
            cond = replace(cond, coords=canvas.coords(len(ours), self.device))
            if low_res is not None:
                small = low_res[[seed % len(low_res) for seed in ours]]
                cond = replace(cond, image=from_uint8(self._from_numpy(small)))
            with plan.autocast:
                for state in plan.sampler(plan.denoiser, start, cond, noise):
                    if on_step is not None:
                        on_step(ours, state)
            yield SampledBatch(
                ours,
                None if cond.labels is None else cond.labels.cpu().numpy(),
                self.to_pixels(canvas.picture(state.x)),
            )

    def check(
        self, seeds: Seeds, labels: Label | Iterable[Label] | None = None, **options: Any
    ) -> None:
        """Raise the errors that `sample_batches` would raise with the same arguments.

        Args:
            options: those of `sample_batches`, but for `batch` and `on_step`.
        """
        plan = self._plan(list_seeds(seeds), labels, **options)
        step_sigmas(plan.sampler, plan.denoiser)  # what a sampler says only when it runs

    def labels(
        self, seeds: Seeds, labels: Label | Iterable[Label] | None = None, **options: Any
    ) -> NDArray[np.int64]:
        """The classes that `sample_batches` gives the images of `seeds`, without making them.

        Args:
            options: those of `sample_batches`; only the choice of a window matters.
        """
        seeds = list_seeds(seeds)
        classes = choose_labels(labels, seeds, self.denoiser.num_classes, self.class_names)
        if classes is not None:
            return classes
        drawn = np.zeros(len(seeds), np.int64)
        shape = choose_canvas(self.recipe, **options).noise_shape
        for index, seed in enumerate(seeds):
            noise = SeedNoise([seed])
            noise.normal(shape)
            drawn[index] = noise.integers(self.denoiser.num_classes).item()
        return drawn

    def encode(
        self,
        images: NDArray[np.uint8],
        labels: Label | Iterable[Label] | None = None,
        *,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        guide: Pipeline | Denoiser | None = None,
        low_res: NDArray[np.uint8] | None = None,
        batch: int = 64,
        precision: Precision = "auto",
        **options: Any,
    ) -> Tensor:
        """The latents [N, C, H, W] that DDIM makes images of; float32 on the CPU.

        DDIM without noise, backwards (Song et al. 2021). `sample(range(N), labels, sampler="ddim",
        latents=...)` with the same options makes the images again, the better the more steps.

        Args:
            images: uint8 [N, H, W, C].
            labels: one class for all, or one for each image; None: they have none.
            guidance, guidance_interval, guide, batch, precision: see `sample_batches`.
            low_res: small images; image i was enlarged from number i modulo their number.
            options: of the sampler ddim: steps, clip, quantile, noise_schedule.

        Raises:
            TesseraError: images, a class or options that this model cannot have.

        Example:
            >>> latents = pipe.encode(photos, steps="250")  # doctest: +SKIP
            >>> pipe.sample("0-3", sampler="ddim", steps="250", latents=latents)  # doctest: +SKIP
        """
        check_batch(batch)
        check_images(images, self.codec.image_shape(self.recipe.shape))
        section = choose_sampler(self.recipe, {**options, "sampler": "ddim"})
        assert isinstance(section, DdimSampler)
        if section.eta > 0:
            raise TesseraError(
                f"eta={section.eta:g}: only DDIM without noise can be gone backwards; set eta=0"
            )
        if labels is None and self.denoiser.num_classes:
            labels = NO_CLASS
        plan = self._plan(
            range(len(images)), labels, guidance=guidance, guidance_interval=guidance_interval,
            guide=guide, low_res=low_res, precision=precision, sampler="ddim", **options,
        )  # fmt: skip
        sampler = section.model_dump(exclude={"kind", "eta"})
        parts: list[Tensor] = []
        for rows in np.array_split(np.arange(len(images)), math.ceil(len(images) / batch)):
            x = self.codec.encode_mean(self._from_numpy(images[rows]))
            classes = None if plan.classes is None else torch.from_numpy(plan.classes[rows])
            cond = Conditioning(classes).to(self.device)
            if low_res is not None:
                small = low_res[rows % len(low_res)]
                cond = replace(cond, image=from_uint8(self._from_numpy(small)))
            with plan.autocast:
                *_, last = encode_ddim(plan.denoiser, x, cond, **sampler)
            parts.append(last.x.to("cpu", torch.float32))
        return torch.cat(parts)

    def _from_numpy(self, images: NDArray[np.uint8]) -> Tensor:
        """[N, H, W, C] as [N, C, H, W] where the model is."""
        return torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)

    def to_pixels(self, x: Tensor) -> NDArray[np.uint8]:
        """Model space [B, C, H, W] to uint8 [B, H, W, C] on the CPU; latents are decoded."""
        return self.codec.decode(x).permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def cost(
        self,
        *,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        skip: float = 0.0,
        bricks: str | BrickSchedule | None = None,
        **options: Any,
    ) -> Cost:
        """What the model costs; `sample_flops` with these options of `sample_batches`.

        Raises:
            TesseraError: an option that this model cannot have.
        """
        update = {"sampling": choose_sampler(self.recipe, options)}
        recipes = [recipe.model_copy(update=update) for recipe in self.recipes]
        return estimate_model(recipes, self.denoiser, guidance, guidance_interval, skip, bricks)

    def _plan(
        self,
        seeds: Sequence[int],
        labels: Label | Iterable[Label] | None,
        *,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        guide: Pipeline | Denoiser | None = None,
        skip: float = 0.0,
        bricks: str | BrickSchedule | None = None,
        low_res: NDArray[np.uint8] | None = None,
        latents: Tensor | None = None,
        precision: Precision = "auto",
        **options: Any,
    ) -> Plan:
        """What `sample_batches` was asked for, checked and ready to run."""
        check_complete(self, guide)
        classes = choose_labels(labels, seeds, self.denoiser.num_classes, self.class_names)
        if classes is not None and NO_CLASS in classes:
            self._warn_if_classes_are_needed()
        own = {name: value for name, value in options.items() if name not in CANVAS_OPTIONS}
        canvas = choose_canvas(self.recipe, **options)
        others = [*inspect.signature(self.sample_batches).parameters, *CANVAS_OPTIONS]
        sampler = build_sampler(choose_sampler(self.recipe, own, others))
        check_low_res(self.recipe, low_res)
        check_latents(latents, canvas.shape)
        model: Denoiser = self.denoiser
        schedule = choose_bricks(self.recipe, model, sampler, skip, bricks)
        if schedule is not None:
            model = cut_bricks(self.denoiser, schedule)
        if guidance != 1:
            check_guidance(guidance, guide is not None, classes)
            weak = guide.denoiser if isinstance(guide, Pipeline) else guide
            model = Guided(model, guidance, guidance_interval, weak)
            if weak is None:
                self._warn_if_classes_are_needed()
        self.codec.prepare()
        autocast = autocast_for(self.device, precision)
        return Plan(classes, canvas, sampler, canvas.wrap(model), autocast)

    def _warn_if_classes_are_needed(self) -> None:
        if self.recipe.objective.label_dropout > 0 or self._warned:
            return
        self._warned = True
        warnings.warn(
            "this model was trained without label dropout, so it has not learned to do without a "
            "class, which guidance relies on; expect poor images. Train with "
            "objective.label_dropout=0.1, or guide by a weaker model",
            stacklevel=4,
        )

    def _conditioning(self, noise: NoiseSource, classes: NDArray[np.int64] | None) -> Conditioning:
        if self.denoiser.num_classes == 0:
            return Conditioning()
        drawn = noise.integers(self.denoiser.num_classes)
        return Conditioning(drawn if classes is None else torch.from_numpy(classes).to(self.device))

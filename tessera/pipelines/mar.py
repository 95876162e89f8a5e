"""Pipelines of masked models: tokens in random order, from none, or from those of a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tessera.conditioning import NO_CLASS
from tessera.data.codec import Codec
from tessera.diffusion.masked import MaskedModel
from tessera.errors import TesseraError
from tessera.pipelines.base import Pipeline
from tessera.pipelines.editing import Edit
from tessera.pipelines.labels import Label, Seeds, list_seeds
from tessera.pipelines.options import (
    Option,
    Precision,
    autocast_for,
    choose_sampler,
    fill,
    listed,
)
from tessera.pipelines.plans import digest
from tessera.precision import resolve
from tessera.recipes.build import build_masked_sampler
from tessera.recipes.schema import MarSamplerConfig
from tessera.sampling.core import NoiseSource, Report, SamplerState
from tessera.sampling.masked import MaskedSampler, TokenMaker

_REFUSED = {
    "steps": "this model has two kinds of steps: `num_iter`, the iterations in which tokens are "
    "made, and `head_steps`, those of a token's diffusion. Leave out `steps`",
    "guidance_interval": "this model is guided by `guidance_schedule`, as its images fill, and not "
    "by noise levels. Leave out `guidance_interval`",
    "size": "this model has learned a place for each of its tokens, so it makes pictures of the "
    "trained size only. Leave out `size`",
    "start_from": "`start_from`: this model starts from nothing. To keep a part of a picture, edit "
    "it: tessera edit",
    "latents": "`latents`: this model starts from nothing. Leave it out",
    "guide": "`guide`: this model is guided by itself without class only. Leave it out",
}


@dataclass(frozen=True)
class MarPlan:
    """How the images of one call are made; see `Plan`.

    Attributes:
        model, sampler, maker: what makes tokens.
        autocast: the arithmetic of the network.
        codec: of the pictures to edit.
        edit: the pictures, and what of them is made anew; None to make all of it.
    """

    seeds: Sequence[int]
    classes: NDArray[np.int64] | None
    model: MaskedModel
    sampler: MaskedSampler
    maker: TokenMaker
    autocast: torch.autocast
    codec: Codec
    edit: Edit | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample in model space."""
        return self.model.shape

    def networks(self) -> list[nn.Module]:
        """The network."""
        return [self.model.network]

    def helpers(self) -> list[nn.Module]:
        """What makes tokens of vectors."""
        return [self.maker]

    def noise(self, source: NoiseSource) -> NoiseSource:
        """The seeds' own."""
        return source

    def start(self, seeds: Sequence[int], noise: NoiseSource) -> Tensor:
        """The order of each image's tokens, int64 [B, L]: first those to be made, the last of which
        is the first to be made, then those that are kept."""
        numbers = noise.normal((self.model.network.tokens,))
        if self.edit is not None:
            kept = ~torch.from_numpy(self._made(self.edit))
            numbers = numbers.masked_fill(kept.to(numbers.device), math.inf)
        return numbers.argsort(dim=1, stable=True)

    def _made(self, edit: Edit) -> NDArray[np.bool_]:
        """Which tokens are made, [L]."""
        return edit.cells(edit.made.shape[0] // self.model.network.rows).flatten()

    def states(
        self, seeds: Sequence[int], start: Tensor, labels: Tensor | None, noise: NoiseSource
    ) -> Iterator[SamplerState]:
        """The iterations."""
        network, unknown = self.model.network, self.model.network.tokens
        tokens = torch.zeros(len(start), network.tokens, network.token_size, device=start.device)
        if self.edit is not None:
            unknown = int(self._made(self.edit).sum())
            chosen = self.edit.pictures[[seed % len(self.edit.pictures) for seed in seeds]]
            pixels = torch.from_numpy(chosen).to(start.device).permute(0, 3, 1, 2)
            tokens = network.cut(self.codec.encode_mean(pixels))
        with self.autocast:
            yield from self.sampler(self.model, tokens, start, unknown, labels, noise, self.maker)

    def picture(self, x: Tensor) -> Tensor:
        """All of it."""
        return x

    def report(self) -> Report:
        """Nothing is refined."""
        return {}


class MarPipeline(Pipeline):
    """A model of masked tokens.

    Example:
        >>> pipe = tessera.load("runs/mar")  # doctest: +SKIP
        >>> pipe.sample(range(4), num_iter=16, guidance=2, temperature=0.95)  # doctest: +SKIP
        >>> edit = choose_edit([photo], (3, 32, 32), box=(8, 8, 16, 16))  # doctest: +SKIP
        >>> pipe.sample(range(4), labels=3, edit=edit)  # doctest: +SKIP
    """

    kind = "mar"
    of_model = MaskedModel

    @property
    def masked(self) -> MaskedModel:
        """The model, as what it is."""
        assert isinstance(self.model, MaskedModel)
        return self.model

    def options(self, sampler: str | None = None) -> list[Option]:
        return [*listed("sampler", choose_sampler(self.recipe.sampling, sampler))]

    def plan(
        self,
        seeds: Seeds,
        labels: Label | Iterable[Label] | None = None,
        *,
        precision: Precision = "auto",
        sampler: str | None = None,
        edit: Edit | None = None,
        **options: Any,
    ) -> MarPlan:
        """What `sample_batches` was asked for, checked and ready for `run`.

        Args:
            precision: arithmetic of the network, "fp32", "bf16" or "auto".
            sampler: "mar", the only one there is.
            edit: pictures of which a part is kept; seed s edits number s modulo their number. A
                token is kept if all of its pixels are, and then exactly as it is.
            options: `num_iter`, `head_steps`, `temperature`, `guidance`, `guidance_schedule` in
                place of the recipe's: see `MaskedSampler`.

        Raises:
            TesseraError: a class or an option that this model cannot have.
        """
        rows = list_seeds(seeds)
        classes = self.choose_labels(rows, labels)
        section = self._section(sampler, options)
        section = self._guided(section, classes, "guidance" in options)
        made = build_masked_sampler(section)
        maker = made.maker(self.masked)  # says what the process does not have
        if self.device.type != "meta":  # where nothing is decoded
            self.codec.prepare()
        facts: dict[str, Any] = {
            "precision": resolve(precision, self.device),
            "sampler": section.model_dump(mode="json"),
        }
        if edit is not None:
            self._check_edit(edit)
            facts["edit"] = {"pictures": digest(edit.pictures), "made": digest(edit.made)}
        autocast = autocast_for(self.device, precision)
        return MarPlan(rows, classes, self.masked, made, maker, autocast, self.codec, edit, facts)

    def check_edits(self) -> None:
        """They can."""

    def _check_edit(self, edit: Edit) -> None:
        channels, height, width = self.codec.image_shape(self.model.shape)
        if edit.pictures.shape[1:] != (height, width, channels) or not len(edit.pictures):
            raise TesseraError(
                f"`edit`: pictures of shape {edit.pictures.shape}; this model edits "
                f"[N, {height}, {width}, {channels}]"
            )

    def _section(self, sampler: str | None, options: dict[str, Any]) -> MarSamplerConfig:
        """The recipe's sampler with the options given."""
        chosen = {"sampler": choose_sampler(self.recipe.sampling, sampler)}
        section = cast(MarSamplerConfig, fill(chosen, options, _REFUSED)["sampler"])
        return cast(MarSamplerConfig, self.recipe.fit(section))

    def _guided(
        self, section: MarSamplerConfig, classes: NDArray[np.int64] | None, asked: bool
    ) -> MarSamplerConfig:
        """The section, without guidance where that has nothing to act on."""
        if classes is not None and NO_CLASS in classes:
            self._warn_if_classes_are_needed()
        if section.guidance == 1:
            return section
        no_class = classes is not None and len(classes) > 0 and bool((classes == NO_CLASS).all())
        if not no_class and self.model.num_classes:
            self._warn_if_classes_are_needed()
            return section
        if asked:
            raise TesseraError(
                f"`guidance={section.guidance:g}` does nothing for images without a class, and "
                "costs twice as much. Leave it out"
                + (", or give classes by `labels`" if self.model.num_classes else "")
            )
        return section.model_copy(update={"guidance": 1.0})

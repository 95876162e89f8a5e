"""Relays: models of rising resolution, each of which goes on with the picture of the one before."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tessera.data.codec import Codec
from tessera.diffusion.bands import Band, BandedDenoiser
from tessera.diffusion.means import block_means
from tessera.errors import CheckpointError, TesseraError
from tessera.model import Model
from tessera.pipelines import counting
from tessera.pipelines import folder as folders
from tessera.pipelines.base import Pipeline
from tessera.pipelines.codecs import saved_codec
from tessera.pipelines.diffusion import DiffusionPipeline
from tessera.pipelines.labels import Label, Seeds, list_seeds
from tessera.pipelines.options import Option, divide_options
from tessera.pipelines.plans import DiffusionPlan, Pictures, Start, check_start, fits_start
from tessera.sampling.core import NoiseSource, Report, SamplerState

STAGES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
"""What the stages are called in options."""


class Stages(Model):
    """The models of a relay as one, which makes what the last of them makes."""

    def __init__(self, models: Sequence[Model]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(models)
        self.shape = models[-1].shape
        self.num_classes = max(model.num_classes for model in models)


@dataclass(frozen=True)
class RelayPlan:
    """How the images of one call are made by several stages; see `Plan`.

    Attributes:
        plans: those of the stages that run, in order.
    """

    seeds: Sequence[int]
    classes: NDArray[np.int64] | None
    plans: Sequence[DiffusionPlan]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample in model space."""
        return self.plans[-1].shape

    def networks(self) -> list[nn.Module]:
        """All networks that run, of all stages."""
        return [*dict.fromkeys(network for plan in self.plans for network in plan.networks())]

    def helpers(self) -> list[nn.Module]:
        """None."""
        return []

    def noise(self, source: NoiseSource) -> NoiseSource:
        """The seeds' noise, with which a stage goes on where the one before has stopped."""
        return source

    def start(self, seeds: Sequence[int], noise: NoiseSource) -> Start:
        """What the first stage that runs begins with."""
        return self.plans[0].start(seeds, self.plans[0].noise(noise))

    def states(
        self, seeds: Sequence[int], start: Start, labels: Tensor | None, noise: NoiseSource
    ) -> Iterator[SamplerState]:
        """The steps of all stages; the states of early ones are of their own resolution."""
        steps = [len(plan.sampler.levels(plan.denoiser)) for plan in self.plans]
        for index, plan in enumerate(self.plans):
            own = plan.noise(noise)
            known = labels if plan.denoiser.num_classes else None
            for state in plan.states(seeds, start, known, own):
                done = sum(steps[:index]) + state.step
                yield replace(state, step=done, steps=sum(steps))
            if index + 1 < len(self.plans):
                after = self.plans[index + 1]
                start = after.start(
                    seeds, after.noise(noise), _handed(plan.picture(state.x), after)
                )

    def picture(self, x: Tensor) -> Tensor:
        """The part of a state's `x` that is shown."""
        return self.plans[-1].picture(x)

    def report(self) -> Report:
        """What the refinements of the stages say about all samples so far, behind their names."""
        stages = zip(self.facts["stages"], self.plans, strict=True)
        return {f"{s}.{name}": v for s, plan in stages for name, v in plan.report().items()}


class RelayPipeline(Pipeline):
    """Several models in a row: the second starts from the picture of the first, and so on.

    Its recipe is that of the last stage, under the names of all.

    Args:
        pipes: from the lowest resolution to the highest.

    Raises:
        TesseraError: they do not fit each other.

    Example:
        >>> pipe = tessera.load("relay")  # doctest: +SKIP
        >>> pipe.sample(range(4), **{"first.steps": 32, "second.s_block": 0.1})  # doctest: +SKIP
        >>> pipe.sample(range(4), stages="second", start_from=photos)  # doctest: +SKIP
    """

    kind = "relay"

    def __init__(self, pipes: Sequence[DiffusionPipeline]) -> None:
        _check(pipes)
        self.pipes = tuple(pipes)
        self._factors = [_factor(a, b) for a, b in itertools.pairwise(pipes)]
        last, codec = pipes[-1], saved_codec(pipes)
        checksums = "".join(pipe.checksum or "" for pipe in pipes)
        super().__init__(
            last.recipe.model_copy(update={"name": " > ".join(p.recipe.name for p in pipes)}),
            Stages([pipe.model for pipe in pipes]),
            images_seen=sum(pipe.images_seen for pipe in pipes),
            class_names=next((p.class_names for p in pipes if p.class_names), None),
            ema=last.ema,
            emas=last.emas,
            checksum=hashlib.sha256(checksums.encode()).hexdigest() if checksums else None,
            parts=last.own_parts,
        )
        self.keep_codec(codec)

    @property
    def codec(self) -> Codec:
        """Turns the samples of all stages into images."""
        return self.pipes[-1].codec

    @codec.setter
    def codec(self, codec: Codec) -> None:
        for pipe in self.pipes:
            pipe.codec = codec

    @property
    def names(self) -> tuple[str, ...]:
        """What the stages are called in options."""
        return STAGES[: len(self.pipes)]

    @property
    def sides(self) -> list[tuple[int, int]]:
        """Height and width of what each stage hands over, and of what the last one makes."""
        factors = [*self._factors, 1]
        shapes = [pipe.recipe.shape for pipe in self.pipes]
        return [(h // f, w // f) for (_, h, w), f in zip(shapes, factors, strict=True)]

    def __repr__(self) -> str:
        rows = [
            f"  {name:<12} {pipe.recipe.name}, {tuple(pipe.model.shape)}, {pipe.kind}"
            for name, pipe in zip(self.names, self.pipes, strict=True)
        ]
        return "\n".join([super().__repr__(), *rows])

    @classmethod
    def open(cls, opened: folders.Opened) -> Self:
        pipes = [pipe for pipe in opened.parts.values() if isinstance(pipe, DiffusionPipeline)]
        if len(pipes) < max(len(opened.parts), 2):
            raise CheckpointError(
                f"{opened.folder} does not name two stages or more. Save or download the pipeline "
                "again"
            )
        return cls(pipes)

    def parts(self) -> dict[str, folders.WritePart]:
        def writer(pipe: DiffusionPipeline) -> folders.WritePart:
            return "pipeline", lambda folder: pipe.save(folder, codec=False)

        return {f"stage-{index}": writer(pipe) for index, pipe in enumerate(self.pipes)}

    def _states(self) -> dict[str, Mapping[str, Tensor]]:
        return {}

    def without_weights(self) -> Self:
        other = copy.copy(self)
        other.pipes = tuple(pipe.without_weights() for pipe in self.pipes)
        other.model = Stages([pipe.model for pipe in other.pipes])
        return other

    def _training(self) -> counting.Training:
        return counting.together([pipe._training() for pipe in self.pipes])

    def costs(self, **options: Any) -> dict[str, counting.Cost]:
        """What each stage that runs costs, by its name."""
        running, own = self._divide(options)
        return {
            self.names[index]: self.pipes[index].cost(**given)
            for index, given in zip(running, own, strict=True)
        }

    def options(self, sampler: str | None = None) -> list[Option]:
        takes = {name: ["sampler"] for name in self.names}
        wanted = divide_options(
            takes, {} if sampler is None else {"sampler": sampler}
        )  # says whose
        every = ", ".join((*self.names, *(["both"] if len(self.pipes) == 2 else []), "all"))
        own = [
            replace(option, section=f"{name}: {option.section}", name=f"{name}.{option.name}")
            for name, pipe in zip(self.names, self.pipes, strict=True)
            for option in pipe.options(wanted[name].get("sampler"))
        ]
        return [Option("relay", "stages", "all", f"which stages run: {every}", str), *own]

    def plan(
        self, seeds: Seeds, labels: Label | Iterable[Label] | None = None, **options: Any
    ) -> RelayPlan:
        """What `sample_batches` was asked for, checked and ready for `run`.

        Args:
            options: `stages`, which of them run: "first", "second", ..., or "all" (of two, also
                "both"); `start_from`, pictures that the first stage which runs starts from, by
                default the one that they fit; `precision`, of all stages; and those of a stage's
                `DiffusionPipeline.plan`, behind its name and a dot: `first.steps`. Names that only
                one of the stages takes need none.

        Raises:
            TesseraError: a class or an option that the stages cannot have.
        """
        return self._plan(list_seeds(seeds), labels, options)

    def with_start(self, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("start_from") is not None:
            return options
        running, own = self._divide(options)
        shape = self.pipes[running[0]].open_plan([0], None, **own[0]).start_shape
        if shape is None:
            return options
        blank = self.pipes[running[0]].with_start(own[0])["start_from"]
        return {**options, "start_from": blank}

    def _plan(
        self,
        seeds: Sequence[int],
        labels: Label | Iterable[Label] | None,
        options: Mapping[str, Any],
    ) -> RelayPlan:
        running, own = self._divide(options)
        classes = self.choose_labels(seeds, labels)
        plans = [
            self.pipes[index].open_plan(
                seeds, classes if self.pipes[index].model.num_classes else None, **given
            )
            for index, given in zip(running, own, strict=True)
        ]
        check_start(plans[0])
        for place, (before, after) in enumerate(itertools.pairwise(plans)):
            if before.shape != _enlarged(after.start_shape, self._factors[running[place]]):
                one, other = (self.names[running[place + step]] for step in (0, 1))
                raise TesseraError(
                    f"the stage {one} would make pictures of {_side(before.shape)} pixels, and "
                    f"{other} would start from {_side(after.start_shape)} (height x width). Change "
                    f"`{one}.size` or `{other}.size`"
                )
        names = [self.names[index] for index in running]
        facts = {"stages": names} | {
            name: plan.facts for name, plan in zip(names, plans, strict=True)
        }
        return RelayPlan(seeds, classes, plans, facts)

    def _divide(self, options: Mapping[str, Any]) -> tuple[list[int], list[dict[str, Any]]]:
        """The numbers of the stages that run, and the options of each."""
        given = dict(options)
        pictures: Pictures | None = given.pop("start_from", None)
        running = self._running(given.pop("stages", None), pictures)
        shared = {key: given.pop(key) for key in ("precision",) if key in given}
        takes = {self.names[index]: self._takes(self.pipes[index]) for index in running}
        resting = [name for name in self.names if name not in takes]
        divided = [shared | own for own in divide_options(takes, given, resting).values()]
        if pictures is not None:
            divided[0]["start_from"] = pictures
        return running, divided

    def _takes(self, pipe: DiffusionPipeline) -> set[str]:
        """Names of the options of a stage; where they are refused, it says why itself."""
        noise = pipe.recipe.fitted_sampling.enlarges is None
        own = {option.name for option in pipe.options()}
        return own | {"sampler", "guide"} | ({"latents"} if noise else set())

    def _running(self, stages: str | None, pictures: Pictures | None) -> list[int]:
        """The numbers of the stages that run."""
        count = len(self.pipes)
        if stages in self.names:
            return [self.names.index(stages)]
        if stages not in (None, "all", *(["both"] if count == 2 else [])):
            choices = [*self.names, *(["both"] if count == 2 else []), "all"]
            raise TesseraError(f"`stages={stages}`: there is none. Choose {', '.join(choices)}")
        if pictures is None:
            return [*range(count)]
        if stages is not None and self.pipes[0].recipe.start_shape is None:
            raise TesseraError(
                f"`stages={stages}`: the stage first starts from noise, and `start_from` gives "
                "pictures for a later one. Leave out one of them"
            )
        starts = [pipe.recipe.start_shape for pipe in self.pipes]
        for index, shape in enumerate(starts):
            if shape is not None and fits_start(shape, pictures, self.codec):
                return [*range(index, count)]
        # None is of its usual size: the earliest that takes pictures says what it wants.
        return [*range(next(k for k, shape in enumerate(starts) if shape is not None), count)]


def _side(shape: tuple[int, int, int] | None) -> str:
    return "nothing" if shape is None else f"{shape[1]}x{shape[2]}"


def assemble_relay(pipes: Sequence[Pipeline]) -> RelayPipeline:
    """A relay of pipelines, from the lowest resolution to the highest.

    The first one may be a model of the last resolution that sees means of blocks at high noise
    (view.kind=bands): it stops where that ends, and hands over the means.

    Raises:
        TesseraError: they do not fit each other.
    """
    own = [pipe for pipe in pipes if isinstance(pipe, DiffusionPipeline)]
    if len(own) < len(pipes):
        other = next(pipe for pipe in pipes if not isinstance(pipe, DiffusionPipeline))
        raise TesseraError(
            f"{other.recipe.name} is a pipeline of kind {other.kind}: stages of a relay are "
            "denoisers, or experts put together from them"
        )
    for pipe in own:
        pipe.check_complete()
    if len(own) > 1 and _factor(*own[:2]) > 1:
        own[0] = _stopped(own[0])
    return RelayPipeline(own)


def _stopped(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A first stage whose sampler stops where the coarse view of its model ends."""
    sampling, band = pipe.recipe.sampling, _coarse(pipe)
    own: float | None = getattr(sampling, "sigma_min", None)
    if band is None or own is None:
        return pipe
    # A little higher, so that rounding does not put the last level below the band.
    last = {"sigma_min": max(band.sigma_min * (1 + 1e-6), own)}
    other = copy.copy(pipe)
    other.recipe = pipe.recipe.model_copy(update={"sampling": sampling.model_copy(update=last)})
    return other


def _coarse(pipe: DiffusionPipeline) -> Band | None:
    """The highest noise levels of a model, if it sees means of blocks there."""
    band = pipe.model.bands[-1] if isinstance(pipe.model, BandedDenoiser) else None
    return band if band is not None and band.factor > 1 else None


def _factor(before: DiffusionPipeline, after: DiffusionPipeline) -> int:
    """By how much the pictures of a stage are shrunk for the next one."""
    start = after.recipe.start_shape
    return 1 if start is None else max(1, before.recipe.shape[1] // start[1])


def _enlarged(shape: tuple[int, int, int] | None, factor: int) -> tuple[int, int, int] | None:
    return None if shape is None else (shape[0], factor * shape[1], factor * shape[2])


def _handed(picture: Tensor, after: DiffusionPlan) -> Tensor:
    """What the next stage starts from: a picture [B, C, H, W], or the means of its blocks."""
    assert after.start_shape is not None
    return block_means(picture, picture.shape[-1] // after.start_shape[2])


def _check(pipes: Sequence[DiffusionPipeline]) -> None:
    """Raise unless each stage can start from the pictures of the one before."""
    if not 2 <= len(pipes) <= len(STAGES):
        raise TesseraError(
            f"a relay has 2 to {len(STAGES)} stages, from the lowest resolution to the highest; "
            f"{len(pipes)} were given"
        )
    classes = {pipe.model.num_classes for pipe in pipes} - {0}
    if len(classes) > 1:
        raise TesseraError(
            f"the stages know different numbers of classes: {', '.join(map(str, sorted(classes)))}"
            ". Train them on the same classes, or without"
        )
    names = {pipe.class_names for pipe in pipes if pipe.class_names}
    if len(names) > 1:
        raise TesseraError(
            "the classes of the stages have different names, so that a class would mean different "
            "things to them. Train them on the same data set"
        )
    for place, (before, after) in enumerate(itertools.pairwise(pipes)):
        _check_pair(before, after, STAGES[place], STAGES[place + 1])


def _check_pair(before: DiffusionPipeline, after: DiffusionPipeline, one: str, other: str) -> None:
    shape, start = before.recipe.shape, after.recipe.start_shape
    one, other = f"{one} ({before.recipe.name})", f"{other} ({after.recipe.name})"
    if start is None:
        raise TesseraError(
            f"the stage {other} starts from noise, not from a picture of {one}. Train it with "
            "objective.kind=blur, or name the stages from the lowest resolution to the highest"
        )
    if before.recipe.codec.space != after.recipe.codec.space:
        raise TesseraError(
            f"the stages {one} and {other} do not speak of the same pixels or latents: their "
            "recipes differ in `codec`"
        )
    if shape[0] != start[0]:
        raise TesseraError(
            f"the stage {one} makes {shape[0]} channel(s), and {other} starts from {start[0]}"
        )
    band, factor = _coarse(before), _factor(before, after)
    if band is not None and not band.factor % factor and shape == _enlarged(start, factor):
        last = getattr(after.recipe.fitted_sampling, "sigma_start", math.inf)
        if band.sigma_min > last:
            raise TesseraError(
                f"the stage {one} sees means of {band.factor}x{band.factor} pixels down to noise "
                f"level {band.sigma_min:g} only, and {other} begins at {last:g}. Train the first "
                f"with bands whose last one begins at {last:g} or lower"
            )
        return
    if shape != start:
        block = after.recipe.shape[1] // shape[1]
        fit = ""
        if block * shape[1] == after.recipe.shape[1] and block > 1:
            fit = f", or train the second with objective.block={block}"
        raise TesseraError(
            f"the stage {one} makes pictures of {shape[1]}x{shape[2]} pixels, and {other} starts "
            f"from {start[1]}x{start[2]}. Use stages that fit{fit}"
        )

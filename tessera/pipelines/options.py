"""What a caller may say about sampling: seeds, classes, small images, the sampler, precision."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from tessera.conditioning import NO_CLASS
from tessera.diffusion.denoiser import Denoiser
from tessera.errors import TesseraError
from tessera.pipelines.canvas import Canvas
from tessera.precision import autocast, resolve
from tessera.recipes.schema import (
    AblationSampler,
    DdimSampler,
    DdpmSampler,
    EdmSampler,
    ProcessSampler,
    Recipe,
    SamplerConfig,
    VaeCodec,
)
from tessera.sampling.core import Sampler
from tessera.sampling.seeds import parse_seeds

Seeds = Iterable[int] | str
Label = SupportsIndex | str
Precision = Literal["auto", "fp32", "bf16"]
Output = Literal["numpy", "pil", "tensor"]
OUTPUTS: tuple[Output, ...] = get_args(Output)

ONLY_ABLATION = frozenset(AblationSampler.model_fields) - frozenset(EdmSampler.model_fields)
"""Options whose presence selects the ablation sampler."""


@dataclass(frozen=True)
class Plan:
    """What makes the images of one call.

    Attributes:
        classes: of all images; None where each seed draws its own.
        canvas: the part of the picture that is made.
        denoiser: with all wrappers that were asked for.
        autocast: the arithmetic of the network.
    """

    classes: NDArray[np.int64] | None
    canvas: Canvas
    sampler: Sampler
    denoiser: Denoiser
    autocast: torch.autocast


Kind = type[EdmSampler] | type[AblationSampler] | type[DdpmSampler] | type[DdimSampler]
KINDS: dict[str, Kind] = {
    "edm": EdmSampler,
    "ablation": AblationSampler,
    "ddpm": DdpmSampler,
    "ddim": DdimSampler,
}


def list_seeds(seeds: Seeds) -> list[int]:
    """Seeds in any of the forms that callers may give, as a list.

    Raises:
        TesseraError: one number alone, which may be meant as a seed or as a count; or no numbers.
    """
    if isinstance(seeds, str):
        return parse_seeds(seeds)
    try:
        return [operator.index(seed) for seed in seeds]
    except TypeError:
        pass
    try:
        number = operator.index(cast(SupportsIndex, seeds))
    except TypeError:
        raise TesseraError(
            f"`seeds`: expected whole numbers, or text like '0-63,100', got {seeds!r}"
        ) from None
    raise TesseraError(
        f"`seeds={number}`: one number may be meant as a seed or as a count. Give [{number}] for "
        f"the image of seed {number}, or range({number}) for {number} images"
    )


def check_batch(batch: int) -> None:
    """Check that `batch` images can be made at once.

    Raises:
        TesseraError: it is less than 1.
    """
    if batch < 1:
        raise TesseraError(f"`batch={batch}`: give at least 1 image at once")


def choose_sampler(
    recipe: Recipe, options: Mapping[str, Any], others: Iterable[str] = ()
) -> SamplerConfig:
    """The recipe's sampler with the caller's options; options of EDM's ablations switch to those.

    The option `sampler` chooses another one by its kind, with its own defaults. Estimates of
    latents, which are not confined to [-1, 1] as pixels are, are clipped only if `clip` says how.

    Args:
        others: what the caller takes beside these options, to suggest where a name is misspelt.

    Raises:
        TesseraError: an option is unknown or has a value that it cannot have.
    """
    section: SamplerConfig = recipe.sampling
    options = dict(options)
    wanted = options.pop("sampler", section.kind)
    if wanted not in KINDS:
        raise TesseraError(f"there is no sampler {wanted!r}. Choose {', '.join(KINDS)}")
    if wanted != section.kind:
        section = KINDS[wanted]()
    values = section.model_dump()
    if isinstance(section, EdmSampler) and ONLY_ABLATION & options.keys():
        # There the range of σ follows from the discretisation unless the caller gives it.
        del values["kind"], values["sigma_min"], values["sigma_max"]
        kind: Kind = AblationSampler
    else:
        kind = type(section)
    for name in options:
        if name not in kind.model_fields:
            raise TesseraError(f"the sampler has no option `{name}`. {_hint(name, kind, others)}")
    try:
        chosen: SamplerConfig = kind.model_validate({**values, **options})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise TesseraError(
            f"`{where}={first['input']}`: {first['msg'].lower()}"
            if where
            else first["msg"].removeprefix("Value error, ")
        ) from error
    if isinstance(chosen, ProcessSampler) and isinstance(recipe.codec, VaeCodec):
        clip = "none" if chosen.clip == "auto" else chosen.clip
        return chosen.model_copy(update={"clip": clip})
    return chosen


def _hint(name: str, kind: Kind, others: Iterable[str]) -> str:
    """What may be meant by an option that samplers of a kind have not."""
    having = [f"`sampler={other}`" for other, section in KINDS.items() if name in _names(section)]
    if having:
        return f"It is one of {' and '.join(having)}"
    near = difflib.get_close_matches(name, [*_names(kind), *others], 1)
    if near:
        return f"Did you mean `{near[0]}`?"
    return f"There are {', '.join(f'`{known}`' for known in _names(kind))}"


def _names(kind: Kind) -> list[str]:
    return [name for name in kind.model_fields if name != "kind"]


def choose_labels(
    labels: Label | Iterable[Label] | None,
    seeds: Sequence[int],
    num_classes: int,
    class_names: Sequence[str] | None = None,
) -> NDArray[np.int64] | None:
    """Class indices, one a seed; None where each seed is to draw its own.

    Args:
        labels: one class for all images, or one for each: index, name, or -1 for no class;
            "balanced" for seed modulo the number of classes; None to draw.

    Raises:
        TesseraError: the model knows no classes, or not this one, or the number of labels is not
            that of the seeds.
    """
    if labels is None:
        return None
    if num_classes == 0:
        raise TesseraError(
            "a class was asked for, but this model was trained without classes. Leave out `labels`"
        )
    if isinstance(labels, str) and labels == "balanced":
        return np.array([seed % num_classes for seed in seeds], np.int64)
    if getattr(labels, "ndim", None) == 0:  # an array of one number calls itself iterable
        labels = operator.index(cast(SupportsIndex, labels))
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        return np.full(len(seeds), class_index(labels, num_classes, class_names), np.int64)
    indices = [class_index(label, num_classes, class_names) for label in labels]
    if len(indices) != len(seeds):
        raise TesseraError(
            f"{len(indices)} classes were given for {len(seeds)} seeds. "
            "Give one class for all images, or one for each"
        )
    return np.array(indices, np.int64)


def class_index(label: Label, num_classes: int, class_names: Sequence[str] | None = None) -> int:
    """The index of a class given by name or index; -1 for no class.

    A string is looked up among the names before it is read as a number.

    Raises:
        TesseraError: there is no such class.
    """
    if isinstance(label, str):
        names = list(class_names or ())
        if label in names:
            return names.index(label)
        try:
            index = int(label)
        except ValueError:
            near = difflib.get_close_matches(label, names, 3)
            hint = f"Did you mean {' or '.join(near)}?" if near else _known(num_classes, names)
            raise TesseraError(f"there is no class {label!r}. {hint}") from None
    else:
        index = operator.index(label)
    if index != NO_CLASS and not 0 <= index < num_classes:
        raise TesseraError(
            f"there is no class {index}. {_known(num_classes, list(class_names or ()))}"
        )
    return index


def _known(num_classes: int, names: list[str]) -> str:
    known = f"The classes are 0 to {num_classes - 1}"
    return f"{known}: {shortened(names)}" if names else known


def shortened(names: Sequence[str]) -> str:
    """The first dozen of the names."""
    return f"{', '.join(names[:12])}{', …' if len(names) > 12 else ''}"


def check_guidance(scale: float, by_weaker: bool, classes: NDArray[np.int64] | None) -> None:
    """Check that guidance has something to act on.

    Raises:
        TesseraError: no image has a class, so guiding away from the model without class costs
            two evaluations for the result of one.
    """
    if not by_weaker and classes is not None and len(classes) and (classes == NO_CLASS).all():
        raise TesseraError(
            f"`guidance={scale:g}` does nothing for images without a class, and costs twice as "
            "much. Leave it out, give classes by `labels`, or guide by a weaker model (`guide`)"
        )


def check_output(output: str) -> None:
    """Check that `Pipeline.sample` knows this form of images.

    Raises:
        TesseraError: it does not.
    """
    if output not in OUTPUTS:
        raise TesseraError(f"`output={output}`: there is none. Choose {', '.join(OUTPUTS)}")


def check_complete(*models: object) -> None:
    """Check that pipelines know all noise levels; what has no recipe is not looked at.

    Raises:
        TesseraError: one is an expert alone.
    """
    for model in models:
        recipe = getattr(model, "recipe", None)
        if not isinstance(recipe, Recipe) or recipe.expert is None:
            continue
        low, high = sigma_range(recipe.snr_splits, recipe.expert)
        names = [f"EXPERT-{k}" for k in range(len(recipe.snr_splits) + 1)]
        raise TesseraError(
            f"the model {recipe.name} is expert {recipe.expert} of 0 to {len(names) - 1}: it knows "
            f"noise levels from {low:.4g} to {high:.4g} only, and images need all of them. Put the "
            "experts together first, from the cleanest to the noisiest: tessera experts NAME "
            + " ".join(names)
        )


def check_low_res(recipe: Recipe, low_res: NDArray[np.uint8] | None) -> None:
    """Check that small images are given exactly where the model enlarges them.

    Raises:
        TesseraError: they are missing, of another shape, or not wanted.
    """
    side, channels = recipe.low_resolution, recipe.shape[0]
    if side is None and low_res is not None:
        raise TesseraError(
            "small images were given, but this model does not enlarge images. Leave them out, "
            "or train with low_resolution"
        )
    if side is not None and (low_res is None or low_res.shape[1:] != (side, side, channels)):
        given = "none were given" if low_res is None else f"these are {low_res.shape[1:]}"
        raise TesseraError(
            f"this model enlarges images of shape ({side}, {side}, {channels}), and {given}. "
            "Give them as `low_res`"
        )


def check_images(images: NDArray[np.uint8], shape: tuple[int, int, int]) -> None:
    """Check that images are uint8 [N, H, W, C] of `shape` (C, H, W).

    Raises:
        TesseraError: they are not, or there are none.
    """
    channels, height, width = shape
    if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels) or not len(images):
        raise TesseraError(
            f"images of shape {images.shape}, {images.dtype}: this model encodes uint8 images "
            f"[N, {height}, {width}, {channels}]"
        )


def check_latents(latents: Tensor | None, shape: tuple[int, int, int]) -> None:
    """Check that latents, if there are any, are [N, *shape].

    Raises:
        TesseraError: they are not, or there are none of them.
    """
    if latents is not None and (latents.shape[1:] != shape or not len(latents)):
        raise TesseraError(
            f"latents of shape {tuple(latents.shape)}: this model begins with [N, "
            f"{', '.join(map(str, shape))}]"
        )


def autocast_for(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which the network computes in `precision`.

    Raises:
        TesseraError: there is no such precision.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise TesseraError(f"there is no precision {precision!r}. Choose auto, fp32 or bf16")
    return autocast(device, resolve(precision, device))

"""A user's own parts at work: made, and checked once, in words, before anything is done with them.

What a part does with values is its own affair; shapes, types and the like are those of the library.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tessera import distributed
from tessera.conditioning import NO_CLASS, Conditioning, full_grid
from tessera.data.dataset import (
    CachedReader,
    Dataset,
    ImageDataset,
    ImageReader,
    choose_subset,
)
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.objectives import Objective
from tessera.errors import DataError, RecipeError
from tessera.model import Model
from tessera.randomness import AddressedDraws
from tessera.recipes import schema
from tessera.recipes.parts import Parts, a_kind, blame
from tessera.sampling.core import Levels, NoiseSource, Refine, Sampler, SamplerState, Solver

# ---------------------------------------------------------------------------------------- networks


def own_network(
    recipe: schema.Recipe, section: schema.ExternalNetworkConfig, parts: Parts
) -> nn.Module:
    """The caller's network with fresh weights.

    It is tried once, but on the meta device: on two images of each size that it is trained on, with
    all that it will be told in training and in sampling.

    Raises:
        RecipeError: it is missing, raises something or puts out what the recipe cannot use.
    """
    made = parts.make("network", "network.kind", recipe, **section.options)
    if not isinstance(made, nn.Module):
        raise RecipeError(
            f"the own part 'network' made {a_kind(made)}; it must make a torch.nn.Module"
        )
    if torch.empty(0).device.type != "meta":
        _try(recipe, made)
    if not any(parameter.requires_grad for parameter in made.parameters()):
        raise RecipeError("the own part 'network' made a module without parameters to train")
    return made


def _try(recipe: schema.Recipe, network: nn.Module) -> None:
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    with _aside(network):
        for side, cond in _occasions(recipe, device):
            shape = recipe.shape[0] * (1 if cond.image is None else 2), side, side
            x, noise = torch.zeros(2, *shape, device=device), torch.zeros(2, device=device)
            with blame("network"):
                output = network(x, noise, cond)
            _check_output(recipe, output, x, cond)


def _check_output(recipe: schema.Recipe, output: Any, x: Tensor, cond: Conditioning) -> None:
    """Raise unless a network put out what the preconditioning takes."""
    channels = recipe.shape[0]
    allowed = (channels, 2 * channels) if recipe.preconditioning.doubles_channels else (channels,)
    for part in output if isinstance(output, tuple) and output else (output,):
        found = a_kind(part)
        if isinstance(part, Tensor):
            found = f"{str(part.dtype).removeprefix('torch.')} {list(part.shape)}"
            fits = part.ndim == 4 and part.shape[1] in allowed and len(part) == len(x)
            if fits and part.shape[2:] == x.shape[2:] and part.is_floating_point():
                continue
        wanted = " or ".join(str([len(x), count, *x.shape[2:]]) for count in allowed)
        raise RecipeError(
            f"the own part 'network' made of x {list(x.shape)}, noise [{len(x)}] and {_told(cond)} "
            f"{found}; it must make floating-point numbers {wanted}"
        )


def _occasions(recipe: schema.Recipe, device: torch.device) -> Iterator[tuple[int, Conditioning]]:
    """Sides of two images, and what a network is told of them: in training, and in sampling."""
    sides, frequencies = recipe.patch_sizes, recipe.coord_frequencies
    for side in sides:
        yield side, _conditioning(recipe, side, device)
    if recipe.augment_dim or frequencies is not None:
        yield sides[-1], _conditioning(recipe, None, device)


def _conditioning(recipe: schema.Recipe, side: int | None, device: torch.device) -> Conditioning:
    """Of two images of a training step, the second without its class; of samples without `side`."""
    classes, start = recipe.data.num_classes, recipe.start_shape
    trained = side is not None
    coords = None
    if side is not None and recipe.view.needs_coordinates:
        coords = full_grid((side, side), device).expand(2, -1, -1, -1)
    return Conditioning(
        labels=torch.tensor([0, NO_CLASS], device=device) if classes else None,
        augment=torch.zeros(2, recipe.augment_dim, device=device)
        if trained and recipe.augment_dim
        else None,
        coords=coords,
        image=torch.zeros(2, *start, device=device) if start else None,
    )


def _told(cond: Conditioning) -> str:
    labels = "no labels" if cond.labels is None else f"labels {cond.labels.tolist()}"
    given = [n for n in ("augment", "coords", "image") if getattr(cond, n) is not None]
    return ", ".join([labels, *given])


@contextlib.contextmanager
def _aside(module: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """The module tried out: it keeps its state, and the caller's random numbers are not used up."""
    training = {part: part.training for part in module.modules()}
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients):
        module.eval()
        try:
            yield
        finally:
            for part, mode in training.items():
                part.training = mode


# -------------------------------------------------------------------------------------- objectives


def own_objective(
    recipe: schema.Recipe, section: schema.ExternalObjectiveConfig, parts: Parts
) -> Objective:
    """The caller's objective, which `check_trained` tries.

    Raises:
        RecipeError: it is missing, raises something or cannot be called.
    """
    made = parts.make("objective", "objective.kind", recipe, **section.options)
    if not callable(made):
        raise RecipeError(
            f"the own part 'objective' made {a_kind(made)}; it must make a function of (model, x, "
            "conditioning, draws)"
        )
    reduction = getattr(made, "reduction", "sum")
    if reduction not in ("sum", "mean"):
        raise RecipeError(
            f"the own part 'objective' has reduction={reduction!r}; it is 'sum' or 'mean', by "
            "which the loss of an image comes from those of its pixels"
        )
    alignment = getattr(made, "alignment", 1)
    if type(alignment) is not int or alignment < 1:
        raise RecipeError(
            f"the own part 'objective' has alignment={alignment!r}; it is a whole number of "
            "pixels, on whose multiples patches begin and end"
        )
    objective: Objective = made
    return objective


def check_trained(recipe: schema.Recipe, model: Model, objective: Objective) -> None:
    """Try one step's loss of two images, if a part of it is the caller's own.

    Raises:
        RecipeError: the terms are none, or on several processes a parameter has no part in them.
    """
    own = isinstance(recipe.objective, schema.ExternalObjectiveConfig)
    network = isinstance(recipe.network, schema.ExternalNetworkConfig)
    shared = distributed.active() and recipe.training.parallel == "ddp"
    if not own and not (network and shared):
        return
    device = next(model.parameters()).device
    side = recipe.shape[1]
    cond = _conditioning(recipe, side, device)
    x = torch.zeros(2, recipe.shape[0], side, side, device=device)
    draws = AddressedDraws(recipe.training.seed, torch.arange(2, device=device))
    with _aside(model, gradients=True):
        with blame("objective"):
            terms = objective(model, x, cond, draws)
        _check_terms(terms)
        if shared:
            _check_used(model, terms["loss"])


def _check_terms(terms: Any) -> None:
    if not isinstance(terms, dict) or "loss" not in terms:
        found = f"a dictionary of {', '.join(map(str, terms))}" if isinstance(terms, dict) else None
        raise RecipeError(
            f"the own part 'objective' gave {found or a_kind(terms)}; it must give a dictionary "
            "with 'loss', [B], one number for each image"
        )
    for name, term in terms.items():
        fits = isinstance(term, Tensor) and term.shape == (2,)
        if fits and (term.dtype == torch.int64 if name == "quartile" else term.is_floating_point()):
            continue
        found = f"{term.dtype} {list(term.shape)}" if isinstance(term, Tensor) else a_kind(term)
        kind = "int64 numbers 0 to 3" if name == "quartile" else "floating-point numbers"
        raise RecipeError(
            f"the own part 'objective' gave as {name!r} of 2 images {found.removeprefix('torch.')};"
            f" it must be {kind} [2], one for each image"
        )
    if not terms["loss"].requires_grad:
        raise RecipeError(
            "the own part 'objective' gave a 'loss' that does not depend on the model's weights "
            "(is it computed under torch.no_grad, or from detached tensors?)"
        )


def _check_used(model: Model, loss: Tensor) -> None:
    """Raise if a parameter takes no part: processes would wait for its gradient."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss.sum(), [p for _, p in named], allow_unused=True)
    unused = [name for (name, _), gradient in zip(named, found, strict=True) if gradient is None]
    if unused:
        raise RecipeError(
            f"these parameters take no part in the loss: {', '.join(unused)}. On several processes "
            "all must: remove them, set their requires_grad to False, or use "
            "training.parallel=fsdp"
        )


# ---------------------------------------------------------------------------------------- samplers


def own_sampler(
    section: schema.ExternalSamplerConfig, parts: Parts, refine: Refine | None
) -> Sampler:
    """The caller's sampler; what it does while it samples is checked as it goes.

    Raises:
        RecipeError: it is missing, raises something or is none.
    """
    hook = {} if refine is None else {"refine": refine}
    made = parts.make("sampler", "sampling.kind", **section.options, **hook)
    if not isinstance(made, Sampler):
        raise RecipeError(
            f"the own part 'sampler' made {a_kind(made)}; it must make a "
            "tessera.sampling.core.Sampler(levels, solver)"
        )
    return Sampler(_checked_levels(made.levels), _checked_solver(made.solver))


def own_refine(section: schema.ExternalRefineConfig, parts: Parts) -> Refine:
    """The caller's hook after each step of a sampler.

    Raises:
        RecipeError: it is missing, raises something or cannot be called.
    """
    made = parts.make("refine", "sampling.refine", **section.options)
    if not callable(made):
        raise RecipeError(
            f"the own part 'refine' made {a_kind(made)}; it must make a function of (denoiser, x, "
            "sigma, conditioning, noise)"
        )
    hook: Refine = made
    return hook


def _checked_levels(levels: Levels) -> Levels:
    def checked(denoiser: Denoiser) -> list[float]:
        with blame("sampler"):
            found = [float(level) for level in levels(denoiser)]
        if not found or found[-1] <= 0 or any(a <= b for a, b in itertools.pairwise(found)):
            shown = ", ".join(f"{level:g}" for level in found) or "none"
            raise RecipeError(
                f"the own part 'sampler' has noise levels that do not fall to a last one above 0: "
                f"{shown}"
            )
        return found

    return checked


def _checked_solver(solver: Solver) -> Solver:
    @torch.no_grad()
    def checked(
        denoiser: Denoiser,
        latents: Tensor,
        cond: Conditioning,
        noise: NoiseSource,
        levels: Sequence[float],
    ) -> Iterator[SamplerState]:
        state: Any = None
        with blame("sampler"):  # of options that it does not know
            states = solver(denoiser, latents, cond, noise, levels)
        for state in states:
            if not isinstance(state, SamplerState) or state.x.shape != latents.shape:
                found = (
                    f"x {list(state.x.shape)}" if isinstance(state, SamplerState) else a_kind(state)
                )
                raise RecipeError(
                    f"the own part 'sampler' yielded {found} from latents {list(latents.shape)}; "
                    "each step must yield a SamplerState with an x of their shape"
                )
            yield state
        if state is None:
            raise RecipeError("the own part 'sampler' ended without a step; it must yield each")

    return checked


# --------------------------------------------------------------------------------------- data sets

_ATTRIBUTES = ("name", "shape", "labels", "class_names", "num_classes", "__len__", "read", "close")


def own_dataset(recipe: schema.Recipe, parts: Parts) -> Dataset:
    """The caller's data set as it is, all images once.

    Raises:
        RecipeError: it raises something, or is no `Dataset`; the message names all that is missing.
    """
    made = parts.make("dataset", "data", recipe)
    missing = [name for name in _ATTRIBUTES if not hasattr(made, name)]
    if missing:
        raise RecipeError(
            f"the own part 'dataset' made {a_kind(made)} without {', '.join(missing)}; see "
            "tessera.data.dataset.Dataset"
        )
    with blame("dataset"):
        problems = [*_label_problems(made), *_image_problems(recipe, made)]
    if problems:
        raise RecipeError(
            "the own part 'dataset' made a set that cannot be used:\n  " + "\n  ".join(problems)
        )
    dataset: Dataset = made
    return _Whole(dataset)


def trained_dataset(recipe: schema.Recipe, parts: Parts, seed: int) -> Dataset:
    """The caller's data set as it is trained on: a part of it, mirrored, or kept in memory.

    Raises:
        RecipeError: see `own_dataset`; mirrored latents.
    """
    data, dataset = recipe.data, own_dataset(recipe, parts)
    if data.xflip and not recipe.codec.takes_images:
        raise RecipeError(
            "data.xflip cannot mirror the latents of an own data set; add mirrored ones to it"
        )
    reader: ImageReader = dataset
    if data.cache and recipe.codec.takes_images:
        reader = CachedReader(dataset, len(dataset))
    rows = choose_subset(len(dataset), data.max_images, seed)
    made = ImageDataset(
        dataset.name, "own", reader, dataset.labels, dataset.class_names, rows, data.xflip
    )
    made.num_classes = dataset.num_classes
    return made


class _Whole:
    """A caller's data set, of which everything that is read has the shape and type it must have."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        channels, height, width = dataset.shape
        self.name, self.shape = str(dataset.name), (channels, height, width)
        self.labels, self.num_classes = dataset.labels, int(dataset.num_classes)
        self.class_names = None if dataset.class_names is None else tuple(dataset.class_names)
        first = np.asarray(dataset.read(np.zeros(1, np.int64)))
        self._shape, self._dtype = first.shape[1:], first.dtype

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        with blame("dataset"):
            found = np.asarray(self._dataset.read(indices))
        wanted = (len(indices), *self._shape)
        if found.shape != wanted or found.dtype != self._dtype:
            raise DataError(
                f"{self.name}: images {_some(indices)} were read as {found.dtype} "
                f"{list(found.shape)}, not as {self._dtype} {list(wanted)}"
            )
        return np.array(found, order="C")  # the caller may keep its own

    def close(self) -> None:
        self._dataset.close()


def _some(indices: NDArray[np.int64]) -> str:
    shown = ", ".join(map(str, indices[:4].tolist()))
    return f"{shown}, ..." if len(indices) > 4 else shown


def _label_problems(dataset: Any) -> Iterator[str]:
    """What is wrong with the labels of a caller's set."""
    labels, classes, names = dataset.labels, dataset.num_classes, dataset.class_names
    if len(dataset) == 0:
        yield "it is empty"
    if not isinstance(classes, int | np.integer) or classes < 0:
        yield f"num_classes is {classes!r}; it must be a number, 0 without labels"
        return
    if names is not None and len(names) != classes:
        yield f"class_names are {len(names)}, but num_classes is {classes}"
    if labels is None:
        return
    if not isinstance(labels, np.ndarray):
        yield f"labels are {a_kind(labels)}; they must be None or a NumPy array of int64"
    elif labels.shape[:1] != (len(dataset),):
        yield f"labels have shape {list(labels.shape)}, but there are {len(dataset)} images"
    elif labels.ndim == 1 and labels.dtype != np.int64:
        yield f"labels are {labels.dtype}; they must be int64"
    elif labels.ndim == 1 and len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        yield (
            f"labels go from {labels.min()} to {labels.max()}, but num_classes is {classes}: they "
            f"must lie in 0 to {classes - 1}"
        )


def _image_problems(recipe: schema.Recipe, dataset: Any) -> Iterator[str]:
    """What is wrong with the images of a caller's set, the first and the last of them."""
    if len(dataset) == 0:
        return
    shape, pixels = tuple(dataset.shape), recipe.codec.takes_images
    if len(shape) != 3 or not all(isinstance(n, int | np.integer) and n > 0 for n in shape):
        yield f"shape is {dataset.shape!r}; it must be (C, H, W)"
        return
    if not pixels and shape != recipe.shape:
        yield f"shape is {shape}, but the latents of the recipe are {recipe.shape}"
    # Of latents, means and log-variances.
    wanted = (2, *(shape if pixels else (2 * shape[0], *shape[1:])))
    found = dataset.read(np.array([0, len(dataset) - 1]))
    if not isinstance(found, np.ndarray):
        yield f"read gives {a_kind(found)}; it must give a NumPy array {list(wanted)}"
        return
    fits = found.dtype == np.uint8 if pixels else found.dtype.kind == "f"
    if found.shape != wanted or not fits:
        yield (
            f"read gives {found.dtype} {list(found.shape)} for two images; it must give "
            f"{'uint8' if pixels else 'float16 or float32'} {list(wanted)}"
        )

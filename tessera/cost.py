"""What a recipe costs, before anything is trained: parameters, FLOPs, memory.

Everything is counted on the recipe's own objects (network, objective, sampler), run on tensors
without data, so that nothing is allocated and no formula has to keep up with the code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from tessera import distributed
from tessera.conditioning import Conditioning
from tessera.data.views import PatchSize, PatchView
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.experts import Experts
from tessera.diffusion.guidance import Guided
from tessera.diffusion.preconditioning import Preconditioned
from tessera.diffusion.skipping import (
    BrickSchedule,
    Range,
    cut_bricks,
    last_brick_schedule,
    parse_schedule,
)
from tessera.errors import TesseraError
from tessera.precision import autocast, resolve
from tessera.randomness import AddressedDraws
from tessera.recipes.build import (
    Objective,
    build_denoiser,
    build_preconditioning,
    build_sampler,
    build_view,
    preconditioned,
    recipe_objective,
)
from tessera.recipes.schema import DiscreteObjective, LegoConfig, Recipe
from tessera.sampling.core import Sampler, step_sigmas
from tessera.sampling.seeds import SeedNoise


@dataclass(frozen=True)
class Cost:
    """What a recipe costs; FLOPs count a multiply-add as two, memory is in bytes on one device.

    Attributes:
        parameters: trained numbers.
        forward_flops: one evaluation of the denoiser for one image.
        train_flops: one training image, forward and backward; the mean over the sizes of patches.
        run_flops: the whole training run.
        evaluations: evaluations of the denoiser for one sampled image; guidance counts twice.
        sample_flops: one sampled image.
        micro_batch: images of one forward pass in training, if one device does all.
        activation_bytes: what is kept of one micro-batch for its backward pass; an estimate,
            because devices and compilers keep different intermediate results.
        weight_bytes, gradient_bytes, optimizer_bytes, ema_bytes: the other memory of training.
    """

    parameters: int
    forward_flops: int
    train_flops: int
    run_flops: int
    evaluations: int
    sample_flops: int
    micro_batch: int
    activation_bytes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    ema_bytes: int

    @property
    def train_bytes(self) -> int:
        """Memory of training on one device, without what the allocator wastes."""
        states = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.ema_bytes
        return states + self.activation_bytes


def estimate(
    recipe: Recipe,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    skip: float = 0.0,
    bricks: str | BrickSchedule | None = None,
) -> Cost:
    """Count what `recipe` costs; takes seconds and next to no memory for models of any size.

    Args:
        guidance: weight of classifier-free guidance while sampling; 1 for none.
        guidance_interval: noise levels where it acts; None for all.
        skip, bricks: of a stack of bricks, see `choose_bricks`.

    Raises:
        TesseraError: guidance of a model that knows no classes, or bricks that cannot skip.
    """
    return estimate_model([recipe], None, guidance, guidance_interval, skip, bricks)


def estimate_model(
    recipes: Sequence[Recipe],
    model: Preconditioned | Experts | None,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    skip: float = 0.0,
    bricks: str | BrickSchedule | None = None,
) -> Cost:
    """As `estimate`, of a model that may be made of experts: one trained after the other.

    Memory is then that of the expert that needs most of it, `forward_flops` the mean over the
    evaluations of a sampled image, `train_flops` that over the images that all train on.

    Args:
        recipes: of each network, from the cleanest noise levels; they sample as the first says.
        model: says which expert makes which noise levels; not looked at where there is one recipe.
        guidance, guidance_interval, skip, bricks: see `estimate`.

    Raises:
        TesseraError: as `estimate`.
    """
    denoisers = [_without_data(recipe).train() for recipe in recipes]
    counting = [_Counting(denoiser.network) for denoiser in denoisers]
    leaves = iter([preconditioned(*pair) for pair in zip(recipes, counting, strict=True)])

    def counted(part: Denoiser | None) -> Denoiser:
        if isinstance(part, Experts):
            return Experts([counted(own) for own, _ in part.owned()], part.thresholds)
        return next(leaves)

    _evaluate(recipes[0], counted(model), guidance, guidance_interval, skip, bricks)
    costs = [
        _cost(recipe, denoiser, count.images)
        for recipe, denoiser, count in zip(recipes, denoisers, counting, strict=True)
    ]
    largest = max(costs, key=lambda cost: cost.train_bytes)
    evaluations = sum(cost.evaluations for cost in costs)
    run = sum(cost.run_flops for cost in costs)
    return replace(
        largest,
        parameters=sum(cost.parameters for cost in costs),
        forward_flops=round(sum(c.forward_flops * c.evaluations for c in costs) / evaluations),
        train_flops=round(run / sum(recipe.training.images for recipe in recipes)),
        run_flops=run,
        evaluations=evaluations,
        sample_flops=sum(cost.sample_flops for cost in costs),
    )


def _without_data(recipe: Recipe) -> Preconditioned:
    """The denoiser on the meta device."""
    # Tables of noise levels are cached; make them before tensors are without data.
    _ = build_preconditioning(recipe.preconditioning).sigma_min
    with torch.device("meta"):
        denoiser = build_denoiser(recipe).train()
    evaluations = _evaluations(recipe, denoiser.network, guidance, guidance_interval, skip, bricks)
    try:
        return _count(recipe, denoiser, evaluations)
    except RuntimeError as error:  # of tensors with more numbers than can be counted
        raise TesseraError(
            f"{recipe.name}: what it computes is too large to be counted. Make the network, the "
            "images or training.micro_batch smaller"
        ) from error


def _count(recipe: Recipe, denoiser: Preconditioned, evaluations: Counter[int | None]) -> Cost:
    """As `estimate`, of a denoiser of meta tensors."""
    forward = _forward_flops(recipe, denoiser)
    sample = sum(n * _forward_flops(recipe, denoiser, None, k) for k, n in evaluations.items())
    train = _train_flops(recipe, denoiser)
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    weights = sum(p.nbytes for p in parameters)
    micro_batch = recipe.training.micro_batch or recipe.training.batch
    return Cost(
        parameters=sum(p.numel() for p in parameters),
        forward_flops=forward,
        train_flops=train,
        run_flops=train * recipe.training.images,
        evaluations=evaluations.total(),
        sample_flops=sample,
        micro_batch=micro_batch,
        activation_bytes=_activations(recipe, denoiser, micro_batch),
        weight_bytes=weights,
        gradient_bytes=weights,
        optimizer_bytes=2 * weights,
        ema_bytes=len(recipe.ema) * weights,
    )


def _train_flops(recipe: Recipe, denoiser: Denoiser) -> int:
    """FLOPs of one training image, forward and backward, on meta tensors."""
    x, cond, draws = example_inputs(recipe, 1, torch.device("meta"))
    view = build_view(recipe)
    sizes = view.sizes if isinstance(view, PatchView) else [PatchSize(x.shape[-1], 1.0, 1)]
    flops = images = 0.0
    for size in sizes:
        patch = x[:, :, : size.side, : size.side]
        with FlopCounterMode(display=False) as train:
            terms = _objective(recipe)(denoiser, patch, cond, draws)
            torch.autograd.backward(terms["loss"].sum())
        flops += size.probability * size.multiplier * train.get_total_flops()
        images += size.probability * size.multiplier
    return round(flops / images)


def _objective(recipe: Recipe) -> Objective:
    """What is minimised, at noise levels drawn in the simplest way: their choice costs nothing, but
    looks at the values of tensors, which have none here."""
    update: dict[str, Any] = {"expert": None}
    if isinstance(recipe.objective, DiscreteObjective):
        update["objective"] = recipe.objective.model_copy(update={"timesteps": "uniform"})
    return recipe_objective(recipe.model_copy(update=update))


def _activations(recipe: Recipe, denoiser: Denoiser, batch: int) -> int:
    """Bytes kept for the backward pass of `batch` images, each storage counted once.

    Leaves `denoiser` without usable weights.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    # Fake CPU tensors, not meta ones: these know autocast and fused attention.
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = denoiser.to_empty(device="cpu")
        x, cond, draws = example_inputs(recipe, batch, torch.device("cpu"))
        precision = resolve(recipe.training.precision, distributed.device())
        with (
            saved_tensors_hooks(keep, lambda tensor: tensor),
            autocast(torch.device("cpu"), precision),
        ):
            loss = _objective(recipe)(denoiser, x, cond, draws)["loss"]
        for parameter in denoiser.parameters():
            storages.pop(parameter.untyped_storage()._cdata, None)
        del loss
    return sum(storage.nbytes() for storage in storages.values())


def example_inputs(
    recipe: Recipe, batch: int, device: torch.device
) -> tuple[Tensor, Conditioning, AddressedDraws]:
    """Images, conditioning and draws of a training step."""
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    small = recipe.low_resolution
    cond = Conditioning(
        image=torch.zeros(batch, recipe.shape[0], small, small, device=device) if small else None,
        labels=labels if recipe.data.num_classes else None,
        augment=torch.zeros(batch, recipe.augment_dim, device=device)
        if recipe.augment_dim
        else None,
    )
    x = torch.zeros(batch, *recipe.shape, device=device)
    return x, cond, AddressedDraws(0, torch.arange(batch, device=device))


class _Counting(nn.Module):
    """In a network's place: computes nothing, counts images by the number of bricks."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.check_prefix = getattr(network, "check_prefix", None)
        self.specs = getattr(network, "specs", None)
        self.images: Counter[int | None] = Counter()

    def forward(
        self, x: Tensor, noise: Tensor, cond: Conditioning, *, bricks: int | None = None
    ) -> Tensor:
        self.images[bricks] += len(x)
        return x


def _evaluate(
    recipe: Recipe,
    model: Denoiser,
    guidance: float,
    guidance_interval: tuple[float, float] | None,
    skip: float,
    bricks: str | BrickSchedule | None,
) -> None:
    """Sample one image by the recipe's sampler from a model that counts its evaluations."""
    sampler = build_sampler(recipe.sampling)
    schedule = choose_bricks(recipe, model, sampler, skip, bricks)
    denoiser = model if schedule is None else cut_bricks(model, schedule)
    if guidance != 1:
        denoiser = Guided(denoiser, guidance, guidance_interval)
    labels = torch.zeros(1, dtype=torch.int64) if recipe.data.num_classes else None
    latents = torch.zeros(1, *recipe.shape)
    for _ in sampler(denoiser, latents, Conditioning(labels), SeedNoise([0])):
        pass


def sampling_evaluations(recipe: Recipe) -> int:
    """Evaluations of the denoiser for one image of the recipe's sampler, without guidance."""
    _ = build_preconditioning(recipe.preconditioning).sigma_min
    with torch.device("meta"):
        network = build_denoiser(recipe).network
    return _evaluations(recipe, network, 1.0, None, 0.0, None).total()


def choose_bricks(
    recipe: Recipe,
    denoiser: Denoiser,
    sampler: Sampler,
    skip: float = 0.0,
    bricks: str | BrickSchedule | None = None,
) -> BrickSchedule | None:
    """The bricks that a caller asks for: a share of the sampler's steps, or noise levels.

    Raises:
        TesseraError: both at once, a network without bricks, or what `last_brick_schedule` or
            `parse_schedule` raise.
    """
    if skip == 0 and bricks is None:
        return None
    if skip != 0 and bricks is not None:
        raise TesseraError("`skip` and `bricks` both say which bricks run; give one of them")
    network = recipe.network
    if not isinstance(network, LegoConfig):
        raise TesseraError(
            f"only networks made of bricks (network.kind=lego) can skip any; this one is a "
            f"{network.kind}. Leave out `skip` and `bricks`"
        )
    if bricks is not None:
        return parse_schedule(bricks) if isinstance(bricks, str) else bricks
    steps = step_sigmas(sampler, denoiser)
    ranges: list[Range] = []
    for sizes, band in _stacks(denoiser, (0.0, math.inf)):
        for part in last_brick_schedule(sizes, skip, steps).within(*band).ranges:
            if ranges and (ranges[-1].high, ranges[-1].bricks) == (part.low, part.bricks):
                part = replace(part, low=ranges.pop().low)
            ranges.append(part)
    return BrickSchedule(tuple(ranges))


def _stacks(
    model: Denoiser, band: tuple[float, float]
) -> Iterator[tuple[list[int], tuple[float, float]]]:
    """The sizes of the bricks of each expert, with the noise levels that it owns."""
    if isinstance(model, Experts):
        for expert, (low, high) in model.owned():
            yield from _stacks(expert, (max(low, band[0]), min(high, band[1])))
        return
    specs = getattr(model.network, "specs", None)
    if specs is None:
        raise TesseraError(
            "one of the experts is not made of bricks. Say at which noise levels to skip any, as "
            "in bricks='0-0.5:1'"
        )
    yield [spec.size for spec in specs], band


def forward_flops(
    recipe: Recipe, size: tuple[int, int] | None = None, bricks: int | None = None
) -> int:
    """FLOPs of one evaluation of the denoiser for one image.

    Args:
        size: height and width; None: as trained.
        bricks: how many bricks of a stack run; None: all.
    """
    return _forward_flops(recipe, _without_data(recipe).eval(), size, bricks)


def _forward_flops(
    recipe: Recipe,
    denoiser: Preconditioned,
    size: tuple[int, int] | None = None,
    bricks: int | None = None,
) -> int:
    """As `forward_flops`, on a denoiser of meta tensors, where attention is counted, too."""
    x, cond, _ = example_inputs(recipe, 1, torch.device("meta"))
    if size is not None:
        x = x.new_zeros(1, x.shape[1], *size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(x, x.new_ones(1), cond, bricks=bricks)
    return int(counter.get_total_flops())

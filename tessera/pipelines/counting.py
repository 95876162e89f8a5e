"""What a model costs, counted by running it on tensors without data: nothing is allocated.

No formula has to keep up with the code: FLOPs and evaluations are those of the real sampler and of
the real training step, in which every distinct call of a network is made once and then remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from tessera import distributed
from tessera.conditioning import Conditioning
from tessera.data.loader import StepPlan
from tessera.diffusion.objectives import Objective
from tessera.errors import TesseraError
from tessera.model import Model
from tessera.precision import autocast, resolve
from tessera.randomness import AddressedDraws
from tessera.recipes.build import build_view, recipe_objective
from tessera.recipes.parts import NO_PARTS, Parts, described, external
from tessera.recipes.schema import Recipe


@dataclass(frozen=True)
class Calls:
    """What a run of a sampler computes for one image.

    Attributes:
        evaluations: images that pass through networks; guidance counts its two.
        flops: all of it.
        largest: FLOPs of the largest call of a network, for one image.
    """

    evaluations: int
    flops: int
    largest: int


@dataclass(frozen=True)
class Training:
    """What training costs; see `Cost`."""

    parameters: int
    images: int
    train_flops: int
    run_flops: int
    micro_batch: int
    activation_bytes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    ema_bytes: int


@dataclass(frozen=True)
class Cost(Training):
    """What a recipe costs; FLOPs count a multiply-add as two, memory is in bytes on one device.

    Attributes:
        parameters: trained numbers.
        images: of the whole training run.
        forward_flops: one evaluation of the network for one image.
        train_flops: one training image, forward and backward; the mean over the sizes of patches.
        run_flops: the whole training run.
        evaluations: evaluations of the network for one sampled image; guidance counts twice.
        sample_flops: one sampled image.
        micro_batch: images of one forward pass in training, if one device does all.
        activation_bytes: what is kept of one micro-batch for its backward pass; an estimate,
            because devices and compilers keep different intermediate results.
        weight_bytes, gradient_bytes, optimizer_bytes, ema_bytes: the other memory of training.
    """

    forward_flops: int
    evaluations: int
    sample_flops: int

    @property
    def train_bytes(self) -> int:
        """Memory of training on one device, without what the allocator wastes."""
        states = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.ema_bytes
        return states + self.activation_bytes


def total_cost(training: Training, calls: Calls) -> Cost:
    """Training and sampling together."""
    own = {f.name: getattr(training, f.name) for f in fields(Training)}
    return Cost(
        **own,
        forward_flops=calls.largest,
        evaluations=calls.evaluations,
        sample_flops=calls.flops,
    )


def sampling(
    networks: Iterable[nn.Module],
    sample: Callable[[], object],
    helpers: Iterable[nn.Module] = (),
) -> Calls:
    """Count what `sample` computes, which makes one image with `networks` of meta tensors.

    The networks are of no other use afterwards.

    Args:
        helpers: other modules of which calls alike need to be made once only; no evaluations.
    """
    evaluations = repeated = largest = 0

    def watch(network: nn.Module, helps: bool) -> None:
        forward, known = network.forward, dict[Any, tuple[Any, int]]()

        def once(*inputs: Any, **options: Any) -> Any:
            nonlocal evaluations, repeated, largest
            images = len(inputs[0])
            evaluations += 0 if helps else images
            key = _signature((inputs, options))
            if key in known:
                output, flops = known[key]
                repeated += flops
                return output
            before = counter.get_total_flops()
            output = forward(*inputs, **options)
            flops = int(counter.get_total_flops() - before)
            largest = largest if helps else max(largest, round(flops / images))
            known[key] = output, flops
            return output

        network.forward = once

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for network in networks:
            watch(network, False)
        for helper in helpers:
            watch(helper, True)
        sample()
    return Calls(evaluations, int(counter.get_total_flops()) + repeated, largest)


def _signature(arguments: Any) -> Any:
    """What distinguishes two calls: the shapes of tensors, all other values as they are."""
    leaves, structure = tree_flatten(
        arguments, is_leaf=lambda value: isinstance(value, Conditioning)
    )
    parts = []
    for leaf in leaves:
        if isinstance(leaf, Conditioning):
            leaf = tuple(getattr(leaf, f.name) for f in fields(leaf))
        items = leaf if isinstance(leaf, tuple) else (leaf,)
        parts.append(tuple(tuple(i.shape) if isinstance(i, Tensor) else i for i in items))
    return str(structure), tuple(parts)


def training(recipe: Recipe, model: Model, parts: Parts = NO_PARTS) -> Training:
    """What training `model` costs, whose tensors have no data; it is of no use afterwards.

    Models alike, as the stages of a pipeline and the experts often are, are counted once.
    """
    if parts is not NO_PARTS:  # code of the user's, which may do something else each time
        return _training(recipe, model, parts)
    weights = ((n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters())
    precision = resolve(recipe.training.precision, distributed.device())
    key = (recipe.model_dump_json(), precision, tuple(weights))
    if key not in _counted:
        if len(_counted) >= 64:
            _counted.clear()
        _counted[key] = _training(recipe, model, parts)
    return _counted[key]


_counted: dict[Any, Training] = {}


def _training(recipe: Recipe, model: Model, parts: Parts) -> Training:
    model = model.train()
    train = _train_flops(recipe, model, parts)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.nbytes for p in parameters)
    micro_batch = recipe.training.micro_batch or recipe.training.batch
    return Training(
        parameters=sum(p.numel() for p in parameters),
        images=recipe.training.images,
        train_flops=train,
        run_flops=train * recipe.training.images,
        micro_batch=micro_batch,
        activation_bytes=_activations(recipe, model, micro_batch, parts),
        weight_bytes=weights,
        gradient_bytes=weights,
        optimizer_bytes=2 * weights,
        ema_bytes=len(recipe.ema) * weights,
    )


def together(trainings: Sequence[Training]) -> Training:
    """Models that are trained one after the other: sums, but the largest memory of one."""
    largest = max(trainings, key=lambda t: t.activation_bytes + t.weight_bytes)
    images = sum(t.images for t in trainings)
    run_flops = sum(t.run_flops for t in trainings)
    return Training(
        parameters=sum(t.parameters for t in trainings),
        images=images,
        train_flops=round(run_flops / images),
        run_flops=run_flops,
        micro_batch=largest.micro_batch,
        activation_bytes=largest.activation_bytes,
        weight_bytes=largest.weight_bytes,
        gradient_bytes=largest.gradient_bytes,
        optimizer_bytes=largest.optimizer_bytes,
        ema_bytes=largest.ema_bytes,
    )


def _train_flops(recipe: Recipe, model: Model, parts: Parts) -> int:
    """FLOPs of one training image, forward and backward, on meta tensors."""
    x, cond, draws = _inputs(recipe, 1, torch.device("meta"))
    objective = _objective(recipe, parts)
    if isinstance(objective, nn.Module):
        objective.to("meta")
    flops = images = 0.0
    for plan, share in build_view(recipe, parts).shares():
        crop, draws.band = x[:, :, : plan.patch, : plan.patch], plan.band
        with FlopCounterMode(display=False) as counter:
            terms = objective(model, crop, cond, draws)
            torch.autograd.backward(terms["loss"].sum())
        flops += share * plan.images * counter.get_total_flops()
        images += share * plan.images
    return round(flops / images)


def _objective(recipe: Recipe, parts: Parts) -> Objective:
    """What is minimised, at noise levels drawn in the simplest way: their choice costs nothing, but
    looks at the values of tensors, which have none here."""
    plain = {"expert": None, "objective": recipe.objective.simplest()}
    return recipe_objective(recipe.model_copy(update=plain), parts)


def _activations(recipe: Recipe, model: Model, batch: int, parts: Parts) -> int:
    """Bytes kept for the backward pass of `batch` images, at most; leaves `model` without weights.

    Of patches no more is kept than of whole images, but each band may see something else.
    """
    view = build_view(recipe, parts)
    bands = [plan for plan, _ in view.shares() if plan.band is not None]
    # Fake CPU tensors, not meta ones: these know autocast and fused attention.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        return max(
            _kept(recipe, model, batch * plan.images // view.batch, plan, parts)
            for plan in bands or [StepPlan(0, view.batch)]
        )


def _kept(recipe: Recipe, model: Model, batch: int, plan: StepPlan, parts: Parts) -> int:
    """Bytes kept for the backward pass of `batch` images, each storage counted once."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    x, cond, draws = _inputs(recipe, batch, torch.device("cpu"))
    crop, draws.band = x[:, :, : plan.patch, : plan.patch], plan.band
    chosen = autocast(torch.device("cpu"), resolve(recipe.training.precision, distributed.device()))
    with saved_tensors_hooks(keep, lambda tensor: tensor), chosen:
        loss = _objective(recipe, parts)(model, crop, cond, draws)["loss"]
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage()._cdata, None)
    del loss
    return sum(storage.nbytes() for storage in storages.values())


def _inputs(
    recipe: Recipe, batch: int, device: torch.device
) -> tuple[Tensor, Conditioning, AddressedDraws]:
    """Images, conditioning and draws of a training step."""
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    start = recipe.start_shape if recipe.low_resolution else None
    cond = Conditioning(
        image=torch.zeros(batch, *start, device=device) if start else None,
        labels=labels if recipe.data.num_classes else None,
        augment=torch.zeros(batch, recipe.augment_dim, device=device)
        if recipe.augment_dim
        else None,
    )
    x = torch.zeros(batch, *recipe.shape, device=device)
    return x, cond, _MedianSteps(0, torch.arange(batch, device=device))


class _MedianSteps(AddressedDraws):
    """Draws, but those of a whole step in the middle of their range: what an average step costs."""

    def step(self, purpose: str) -> float:
        return 0.5


@contextmanager
def explained(recipe: Recipe) -> Iterator[None]:
    """Errors of counting what a recipe computes, as the user can put them right.

    Raises:
        TesseraError: it cannot be counted.
    """
    try:
        yield
    except RuntimeError as error:  # of tensors with more numbers than can be counted
        if external(recipe):
            raise TesseraError(
                f"{recipe.name}: what its own parts compute cannot be counted on tensors without "
                f"data, for they look at values, or hold tensors that are no buffers: "
                f"{described(error)}"
            ) from error
        raise TesseraError(
            f"{recipe.name}: what it computes is too large to be counted. Make the network, the "
            "images or training.micro_batch smaller"
        ) from error

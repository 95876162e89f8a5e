"""What is trained and how one step of it is made; knows no data set, file or schedule of events."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from tessera import distributed
from tessera.conditioning import Conditioning
from tessera.diffusion.objectives import Objective
from tessera.errors import CheckpointError
from tessera.model import Model, reported
from tessera.precision import autocast, resolve
from tessera.randomness import Draws, derive_seed
from tessera.recipes.build import build_model, recipe_objective
from tessera.recipes.external import check_trained
from tessera.recipes.parts import NO_PARTS, Parts
from tessera.recipes.schema import EmaConfig, OptimizerConfig, Recipe, TrainingConfig
from tessera.training import guard, optimizers, parallel
from tessera.training.ema import Ema, local

T = TypeVar("T")

# The trained model in the name of a tensor, behind its group and, of the optimiser, the moment.
_MODEL = re.compile(r"^((?:model|ema-\d+|optimizer/\w+)/)model\.")


@dataclass(frozen=True)
class MicroBatch:
    """Images of one forward pass on one device.

    Attributes:
        x: clean images in model space, [B, C, H, W].
        cond: what the network is told about them.
        draws: their random numbers.
        network_seed: seed of PyTorch's own generator during the pass, for dropout.
        weight: factor of the loss that is minimised; the terms reported are without it.
    """

    x: Tensor
    cond: Conditioning
    draws: Draws
    network_seed: int
    weight: float = 1.0


@dataclass(frozen=True)
class Update:
    """What a step did; tensors are 0-dim and on the device, so reading one waits for it.

    Attributes:
        lr: learning rate of the step.
        terms: mean over the global batch of each term of the objective.
        quartiles: sums [4] of each term over the images of each quarter of the noise levels, and
            "images", their numbers; empty where the objective does not tell.
        grad_norm: norm of the whole gradient, before clipping.
        bad: 1 if the gradient or the loss was not finite, else 0.
    """

    lr: float
    terms: dict[str, Tensor]
    quartiles: dict[str, Tensor]
    grad_norm: Tensor
    bad: Tensor


class TrainStep(nn.Module):
    """Model and objective as one module, so that DDP and FSDP see one forward pass."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, x: Tensor, cond: Conditioning, draws: Draws) -> dict[str, Tensor]:
        """Terms of the objective for each image, [B]."""
        return self.objective(self.model, x, cond, draws)


class Learner:
    """Weights, optimiser, averages and counters of a run.

    Args:
        step: the module to train; moved to `device`.
        optimizer, emas, training: sections of the recipe.
        device: where to train.
    """

    def __init__(
        self,
        step: TrainStep,
        optimizer: OptimizerConfig,
        emas: Iterable[EmaConfig],
        training: TrainingConfig,
        device: torch.device,
    ) -> None:
        precision = resolve(training.precision, device)
        training = training.model_copy(update={"precision": precision})
        self._precision = precision
        self._config = optimizer = optimizer.for_batch(training.batch)
        self.training, self.device = training, device
        set_precision(training)
        self.step = step.to(device).train()
        # FSDP shards contiguous weights only; the images are channels-last all the same.
        sharded = distributed.active() and training.parallel == "fsdp"
        if training.channels_last and not sharded:
            self.step.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if training.compile:
            parallel.compile_blocks(self.step, device)
        self._module = parallel.wrap(self.step, training.parallel, device)
        self.sharded = sharded
        self.parameters = [p for p in self.step.parameters() if p.requires_grad]
        self.optimizer = optimizers.build_optimizer(self.step, optimizer)
        self.emas = [Ema(self.step, config) for config in emas]
        self.loss_scale = guard.LossScale(training, device)
        self.skips = guard.SkipCounter(device)

    def update(self, rounds: Iterable[MicroBatch], images: int, images_seen: int) -> Update:
        """One optimiser step: minimise the mean of "loss" over the global batch.

        Args:
            rounds: this process's micro-batches, of `images` / processes images in all.
            images: images of the global batch.
            images_seen: images before the step.
        """
        self.optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        quartiles: dict[str, Tensor] = {}
        for micro, final in _mark_final(rounds):
            torch.manual_seed(micro.network_seed)
            with parallel.round_of(self._module, final=final):
                sums, quarters = self._backward(micro, images)
            terms, quartiles = _added(terms, sums), _added(quartiles, quarters)
        gradients = local(p.grad for p in self.parameters if p.grad is not None)
        norm = guard.gradient_norm(gradients, self.sharded) / self.loss_scale.scale
        bad = (~(norm.isfinite() & terms["loss"].isfinite())).to(torch.float32)
        totals, bad = guard.agree([*terms.values(), *quartiles.values()], bad)

        lr = optimizers.learning_rate(self._config, images_seen, self.training.images)
        optimizers.set_learning_rate(self.optimizer, lr)
        skip = self._apply(gradients, norm, bad)
        for ema in self.emas:
            ema.update(images_seen, images, skip)
        self.skips.update(bad)
        means = {name: total / images for name, total in zip(terms, totals, strict=False)}
        quartiles = dict(zip(quartiles, totals[len(terms) :], strict=True))
        return Update(lr, means, quartiles, norm, bad)

    def _backward(
        self, micro: MicroBatch, images: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add to the gradients; the sum of each term over the micro-batch, and by quartile."""
        terms = self._terms(self._module, micro)
        # DDP and FSDP average over processes; the objective is a mean over the global batch.
        weight = micro.weight * distributed.world() / images
        loss = terms["loss"].float().sum() * weight
        torch.autograd.backward(loss * self.loss_scale.scale if self.loss_scale.active else loss)
        return _sums(terms, micro.x[0].numel())

    def _terms(
        self, step: Callable[..., dict[str, Tensor]], micro: MicroBatch
    ) -> dict[str, Tensor]:
        """What `step`, model and objective, makes of a micro-batch."""
        x = micro.x
        if self.training.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with self._autocast():
            return step(x, micro.cond, micro.draws)

    def evaluate(
        self, model: nn.Module, micro: MicroBatch, counted: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Sums of the terms of another model, and by quartile, as of `Update`; nothing is learned.

        Args:
            model: in the place of the trained one.
            counted: which images of `micro` count, bool [B].
        """
        step, objective = TrainStep(model, self.step.objective), self.step.objective
        state = objective.training if isinstance(objective, nn.Module) else False
        try:
            with torch.no_grad():
                terms = self._terms(step.eval(), micro)
        finally:
            if isinstance(objective, nn.Module):
                objective.train(state)
        return _sums({name: term[counted] for name, term in terms.items()}, micro.x[0].numel())

    def _apply(self, gradients: list[Tensor], norm: Tensor, bad: Tensor) -> Tensor:
        """Unscale, clip, and step unless `bad`; 1 if the step was skipped, else 0."""
        # The fused kernel divides gradients by `grad_scale` on the way, at no cost.
        divisor: Tensor | None = self.loss_scale.scale if self.loss_scale.active else None
        replace = self.training.nonfinite == "replace"
        skip = torch.zeros_like(bad) if replace else bad
        if replace:
            if divisor is not None:
                torch._foreach_div_(gradients, divisor)
                divisor = None
            guard.replace_nonfinite(gradients)
            if self._config.clip_norm is not None:
                norm = guard.gradient_norm(gradients, self.sharded)
        if self._config.clip_norm is not None:
            excess = (norm / self._config.clip_norm).clamp(min=1)
            divisor = excess if divisor is None else divisor * excess
        self._optimizer_step(divisor, skip)
        self.loss_scale.update(bad)
        return skip

    def _optimizer_step(self, divisor: Tensor | None, skip: Tensor) -> None:
        self.optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.grad_scale = self.optimizer.found_inf = None  # type: ignore[attr-defined]

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        return autocast(self.device, self._precision)

    def tensors(self) -> dict[str, Tensor]:
        """Every live tensor that a checkpoint holds, by `<group>/<name>`.

        Groups: model (parameters and buffers), ema-0, ema-1, ..., optimizer.
        """
        found = {f"model/{n}": t.detach() for n, t in self.step.state_dict(keep_vars=True).items()}
        for index, ema in enumerate(self.emas):
            found |= {f"ema-{index}/{name}": t for name, t in ema.weights.items()}
        for name, tensor in optimizers.named_state(self.optimizer, self.step).items():
            found[f"optimizer/{name}"] = tensor
        # The first checkpoints called every model a denoiser; their names stay readable.
        return {_MODEL.sub(r"\1denoiser.", name, count=1): t for name, t in found.items()}

    def reports(self) -> dict[str, float]:
        """Numbers that model and objective want logged; waits for the device.

        All processes must ask, because they may hold parts of them.
        """
        found = {name: parallel.whole(number) for name, number in reported(self.step).items()}
        return {name: float(number) for name, number in found.items()}

    def counters(self) -> dict[str, float]:
        """Loss scale and skipped steps; waits for the device."""
        live = self._live_counters()
        values = torch.stack([t.to(torch.float32) for t in live.values()]).tolist()
        return dict(zip(live, values, strict=True))

    def load_counters(self, counters: dict[str, float]) -> None:
        """Put back what `counters` gave.

        Raises:
            CheckpointError: some are missing, or beyond their range.
        """
        for name, tensor in self._live_counters().items():
            try:
                tensor.fill_(counters[name])
            except (KeyError, RuntimeError, OverflowError) as error:
                raise CheckpointError(
                    f"the checkpoint's state.json has no fitting value of the counter {name!r}"
                ) from error

    def _live_counters(self) -> dict[str, Tensor]:
        return {**self.loss_scale.state(), **self.skips.state()}

    def average(self, index: int) -> dict[str, Tensor]:
        """State of the model with the weights of an average, whole, for sampling and sharing.

        All processes must ask, because they hold its shards.
        """
        state = {n: parallel.whole(t) for n, t in self.step.state_dict(keep_vars=True).items()}
        state |= {n: parallel.whole(t) for n, t in self.emas[index].weights.items()}
        prefix = "model."
        return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}

    def weights_finite(self) -> bool:
        """Whether weights and averages of all processes are finite; waits for the device."""
        tensors = [*local(self.parameters), *(a for ema in self.emas for a in ema.local_weights)]
        finite = all(torch.stack([t.isfinite().all() for t in tensors]).tolist())
        return all(distributed.gather(finite))


def fresh_model(recipe: Recipe, device: torch.device, parts: Parts = NO_PARTS) -> Model:
    """The model with the weights that the recipe's run begins with.

    Raises:
        RecipeError: training it does not fit into memory.
    """
    torch.manual_seed(derive_seed(recipe.training.seed, "weights"))
    # Weights, gradients, two moments of the optimiser, and averages; on a GPU in its memory.
    copies = 4 + len(recipe.ema) if device.type == "cpu" else 1
    return build_model(recipe, parts, copies)


def learner_of(
    recipe: Recipe, model: Model, device: torch.device, parts: Parts = NO_PARTS
) -> Learner:
    """What trains `model` as the recipe says.

    Raises:
        RecipeError: an external part is missing, or does not fit the recipe.
    """
    objective = recipe_objective(recipe, parts)
    check_trained(recipe, model, objective)
    step = TrainStep(model, objective)
    return Learner(step, recipe.optimizer, recipe.ema, recipe.training, device)


def _sums(terms: dict[str, Tensor], pixels: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The sum of each term [B] over the images, and by quartile."""
    quartile = terms.pop("quartile", None)
    values = {name: value.detach().float() for name, value in terms.items()}
    sums = {name: value.sum() for name, value in values.items()}
    sums = {"loss_per_pixel": sums["loss"] / pixels, **sums}
    return sums, {} if quartile is None else _by_quartile(values, quartile)


def _by_quartile(values: dict[str, Tensor], quartile: Tensor) -> dict[str, Tensor]:
    """The sum [4] of each term [B] over the images of each quartile, and their numbers."""
    # The log shows one loss in quartiles; a second one in other units would only crowd it.
    names = [name for name in values if name != "loss_per_pixel"]
    member = (quartile[:, None] == torch.arange(4, device=quartile.device)).to(torch.float32)
    stacked = torch.stack([values[name] for name in names])
    sums = (stacked[:, :, None] * member).sum(dim=1)
    return {**dict(zip(names, sums, strict=True)), "images": member.sum(dim=0)}


def _added(totals: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: totals[n] + value if n in totals else value for n, value in values.items()}


def set_precision(training: TrainingConfig) -> None:
    """Full float32 products for fp32; TensorFloat32 for what autocast leaves in float32."""
    allow = training.precision != "fp32"
    torch.set_float32_matmul_precision("high" if allow else "highest")
    torch.backends.cudnn.allow_tf32 = allow


def _mark_final(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each item with whether it is the last."""
    iterator = iter(items)
    held = next(iterator)
    for item in iterator:
        yield held, False
        held = item
    yield held, True

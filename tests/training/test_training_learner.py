"""One step: the objective's scale, accumulation, the guard, averages, precision, schedules."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.errors import TrainingError
from tessera.randomness import AddressedDraws
from tessera.recipes.schema import EmaConfig, OptimizerConfig, TrainingConfig
from tessera.training import optimizers, parallel
from tessera.training.ema import decay
from tessera.training.learner import Learner, MicroBatch, TrainStep, Update
from tessera.training.tracking import Meter

CPU = torch.device("cpu")


class Scale(nn.Module):
    """x times a learned colour gain, plus a bias: simple enough to work its gradient out."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3, 1))
        self.bias = nn.Parameter(torch.zeros(3))
        self.register_buffer("constant", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain[:, :, None] + self.bias[:, None, None]


def squared(denoiser: nn.Module, x: Tensor, cond: Conditioning, draws: Any) -> dict[str, Tensor]:
    return {"loss": (denoiser(x) - draws.normal("noise", *x.shape[1:])).square().sum((1, 2, 3))}


def learner(
    objective: Any = squared,
    emas: tuple[EmaConfig, ...] = (EmaConfig(),),
    optimizer: dict[str, Any] | None = None,
    **training: Any,
) -> Learner:
    options = OptimizerConfig(**{"lr": 0.1, "rampup_images": 0, **(optimizer or {})})
    config = TrainingConfig(**{"images": 1000, "batch": 8, **training})
    return Learner(TrainStep(Scale(), objective), options, emas, config, CPU)


def micro_batches(first: int = 0, count: int = 8, size: int = 8) -> list[MicroBatch]:
    """Images first ... first + count - 1 of a fixed stream."""
    rounds = []
    for start in range(first, first + count, size):
        draws = AddressedDraws(0, torch.arange(start, start + size))
        x = draws.uniform("image", 3, 4, 4) * 2 - 1
        rounds.append(MicroBatch(x, Conditioning(), draws, start))
    return rounds


def steps(target: Learner, count: int, size: int = 8) -> list[Update]:
    return [target.update(micro_batches(8 * k, 8, size), 8, 8 * k) for k in range(count)]


def weights(target: Learner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in target.parameters])


def test_minimises_the_sum_over_pixels_and_mean_over_images() -> None:
    target = learner()
    (micro,) = micro_batches()
    error = micro.x - micro.draws.normal("noise", 3, 4, 4)
    update = target.update([micro], 8, 0)
    gradient = torch.cat([(2 * error * micro.x).sum((0, 2, 3)) / 8, (2 * error).sum((0, 2, 3)) / 8])
    torch.testing.assert_close(update.grad_norm, gradient.norm())
    torch.testing.assert_close(update.terms["loss"], error.square().sum() / 8)
    torch.testing.assert_close(update.terms["loss_per_pixel"], error.square().mean())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_accumulation_changes_nothing(size: int) -> None:
    whole, parts = learner(), learner()
    for one, other in zip(steps(whole, 4), steps(parts, 4, size), strict=True):
        torch.testing.assert_close(one.terms, other.terms)
        torch.testing.assert_close(one.grad_norm, other.grad_norm)
    torch.testing.assert_close(weights(whole), weights(parts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [2, 8])
def test_terms_by_quartile_of_the_noise_levels(size: int) -> None:
    def objective(denoiser, x, cond, draws):
        loss = denoiser(x).square().sum((1, 2, 3))
        return {"loss": loss, "mse": 2 * loss, "quartile": draws.images % 3}

    update = learner(objective).update(micro_batches(size=size), 8, 0)
    losses = torch.cat([m.x.square().sum((1, 2, 3)) for m in micro_batches()])
    expected = torch.stack([losses[q::3].sum() for q in range(4)])
    expected[3] = 0  # no image of number 3 modulo 3
    torch.testing.assert_close(update.quartiles["loss"], expected)
    torch.testing.assert_close(update.quartiles["mse"], 2 * expected)
    assert update.quartiles["images"].tolist() == [3, 3, 2, 0]
    assert set(update.terms) == {"loss", "mse", "loss_per_pixel"}
    meter = Meter(CPU)
    meter.add(update, 8)
    half = Meter(CPU)
    half.load(meter.state())
    for target in (meter, half):
        target.add(update, 8)
        means = target.means()
        assert means["loss_q1"] == pytest.approx(float(losses[1::3].mean()))
        assert means["loss"] == pytest.approx(float(losses.mean()))
        assert means["loss_q3"] is None
        assert target.means() == {}


def test_dropout_draws_depend_on_the_images_alone() -> None:
    def noisy(denoiser, x, cond, draws):
        return {"loss": nn.functional.dropout(denoiser(x), 0.5).sum((1, 2, 3))}

    one, other = learner(noisy), learner(noisy)
    first = steps(one, 2)
    torch.rand(7)  # whatever happens between steps
    second = steps(other, 2)
    assert all(
        torch.equal(a.terms["loss"], b.terms["loss"]) for a, b in zip(first, second, strict=True)
    )
    assert first[0].terms["loss"] != first[1].terms["loss"]


# --------------------------------------------------------------------------------------- guard


def failing(steps_to_fail: set[int], value: float = math.nan) -> Any:
    """`squared`, but the gradients of the given steps (of one round each) are not finite."""
    calls = iter(range(10**6))

    def objective(denoiser, x, cond, draws):
        loss = squared(denoiser, x, cond, draws)["loss"]
        return {"loss": loss * value if next(calls) in steps_to_fail else loss}

    return objective


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_step_is_skipped_and_counted(value: float) -> None:
    target, twin = learner(failing({1}, value)), learner()
    steps(target, 1)
    steps(twin, 1)
    before = {name: tensor.clone() for name, tensor in target.tensors().items()}
    update = target.update(micro_batches(8), 8, 8)
    assert update.bad == 1
    assert target.counters() == {
        "loss_scale": 1, "loss_scale_growth": 0, "skipped": 1, "skipped_in_a_row": 1,
    }  # fmt: skip
    for name, tensor in target.tensors().items():
        assert torch.equal(tensor, before[name]), name
    # It goes on as if the bad step had not been made.
    target.update(micro_batches(16), 8, 16)
    twin.update(micro_batches(16), 8, 16)
    assert torch.equal(weights(target), weights(twin))
    assert target.counters()["skipped_in_a_row"] == 0


def test_bad_steps_in_a_row_are_counted() -> None:
    target = learner(failing({1, 2, 3, 5}))
    steps(target, 6)
    counters = target.counters()
    assert (counters["skipped"], counters["skipped_in_a_row"]) == (4, 1)


def test_replacing_as_the_released_code_does() -> None:
    target = learner(failing({0}), nonfinite="replace")
    before = weights(target)
    (update,) = steps(target, 1)
    assert update.bad == 1
    assert target.counters()["skipped"] == 1
    # NaN becomes 0, with which Adam does not move.
    assert torch.equal(weights(target), before)
    assert target.optimizer.state[target.parameters[0]]["step"] == 1


def test_replaced_infinities_have_the_released_size() -> None:
    def infinite(denoiser, x, cond, draws):
        return {"loss": denoiser(x).sum((1, 2, 3)) * 1e38 * 1e38}

    target = learner(infinite, nonfinite="replace", optimizer={"betas": (0.0, 0.0)})
    steps(target, 1)
    assert target.optimizer.state[target.parameters[1]]["exp_avg"].tolist() == [1e5] * 3


# ----------------------------------------------------------------------------- scale, clipping


def test_clipping_limits_the_norm_of_the_whole_gradient() -> None:
    target = learner(optimizer={"clip_norm": 0.5, "betas": (0.0, 0.999)})
    (update,) = steps(target, 1)
    used = torch.cat([target.optimizer.state[p]["exp_avg"].flatten() for p in target.parameters])
    assert update.grad_norm > 0.5
    torch.testing.assert_close(used.norm(), torch.tensor(0.5))


@pytest.mark.parametrize("nonfinite", ["skip", "replace"])
def test_loss_scale_is_taken_out_before_the_optimizer(nonfinite: str) -> None:
    plain = learner(optimizer={"clip_norm": 3.0})
    scaled = learner(optimizer={"clip_norm": 3.0}, loss_scale=1024.0, nonfinite=nonfinite)
    for one, other in zip(steps(plain, 3), steps(scaled, 3), strict=True):
        torch.testing.assert_close(one.grad_norm, other.grad_norm)
        torch.testing.assert_close(one.terms, other.terms)
    torch.testing.assert_close(weights(plain), weights(scaled))


def test_dynamic_loss_scale_backs_off_and_returns() -> None:
    target = learner(failing({0, 1}), precision="fp16")
    assert target.counters()["loss_scale"] == 2.0**16
    steps(target, 3)
    assert target.counters()["loss_scale"] == 2.0**14
    assert target.counters()["loss_scale_growth"] == 1
    other = learner(precision="fp16")
    other.load_counters(target.counters())
    assert other.counters() == target.counters()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(precision: str) -> None:
    def matmul(denoiser, x, cond, draws):
        hidden = x.flatten(1) @ torch.ones(48, 2)
        assert hidden.dtype == (torch.bfloat16 if precision == "bf16" else torch.float16)
        return {"loss": (denoiser(x) - 1).square().sum((1, 2, 3)) + 0 * hidden.float().sum(1)}

    target = learner(matmul, precision=precision)
    updates = steps(target, 5)
    assert updates[-1].terms["loss"] < updates[0].terms["loss"]
    assert weights(target).dtype == torch.float32


# ------------------------------------------------------------------------------------ averages


def test_averages_follow_their_half_lives() -> None:
    configs = (
        EmaConfig(halflife_images=20, rampup_ratio=None),
        EmaConfig(halflife_images=1000, rampup_ratio=0.5),
    )
    target = learner(emas=configs)
    expected = [weights(target).double() for _ in configs]
    for step in range(6):
        target.update(micro_batches(8 * step), 8, 8 * step)
        halflives = (20, min(1000, 0.5 * 8 * step))
        for index, halflife in enumerate(halflives):
            beta = 0.5 ** (8 / halflife) if halflife else 0.0
            expected[index] = beta * expected[index] + (1 - beta) * weights(target).double()
    for index, average in enumerate(expected):
        actual = torch.cat([t.flatten() for t in target.emas[index].weights.values()])
        torch.testing.assert_close(actual.double(), average, rtol=1e-5, atol=1e-6)
    assert target.average(0)["constant"] == 1
    assert set(target.average(0)) == {"gain", "bias", "constant"}


def test_first_decay_is_zero() -> None:
    assert decay(EmaConfig(halflife_images=500, rampup_ratio=0.05), 0, 8) == 0
    assert decay(EmaConfig(halflife_images=500, rampup_ratio=0.05), 1000, 8) == 0.5 ** (8 / 50)
    assert decay(EmaConfig(halflife_images=500, rampup_ratio=None), 0, 500) == 0.5


# ----------------------------------------------------------------------- optimiser, its schedule


def rate(images_seen: int, **options: Any) -> float:
    config = OptimizerConfig(**{"lr": 2.0, "rampup_images": 100, **options})
    return optimizers.learning_rate(config, images_seen, 1100)


def test_learning_rate() -> None:
    assert [rate(n) for n in (0, 50, 100, 1000)] == [0, 1, 2, 2]
    assert rate(0, rampup_images=0) == 2
    start = {"decay_start_images": 100, "final_lr": 1.0}
    assert [rate(n, decay="linear", **start) for n in (50, 100, 600, 1100, 2000)] == [
        1, 2, 1.5, 1, 1,
    ]  # fmt: skip
    assert rate(600, decay="cosine", **start) == pytest.approx(1.5)
    assert rate(350, decay="cosine", **start) == pytest.approx(1 + (1 + math.sqrt(0.5)) / 2)
    assert rate(1100, decay="cosine", **start) == pytest.approx(1)
    roots = [rate(n, decay="inverse_sqrt", decay_start_images=200) for n in (50, 200, 800)]
    assert roots == [1, 2, 1]


def test_weight_decay_spares_vectors() -> None:
    target = learner(
        lambda denoiser, x, cond, draws: {"loss": denoiser(x).sum((1, 2, 3)) * 0.0},
        optimizer={"kind": "adamw", "weight_decay": 0.5},
    )
    with torch.no_grad():
        target.parameters[1].fill_(1.0)
    steps(target, 1)
    assert target.parameters[0].flatten().tolist() == pytest.approx([0.95] * 3)
    assert target.parameters[1].tolist() == [1.0] * 3


# -------------------------------------------------------------------------------- waiting, GPU


def test_a_step_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    target = learner(optimizer={"clip_norm": 1.0}, precision="fp16")
    steps(target, 1)

    def forbidden(self: Tensor, *_: Any) -> Any:
        raise AssertionError("the host waited for the device")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, forbidden)
    rounds = micro_batches(8)
    target.update(rounds, 8, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_never_synchronises_cuda() -> None:
    config = TrainingConfig(images=1000, batch=8, precision="fp16")
    device = torch.device("cuda")
    options = OptimizerConfig(clip_norm=1.0)
    target = Learner(TrainStep(Scale(), squared), options, (EmaConfig(),), config, device)
    draws = AddressedDraws(0, torch.arange(8, device=device))
    micro = MicroBatch(draws.uniform("image", 3, 4, 4), Conditioning(), draws, 0)
    target.update([micro], 8, 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            target.update([micro], 8, 8 * step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------- compiling


class Stack(Scale):
    """`Scale` with a block that repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return super().forward(x)


def test_repeated_blocks_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(self))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    step = TrainStep(Stack(), squared)
    names = [name for name, _ in step.named_parameters()]
    parallel.compile_blocks(step, CPU)
    assert compiled == list(step.model.layers)
    assert names == [name for name, _ in step.named_parameters()]
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(TrainingError, match=r"training\.compile=false"):
        parallel.compile_blocks(step, CPU)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_compiled_training_equals_eager() -> None:
    def stack(compiled: bool) -> Learner:
        torch.manual_seed(0)
        training = TrainingConfig(images=1000, batch=8, compile=compiled)
        step = TrainStep(Stack(), squared)
        return Learner(step, OptimizerConfig(rampup_images=0), (EmaConfig(),), training, CPU)

    eager, compiled = stack(False), stack(True)
    for one, other in zip(steps(eager, 2), steps(compiled, 2), strict=True):
        torch.testing.assert_close(one.terms, other.terms)
    torch.testing.assert_close(weights(eager), weights(compiled))

"""Blurring corruption and its objective: recorded numbers, and what must hold for all blocks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden_cases import RecordedDraws, load
from hypothesis import given
from hypothesis import strategies as st
from relay_case import recorded_denoiser, relay_case
from scipy.fft import dctn
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.blur import (
    Blur,
    BlurCorruption,
    BlurObjective,
    block_dct,
    block_idct,
    block_noise,
    dct_matrix,
    scale_frequencies,
    with_block_noise,
)
from tessera.diffusion.denoiser import Denoiser, Posterior
from tessera.errors import TesseraError
from tessera.randomness import AddressedDraws
from tessera.sampling.core import enlarged

BLOCKS = st.sampled_from([1, 2, 3, 4, 5, 8, 16])
SIDES = st.integers(1, 4)


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float((found - expected).abs().max())


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("entry", relay_case("dct")["config"], ids=lambda e: str(e["index"]))
def test_recorded_dct(entry: dict[str, Any]) -> None:
    golden, index, block = load("relay", "dct"), entry["index"], entry["block"]
    x = golden[f"x{index}"]
    assert difference(block_dct(x, block), golden[f"dct{index}"]) <= 1e-13
    assert difference(block_idct(x, block), golden[f"idct{index}"]) <= 1e-13
    assert difference(block_dct(x.float(), block), golden[f"dct32_{index}"]) <= 2e-6
    assert difference(block_idct(x.float(), block), golden[f"idct32_{index}"]) <= 2e-6


@pytest.mark.parametrize("entry", relay_case("blur")["config"], ids=lambda e: str(e["index"]))
def test_recorded_blur(entry: dict[str, Any]) -> None:
    golden, index = load("relay", "blur"), entry["index"]
    blur = Blur(block=entry["block"], blur_sigma_max=entry["blur_sigma_max"])
    x, time = golden[f"x{index}"], golden[f"u{index}"]
    torch.testing.assert_close(blur.blur_sigma(time), golden[f"blur_sigma{index}"])
    sigma = blur.noise_level(time.double())
    torch.testing.assert_close(blur.time(sigma), time.double(), rtol=1e-12, atol=1e-15)
    assert difference(blur(x, sigma), golden[f"y{index}"]) <= 2e-6
    assert difference(blur(x, sigma.float()), golden[f"y{index}"]) <= 2e-6


@pytest.mark.parametrize("entry", relay_case("alpha")["config"], ids=lambda e: str(e["index"]))
def test_recorded_factors(entry: dict[str, Any]) -> None:
    golden = load("relay", "alpha")
    names = ("block", "prob_length", "blur_sigma_max", "min_scale")
    table = Blur(**{name: entry[name] for name in names}).factors(golden["sigma"])
    expected = golden[f"alpha{entry['index']}"].double()
    torch.testing.assert_close(table, expected, rtol=5e-7, atol=2e-7)


@pytest.mark.parametrize("entry", relay_case("block_noise")["config"], ids=lambda e: e["index"])
def test_recorded_block_noise(entry: dict[str, Any]) -> None:
    golden, index = load("relay", "block_noise"), entry["index"]
    white = golden[f"g{index}"]
    before = white.clone()
    found = block_noise(white, entry["block"])
    assert difference(found, golden[f"b{index}"]) <= (2e-6 if index == 0 else 1e-12)
    assert torch.equal(white, before)


@pytest.mark.parametrize("name", ["loss0", "loss1"])
def test_recorded_loss(name: str) -> None:
    golden, described = load("relay", name), relay_case(name)
    options = dict(described["loss_kwargs"])
    blur = Blur(
        block=options["up_scale"],
        p_mean=options["P_mean"],
        p_std=options["P_std"],
        **{k: options[k] for k in ("prob_length", "blur_sigma_max", "min_scale")},
    )
    objective = BlurObjective(
        corruption=BlurCorruption(blur=blur, block_scale=options["block_scale"]),
        sigma_data=options["sigma_data"],
        sigma_floor=described["truncate_sigma"],
        released_floor=True,
    )
    recorded = {"sigma": "u", "noise": "white", "block_noise": "block_base"}
    draws = RecordedDraws({k: golden[v] for k, v in recorded.items() if v in golden})
    x, denoiser = golden["images"], recorded_denoiser(described["net"])
    labels = golden.get("labels")
    cond = Conditioning(
        None if labels is None else labels.argmax(dim=1), golden.get("augment_labels")
    )

    sigma = objective.sigma(draws)
    torch.testing.assert_close(sigma.double(), golden["sigma"].flatten(), rtol=2e-6, atol=0)
    z = objective.corruption(x, sigma, draws)
    assert difference(z, golden["net_in"].float()) <= 5e-6
    assert difference(denoiser(z, sigma, cond).mean.detach(), golden["denoised"]) <= 2e-5
    loss = objective.elementwise(denoiser, x, cond, draws, sigma)
    torch.testing.assert_close(loss.detach().double(), golden["loss"], rtol=1e-3, atol=1e-3)
    total = objective(denoiser, x, cond, draws)["loss"].sum()
    torch.testing.assert_close(total.detach().double(), golden["loss"].sum(), rtol=1e-4, atol=0)

    total.backward()
    parameters = dict(denoiser.network.named_parameters())
    gradients = {k.removeprefix("grad.model."): v for k, v in golden.items() if "grad." in k}
    assert len(gradients) == 3
    for key, expected in gradients.items():
        found = parameters[key].grad
        assert found is not None
        assert difference(found, expected) <= 2e-3 * expected.abs().max(), key


@given(block=BLOCKS, rows=SIDES, columns=SIDES, seed=st.integers(0, 99))
def test_dct_is_orthonormal(block: int, rows: int, columns: int, seed: int) -> None:
    x = images(2, 3, rows * block, columns * block, seed=seed)
    coefficients = block_dct(x, block)
    assert difference(block_idct(coefficients, block), x) <= 1e-13
    torch.testing.assert_close(coefficients.square().sum(), x.square().sum())
    corner = x[1, 2, :block, :block].numpy()
    expected = torch.from_numpy(dctn(corner, type=2, norm="ortho"))
    assert difference(coefficients[1, 2, :block, :block], expected) <= 1e-13
    # Float32, of any layout and with any number of axes before the last two.
    single = block_dct(x.float().to(memory_format=torch.channels_last), block)
    assert difference(single, coefficients.float()) <= 5e-6
    assert difference(block_dct(x[0, 0], block), coefficients[0, 0]) <= 1e-13


@given(
    block=BLOCKS,
    rows=SIDES,
    columns=SIDES,
    width=st.floats(0, 5),
    scale=st.floats(0, 0.5),
    levels=st.lists(st.floats(1e-4, 10), min_size=2, max_size=2),
)
def test_blur_is_diagonal_and_grows(
    block: int, rows: int, columns: int, width: float, scale: float, levels: list[float]
) -> None:
    blur = Blur(block=block, blur_sigma_max=width, min_scale=scale)
    sigma = torch.tensor(sorted(levels), dtype=torch.float64)
    table = blur.factors(sigma)
    assert table.shape == (2, block, block)
    # Factors lie in [m, 1], fall with the noise level and with the frequency; means stay.
    assert torch.all(table[:, 0, 0] == 1)
    assert table.max() <= 1
    assert table.min() >= scale
    assert torch.all(table[1] <= table[0])
    assert torch.all(table.diff(dim=1) <= 0)
    assert torch.all(table.diff(dim=2) <= 0)
    x = images(2, 3, rows * block, columns * block)
    y = blur(x, sigma)
    assert difference(y, scale_frequencies(x, table[:, None])) <= 1e-12
    assert (
        difference(
            y, block_idct(block_dct(x, block) * table.repeat(1, rows, columns)[:, None], block)
        )
        <= 1e-12
    )
    assert difference(blur(enlarged(x, block), sigma), enlarged(x, block)) <= 1e-12


@given(block=BLOCKS, first=st.floats(0, 3), second=st.floats(0, 3))
def test_blurs_add_up(block: int, first: float, second: float) -> None:
    # Without a least scale, deviations of two blurs add up as those of Gaussian kernels do.
    x = images(1, 1, 2 * block, block)
    last = torch.full((1,), math.inf, dtype=torch.float64)

    def blurred(image: Tensor, width: float) -> Tensor:
        return Blur(block=block, blur_sigma_max=width, min_scale=0)(image, last)

    twice = blurred(blurred(x, first), second)
    assert difference(twice, blurred(x, math.hypot(first, second))) <= 1e-12


def test_the_highest_level_leaves_block_means_and_the_lowest_all() -> None:
    blur, x = Blur(block=4, blur_sigma_max=30, min_scale=0), images(1, 2, 8, 12)
    means = torch.nn.functional.avg_pool2d(x, 4)
    for sigma in (1.77, 80.0, math.inf):
        assert difference(blur(x, torch.tensor([sigma])), enlarged(means, 4)) <= 1e-6
    assert difference(blur(x, torch.zeros(1)), x) <= 1e-12
    # The highest level of the default blur, as the paper's figures have it.
    top = Blur().noise_level(torch.ones((), dtype=torch.float64)).item()
    assert top == pytest.approx(1.7699, abs=1e-4)
    assert Blur().time(torch.tensor(0.9)).item() == pytest.approx(0.8808, abs=1e-4)


@given(block=BLOCKS, rows=SIDES, columns=SIDES)
def test_block_noise_is_a_window_sum(block: int, rows: int, columns: int) -> None:
    white = images(2, rows * block, columns * block)
    expected = torch.zeros_like(white)
    for i in range(block):
        for j in range(block):
            expected += white.roll((i, j), dims=(-2, -1)) / block
    assert difference(block_noise(white, block), expected) <= 1e-12


def test_block_noise_statistics() -> None:
    noise = block_noise(images(4096, 8, 8), 4)
    assert noise.square().mean().item() == pytest.approx(1, abs=0.02)
    for shift, expected in (((0, 1), 0.75), ((2, 1), 0.375), ((0, 4), 0.0), ((7, 0), 0.75)):
        covariance = (noise * noise.roll(shift, (-2, -1))).mean().item()
        assert covariance == pytest.approx(expected, abs=0.02), shift
    base, white = images(4096, 8, 8, seed=1), images(4096, 8, 8, seed=2)
    assert with_block_noise(white, base, 4, 0.75).std().item() == pytest.approx(1.25, abs=0.02)
    assert with_block_noise(white, base, 4, 0.75, unit_variance=True).std().item() == (
        pytest.approx(1, abs=0.02)
    )


def test_low_precision_regions_change_nothing() -> None:
    x, sigma = images(2, 3, 16, 16, dtype=torch.float32), torch.tensor([0.5, 1.0])
    plain = block_dct(x, 4), Blur()(x, sigma)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = block_dct(x, 4), Blur()(x, sigma)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    # Matrices made in inference mode can be used in training.
    dct_matrix.cache_clear()
    with torch.inference_mode():
        block_dct(x, 4)
    x.requires_grad_()
    block_idct(block_dct(x, 4), 4).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_corruption_is_addressed() -> None:
    corruption = BlurCorruption(block_scale=0.5)
    x, sigma = images(4, 3, 8, 12, dtype=torch.float32), torch.tensor([0.01, 0.3, 1.0, 2.0])
    whole = corruption(x, sigma, AddressedDraws(1, torch.arange(10, 14)))
    part = corruption(x[1:3], sigma[1:3], AddressedDraws(1, torch.arange(11, 13)))
    assert difference(whole[1:3], part) <= 1e-6
    # Both kinds of noise are there, and independent of each other.
    draws = AddressedDraws(1, torch.arange(10, 14))
    white, base = draws.normal("noise", 3, 8, 12), draws.normal("block_noise", 3, 8, 12)
    n = (whole - corruption.blur(x, sigma)) / sigma[:, None, None, None]
    assert difference(n[1:], (white + 0.5 * block_noise(base, 4))[1:]) <= 1e-4
    unit = replace(corruption, unit_variance=True)(x, sigma, draws)
    n_unit = (unit - corruption.blur(x, sigma)) / sigma[:, None, None, None]
    assert difference(n_unit[1:], n[1:] / math.sqrt(1.25)) <= 1e-4


class Recorder(Denoiser):
    """Returns zeros in two stages, and remembers the labels."""

    labels: Tensor | None = None

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        self.labels = cond.labels
        return Posterior(torch.zeros_like(z), stages=(torch.full_like(z, 2.0),))


def test_objective_draws_its_levels() -> None:
    draws = AddressedDraws(0, torch.arange(4096))
    objective = BlurObjective()
    sigma = objective.sigma(draws)
    assert sigma.dtype == torch.float32
    assert sigma.min().item() == pytest.approx(7.5e-3, rel=1e-5)
    assert sigma.max() < 1.77
    share = objective.share_below(sigma)
    torch.testing.assert_close(
        share, draws.uniform("sigma").clamp(min=share.min()), atol=1e-4, rtol=0
    )
    # The released floor; a floor that all levels are below.
    released = replace(objective, released_floor=True).sigma(draws)
    assert released.min().item() == pytest.approx(0.00712, rel=1e-3)
    assert replace(objective, sigma_floor=1.0).sigma(draws).min().item() == pytest.approx(1)
    # An expert's share of the levels, in quartiles of its own.
    expert = replace(objective, sigma_range=(0.1, 0.5))
    own = expert.sigma(draws)
    assert own.min() >= 0.1
    assert own.max() <= 0.5
    assert own.median().item() == pytest.approx(
        sigma[(sigma >= 0.1) & (sigma < 0.5)].median().item(), rel=0.05
    )
    terms = expert(Recorder(), torch.zeros(4096, 1, 4, 4), Conditioning(), draws)
    assert torch.bincount(terms["quartile"]).tolist() == pytest.approx([1024] * 4, abs=100)


class Gains(Denoiser):
    """Multiplies each frequency of a block by a gain of its own."""

    def __init__(self, gains: Tensor) -> None:
        super().__init__()
        self.gains = torch.nn.Parameter(gains)

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        return Posterior(scale_frequencies(z, self.gains))


@pytest.mark.parametrize(("sigma", "block_scale"), [(0.3, 0.0), (0.3, 0.5)])
def test_the_minimiser_is_the_mean_of_the_sharp_image(sigma: float, block_scale: float) -> None:
    # Of white images x, the best gain at a frequency is α s² / (α² s² + σ² v), v that of the noise.
    count, std, blur = 2**15, 0.5, Blur()
    x = std * images(count, 1, 4, 4, dtype=torch.float32)
    objective = BlurObjective(corruption=BlurCorruption(blur=blur, block_scale=block_scale))
    draws, level = AddressedDraws(0, torch.arange(count)), torch.full((count,), sigma)

    def gradient(gains: Tensor) -> Tensor:
        denoiser = Gains(gains)
        terms = objective.elementwise(denoiser, x, Conditioning(), draws, level)
        terms.mean().backward()
        assert denoiser.gains.grad is not None
        return denoiser.gains.grad

    # The loss is a square, so the gradient is a line and its root follows from two of its points.
    at_zero, at_one = gradient(torch.zeros(4, 4)), gradient(torch.ones(4, 4))
    best = at_zero / (at_zero - at_one)
    alpha = blur.factors(torch.tensor(sigma, dtype=torch.float64))
    noise = torch.ones(4, 4, dtype=torch.float64)
    if block_scale:
        # On an image of one block, all of the block noise is at frequency 0, with the power s².
        noise[0, 0] += block_scale**2 * 16
    expected = alpha * std**2 / (alpha**2 * std**2 + sigma**2 * noise)
    torch.testing.assert_close(best.double(), expected, rtol=0, atol=0.03)
    assert (expected - alpha * expected).abs().max() > 0.1  # a blurred target would be seen


def test_objective_weights_and_label_dropout() -> None:
    objective = BlurObjective(label_dropout=0.5, max_weight=20.0)
    sigma = torch.tensor([0.01, 1.0])
    assert objective.weight(sigma).tolist() == pytest.approx([20, 5])
    recorder, draws = Recorder(), AddressedDraws(0, torch.arange(512))
    x, labels = torch.ones(512, 1, 4, 4), torch.ones(512, dtype=torch.int64)
    error = objective.elementwise(recorder, x, Conditioning(labels), draws, torch.ones(512))
    # Both stages are one away from the sharp image, whatever the blur.
    torch.testing.assert_close(error, torch.full_like(x, 5.0))
    assert recorder.labels is not None
    assert 200 < int((recorder.labels == -1).sum()) < 312


LONG = BlurCorruption(blur=Blur(prob_length=1.05))
DRAWS = AddressedDraws(0, torch.arange(2))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Blur(block=0), "block"),
        (lambda: Blur(min_scale=1.5), "min_scale"),
        (lambda: Blur(prob_length=0.0), "prob_length"),
        (lambda: Blur(p_std=0.0), "p_std"),
        (lambda: Blur(blur_sigma_max=-1.0), "blur_sigma_max"),
        (lambda: BlurObjective(sigma_floor=0.0), "sigma_floor"),
        (lambda: BlurObjective(corruption=LONG), "prob_length"),
        (lambda: BlurObjective(sigma_range=(5.0, 9.0)).sigma(DRAWS), "snr_splits"),
        (lambda: block_dct(torch.zeros(3, 8, 10), 4), "8x10"),
        (lambda: block_noise(torch.zeros(3, 6, 8), 4), "6x8"),
        (lambda: Blur()(torch.zeros(1, 3, 6, 8), torch.ones(1)), "6x8"),
    ],
)
def test_errors_say_what_is_wrong(make: Any, word: str) -> None:
    with pytest.raises(TesseraError, match=word):
        make()

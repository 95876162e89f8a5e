"""Diffusion transformers and energies: sizes, places, gradients, modes, precision, compilation."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from energy_case import random_energy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from tessera.conditioning import Conditioning, coordinates, full_grid
from tessera.diffusion.discrete import Discrete, DiscreteDenoiser
from tessera.errors import TesseraError
from tessera.networks.dit import SMALLEST_STEP, DiT, EnergyDiT
from tessera.networks.presets import SIZES
from tessera.networks.second_order import attend_twice, gelu_twice, recomputed
from tessera.networks.transformer import DiTBlock
from tessera.training.parallel import repeated_blocks

# Millions of parameters on 16 channels, 16 x 16 tokens and 1000 classes: plain, then energies.
PUBLISHED = {
    "S": (32.86, 32.63),
    "B": (130.30, 129.41),
    "L": (457.82, 456.23),
    "XL": (674.82, 672.81),
}


def random_dit(side: int = 8, **options: Any) -> DiT:
    torch.manual_seed(0)
    network = DiT(side, 3, 5, 2, **({"depth": 2, "width": 16, "heads": 2} | options))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_a_published_size(size: str) -> None:
    depth, width, heads = SIZES[size]
    with torch.device("meta"):
        arguments: dict[str, Any] = {"patch": 1, "depth": depth, "width": width, "heads": heads}
        plain = DiT(16, 16, 1000, **arguments)
        energy = EnergyDiT(16, 16, 1000, **arguments)
    counts = [sum(p.numel() for p in n.parameters()) / 1e6 for n in (plain, energy)]
    assert counts == pytest.approx(PUBLISHED[size], abs=0.006)


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_every_patch_size(patch: int) -> None:
    network = random_dit(patch=patch)
    x, cond = torch.randn(2, 3, 8, 16), Conditioning(labels=torch.tensor([1, -1]))
    assert network(x, torch.ones(2), cond).shape == x.shape
    energy = random_energy(8, patch=patch)
    assert energy(x, torch.ones(2), cond).shape == x.shape
    assert energy.energy(x, torch.ones(2), cond).shape == (2,)


def test_sides_that_do_not_fit() -> None:
    network = random_dit(patch=4)
    assert [side for side in range(13) if network.fits(side)] == [4, 8, 12]
    with pytest.raises(TesseraError, match="multiples of 4"):
        network(torch.zeros(1, 3, 8, 10), torch.zeros(1), Conditioning())
    with pytest.raises(TesseraError, match="multiple of 4"):
        DiT(10, 3, patch=4, depth=1, width=16, heads=2)
    with pytest.raises(TesseraError, match="multiple of 4"):
        DiT(8, 3, patch=4, depth=1, width=18, heads=2)


def test_fresh_networks() -> None:
    """Blocks begin as the identity, the plain output as zero, an energy's gradient not."""
    x = torch.randn(2, 3, 8, 8)
    assert not DiT(8, 3, 5, depth=2, width=16, heads=2)(x, torch.ones(2), Conditioning()).any()
    energy = EnergyDiT(8, 3, depth=2, width=16, heads=2, patch=1)
    gradient = energy(x, torch.ones(2), Conditioning())
    # All blocks are closed and the head takes the mean: the same vector for every token.
    torch.testing.assert_close(gradient, gradient[:, :, :1, :1].expand_as(x))
    assert gradient.abs().max() > 0
    assert not energy.energy_layer.energy_head[2].bias.requires_grad


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_coordinates_of_the_whole_image_give_the_table(patch: int) -> None:
    network = random_dit(16, patch=patch)
    x, grid = torch.randn(2, 3, 16, 16), full_grid((16, 16)).expand(2, -1, -1, -1)
    given = network.positions(x, Conditioning(coords=grid))
    torch.testing.assert_close(given, network.pos_embed.expand_as(given), atol=0, rtol=0)
    noise = torch.ones(2)
    torch.testing.assert_close(
        network(x, noise, Conditioning(coords=grid)), network(x, noise, Conditioning())
    )


@given(row=st.integers(0, 3), column=st.integers(0, 3), patch=st.sampled_from([1, 2]))
@settings(max_examples=15, deadline=None)
def test_crops_stand_at_their_own_places(row: int, column: int, patch: int) -> None:
    """A crop at whole tokens has exactly their entries of the table."""
    network = random_dit(8, patch=patch)
    top, left = row * patch, column * patch
    side = 4
    coords = coordinates(torch.arange(left, left + side), torch.arange(top, top + side), (8, 8))
    if max(top, left) + side > 8:
        return
    places = network.positions(torch.zeros(1, 3, side, side), Conditioning(coords=coords[None]))
    table = network.pos_embed.reshape(8 // patch, 8 // patch, -1)
    count = side // patch
    expected = table[row : row + count, column : column + count].flatten(0, 1)
    torch.testing.assert_close(places[0], expected, atol=0, rtol=0)


def test_other_sizes_are_stretched_to_the_table() -> None:
    network = random_dit(8, patch=1)
    places = network.positions(torch.zeros(1, 3, 15, 15), Conditioning()).reshape(15, 15, -1)
    table = network.pos_embed.reshape(8, 8, -1)
    torch.testing.assert_close(places[::2, ::2], table, atol=1e-6, rtol=0)
    wide = network.positions(torch.zeros(1, 3, 8, 15), Conditioning()).reshape(8, 15, -1)
    torch.testing.assert_close(wide[:, ::2], table, atol=1e-6, rtol=0)


def test_no_class_is_a_class_of_its_own() -> None:
    network = random_dit()
    x, noise = torch.randn(2, 3, 8, 8), torch.ones(2)
    none = network(x, noise, Conditioning())
    negative = network(x, noise, Conditioning(labels=torch.tensor([-1, -1])))
    torch.testing.assert_close(none, negative)
    assert not torch.allclose(none, network(x, noise, Conditioning(labels=torch.tensor([4, 4]))))
    augmented = network(x, noise, Conditioning(augment=torch.ones(2, 2)))
    assert not torch.allclose(none, augmented)
    plain = DiT(8, 3, depth=1, width=16, heads=2)
    plain(x, noise, Conditioning(labels=torch.tensor([3, -1])))


def test_recomputing_changes_no_gradient() -> None:
    x, noise = torch.randn(2, 3, 8, 8), torch.ones(2)
    gradients = []
    for network in (random_dit(), random_dit(recompute=True)):
        network.train()(x, noise, Conditioning()).square().mean().backward()
        gradients.append({n: p.grad for n, p in network.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_learned_variances_are_places_between_bounds() -> None:
    network = random_dit(learn_variance=True)
    denoiser = DiscreteDenoiser(network, Discrete(prediction="eps"), (3, 8, 8), 5)
    posterior = denoiser(torch.randn(1, 3, 8, 8), torch.ones(1), Conditioning())
    assert posterior.log_variance is not None
    assert posterior.log_variance.shape == (1, 3, 8, 8)


@given(
    head=st.sampled_from(["mean_then_linear", "linear_then_mean"]),
    attention=st.sampled_from(["recompute", "explicit", "math"]),
    recompute=st.booleans(),
    multiplier=st.floats(0.5, 4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=20, deadline=None)
def test_the_output_is_the_slope_of_the_energy(
    head: Any, attention: Any, recompute: bool, multiplier: float, seed: int
) -> None:
    options = {"head": head, "attention": attention, "recompute": recompute}
    network = random_energy(multiplier=multiplier, **options).double()
    torch.manual_seed(seed)
    x, direction = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    noise, cond = torch.rand(2).double(), Conditioning(labels=torch.tensor([2, -1]))
    h = 1e-5
    with torch.no_grad():
        value, output = network.energy_and_output(x, noise, cond)
        torch.testing.assert_close(value, network.energy(x, noise, cond))
        above, below = (network.energy(x + s * h * direction, noise, cond) for s in (1, -1))
    slope = multiplier * (above - below) / (2 * h)
    torch.testing.assert_close((output * direction).sum(dim=(1, 2, 3)), slope, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", ["recompute", "explicit", "math"])
@pytest.mark.parametrize("recompute", [False, True])
def test_derivatives_of_the_output_by_the_input(attention: Any, recompute: bool) -> None:
    network = random_energy(2, depth=1, attention=attention, recompute=recompute).double()
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    noise = torch.ones(1, dtype=torch.float64)
    assert gradcheck(lambda u: network(u, noise, Conditioning()), (x,), atol=1e-6)


@given(
    spans=st.integers(1, 3), tokens=st.integers(1, 6), heads=st.integers(1, 2),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_attention_twice(spans: int, tokens: int, heads: int, seed: int) -> None:
    check_attention(spans, tokens, heads, seed)


def check_attention(spans: int, tokens: int, heads: int, seed: int) -> None:
    """Values, gradients and their gradients of attention by all means."""
    torch.manual_seed(seed)
    qkv = torch.randn(spans, tokens, 3, heads, 3, dtype=torch.float64, requires_grad=True)
    expected = attend_twice(qkv, "explicit")
    for kind in ("recompute", "math"):
        torch.testing.assert_close(attend_twice(qkv, kind), expected)
    assert gradcheck(lambda t: attend_twice(t, "recompute"), (qkv,), fast_mode=True)
    assert gradgradcheck(lambda t: attend_twice(t, "recompute"), (qkv,), fast_mode=True)


def test_chunks_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.networks.second_order._CHUNK_CPU", 2 * 2 * 4**2)
    check_attention(3, 4, 2, 0)


def test_gelu_twice() -> None:
    x = torch.linspace(-6, 6, 49, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(gelu_twice(x), nn.functional.gelu(x, approximate="tanh"))
    assert gradcheck(gelu_twice, (x,))
    assert gradgradcheck(gelu_twice, (x,))


def test_recomputed_blocks_keep_their_input_only() -> None:
    block = DiTBlock(16, 2)
    h, c = torch.randn(1, 4, 16, requires_grad=True), torch.randn(1, 16)
    kept: weakref.WeakSet[Box] = weakref.WeakSet()

    def keep(tensor: Tensor) -> Box:
        box = Box(tensor)
        kept.add(box)
        return box

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda box: box.tensor):
        output = recomputed(lambda a, b: block(a, b, 4), h, c, block)
        gc.collect()
        assert sum(box.tensor.numel() for box in kept) == h.numel() + c.numel()
        gradient = torch.autograd.grad(output.sum(), h, create_graph=True)
        gc.collect()
        # Input and condition for each of two passes, and the gradient that came in.
        assert sum(box.tensor.numel() for box in kept) <= 3 * h.numel() + 2 * c.numel()
    del gradient


@pytest.mark.parametrize("recompute", [False, True])
def test_operations_of_training_are_counted(recompute: bool) -> None:
    """On tensors without data; two derivatives are about twice the work of one."""
    counts = []
    sizes: dict[str, Any] = {"patch": 1, "depth": 2, "width": 64, "heads": 2}
    for kind in (DiT, EnergyDiT):
        with torch.device("meta"):
            network = kind(4, 3, recompute=recompute and kind is EnergyDiT, **sizes)
            x, noise = torch.randn(2, 3, 4, 4), torch.ones(2)
        with FlopCounterMode(display=False) as counter:
            network(x, noise, Conditioning()).square().mean().backward()
        counts.append(counter.get_total_flops())
    low, high = (3, 5) if recompute else (1.9, 2.3)
    assert low * counts[0] < counts[1] < high * counts[0]


class Box:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_modes() -> None:
    """Sampling needs no gradients, leaves none behind, and gives what training sees."""
    network = random_energy()
    x, noise, cond = torch.randn(2, 3, 4, 4), torch.ones(2), Conditioning()
    trained = network(x, noise, cond)
    assert trained.requires_grad
    assert not x.requires_grad
    with torch.no_grad():
        sampled = network(x, noise, cond)
    with torch.inference_mode():
        inferred = network(x.clone(), noise, Conditioning(labels=torch.tensor([-1, -1])))
        assert not network.energy(x, noise, cond).requires_grad
    assert not sampled.requires_grad
    for output in (sampled, inferred):
        torch.testing.assert_close(output, trained.detach(), atol=1e-6, rtol=1e-5)
    assert all(p.grad is None for p in network.parameters())


@given(rows=st.permutations(range(4)), count=st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_images_do_not_know_each_other(rows: list[int], count: int) -> None:
    network = random_energy()
    torch.manual_seed(1)
    x, noise = torch.randn(4, 3, 4, 4), torch.arange(4.0)
    cond, chosen = Conditioning(labels=torch.tensor([0, 3, -1, 2])), torch.tensor(rows[:count])
    whole = network(x, noise, cond)
    torch.testing.assert_close(network(x, noise, cond), whole, atol=0, rtol=0)
    part = network(x[chosen], noise[chosen], cond[chosen])
    torch.testing.assert_close(part, whole[chosen], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_autocast(recompute: bool) -> None:
    """bfloat16 is near, forward and backward; float16 is refused in words."""
    network = random_energy(width=64, heads=4, recompute=recompute)
    x, noise, cond = torch.randn(2, 3, 4, 4), torch.ones(2), Conditioning()
    results = []
    for enabled in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = network(x, noise, cond)
            loss = (output - x).square().mean()
        loss.backward()
        assert output.dtype == torch.float32
        gradient = network.layers[0].mlp.fc1.weight.grad
        assert gradient is not None
        results.append((output.detach(), gradient.clone()))
    for exact, rounded in zip(*results, strict=True):
        assert not torch.equal(exact, rounded)
        assert (exact - rounded).norm() < 0.1 * exact.norm()
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(TesseraError, match="bf16 or fp32"),
    ):
        network(x, noise, cond)


def test_other_channels_are_given_no_gradient() -> None:
    """Of the noisy image and an enlarged small one, the first is denoised."""
    network = random_energy(channels=6, out_channels=3)
    x = torch.randn(2, 6, 4, 4)
    assert network(x, torch.ones(2), Conditioning()).shape == (2, 3, 4, 4)


def test_step_sizes_keep_a_gradient_below_the_smallest() -> None:
    network = random_energy(learn_step_size=True)
    for value in (0.5, 1e-6):
        nn.init.constant_(network.alpha, value)
        network.alpha.grad = None
        assert network.step_size.item() == pytest.approx(max(value, SMALLEST_STEP))
        network.step_size.backward()
        assert network.alpha.grad is not None
        assert network.alpha.grad.item() == 1
    assert "alpha" in dict(random_energy().named_buffers())


@pytest.mark.slow
def test_a_compiled_energy_trains_as_an_eager_one() -> None:
    """Compiled as a whole, inner gradient included; a compiled block has no second derivative."""
    network = random_energy(depth=1)
    assert repeated_blocks(network) == [network]
    assert len(repeated_blocks(random_dit())) == 2
    x, noise, cond = torch.randn(2, 3, 4, 4), torch.ones(2), Conditioning()
    results = []
    for compiled in (False, True):
        network.zero_grad()
        if compiled:
            torch._dynamo.reset()
            network.compile(dynamic=False, backend="aot_eager")
        output = network(x, noise, cond)
        output.square().mean().backward()
        gradients = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
        results.append({"output": output.detach(), **gradients})
    assert results[0].keys() == results[1].keys()
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-4)

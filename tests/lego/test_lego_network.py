"""Bricks: canvases, attention, initialisation, precision, the published stacks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tessera.conditioning import Conditioning, full_grid
from tessera.diffusion.denoiser import Denoiser, Posterior
from tessera.diffusion.objectives import EdmObjective
from tessera.errors import TesseraError
from tessera.networks.lego import Grid, Lego
from tessera.networks.transformer import DiTBlock, _attend_fused, attend
from tessera.randomness import AddressedDraws
from tessera.recipes.build import build_denoiser, build_network, recipe_objective
from tessera.recipes.lego import STACKS
from tessera.recipes.loading import parse_recipe

BRICKS = [(4, 2, 1), (8, 4, 1), (16, 2, 1)]

# Parameters with 1000 classes and without, and 10^9 multiply-adds of each brick of one image.
PUBLISHED = {
    "lego_S_PG_64": (3, 34_134_744, 33_750_360, (3.6, 0.5, 15.7)),
    "lego_S_PR_64": (3, 34_134_744, 33_750_360, (15.7, 0.5, 3.6)),
    "lego_S_U_32": (4, 61_578_800, 61_194_416, (3.0, 0.1, 0.9, 0.1, 3.0)),
    "lego_S_U_64": (3, 62_008_740, 61_624_356, (15.7, 0.5, 3.6, 0.5, 15.7)),
    "lego_L_PG_32": (4, 463_278_368, 462_253_344, (12.9, 1.7, 40.4)),
    "lego_L_PR_32": (4, 463_278_368, 462_253_344, (40.4, 1.7, 12.9)),
    "lego_L_PG_64": (3, 501_627_096, 500_602_072, (77.4, 6.5, 180.5)),
    "lego_L_PR_64": (3, 501_627_096, 500_602_072, (180.5, 6.5, 77.4)),
    "lego_L_PG_64_old": (3, 463_847_640, 462_822_616, (77.4, 4.9, 180.5)),
    "lego_L_PR_64_old": (3, 463_847_640, 462_822_616, (180.5, 4.9, 77.4)),
    "lego_L_U_32": (4, 884_294_192, 883_269_168, (40.4, 1.7, 19.4, 1.7, 40.4)),
    "lego_L_U_64": (3, 885_440_932, 884_415_908, (180.5, 6.5, 77.4, 6.5, 180.5)),
    "lego_XL_PG_32": (4, 729_352_224, 728_199_072, (16.4, 3.2, 59.3)),
    "lego_XL_PR_32": (4, 729_352_224, 728_199_072, (59.3, 3.2, 16.4)),
    "lego_XL_PG_64": (3, 729_992_664, 728_839_512, (65.3, 12.4, 262.3)),
    "lego_XL_PR_64": (3, 729_992_664, 728_839_512, (262.3, 12.4, 65.4)),
    "lego_XL_U_32": (4, 1_261_977_392, 1_260_824_240, (59.3, 2.6, 16.4, 2.6, 59.3)),
    "lego_XL_U_64": (3, 1_358_888_100, 1_357_734_948, (262.3, 12.4, 65.4, 12.4, 262.3)),
}


def random_lego(**options: object) -> Lego:
    torch.manual_seed(0)
    network = Lego(3, 5, bricks=BRICKS, width=32, heads=2, **options)  # type: ignore[arg-type]
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


def test_all_stacks_are_there() -> None:
    assert STACKS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_a_published_stack(name: str) -> None:
    channels, *counts, _ = PUBLISHED[name]
    section = STACKS[name]
    bricks = [(b.size, b.patch, b.depth) for b in section.bricks]
    for classes, expected in zip((1000, 0), counts, strict=True):
        with torch.device("meta"):
            network = Lego(
                channels, classes, bricks=bricks, width=section.width, heads=section.heads
            )
        assert sum(t.numel() for t in network.state_dict().values()) == expected


@pytest.mark.parametrize("name", ["lego_S_PG_64", "lego_S_U_32"])
def test_flops_of_each_brick(name: str) -> None:
    channels, *_, macs = PUBLISHED[name]
    section = STACKS[name]
    bricks = [(b.size, b.patch, b.depth) for b in section.bricks]
    side = max(size for size, *_ in bricks)
    with torch.device("meta"):
        network = Lego(channels, bricks=bricks, width=section.width, heads=section.heads).eval()
        x, noise = torch.zeros(1, channels, side, side), torch.zeros(1)
    spent = 0.0
    for count, expected in enumerate(macs, start=1):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x, noise, Conditioning(), bricks=count)
        total = counter.get_total_flops() / 2e9
        assert total - spent == pytest.approx(expected, rel=0.02, abs=0.06)
        spent = total


def test_fresh_bricks_put_out_zero_and_learn() -> None:
    network = Lego(3, 5, 2, bricks=BRICKS, width=32, heads=2).train()
    outputs = network(torch.randn(2, 3, 16, 16), torch.zeros(2), Conditioning())
    assert all((output == 0).all() for output in outputs)
    assert not [name for name, _ in network.named_parameters() if name.endswith("pos_embed")]
    learned = Lego(3, bricks=BRICKS, width=32, heads=2, positions="learned")
    assert len([n for n, _ in learned.named_parameters() if n.endswith("pos_embed")]) == 3
    assert (
        learned.state_dict().keys() == Lego(3, bricks=BRICKS, width=32, heads=2).state_dict().keys()
    )


@pytest.mark.parametrize("tokens", [4, 9, 64])
def test_attention_over_spans(tokens: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(6, tokens, 3, 2, 8, dtype=torch.float64)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    expected = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2)
    torch.testing.assert_close(attend(qkv), expected)
    torch.testing.assert_close(_attend_fused(qkv.float()), expected.float())


def test_bricks_see_their_own_patch_only() -> None:
    network = random_lego()
    noise, x = torch.zeros(1), torch.randn(1, 3, 16, 32)
    changed = x.clone()
    changed[:, :, 5, 6] += 1
    with torch.no_grad():
        for bricks, size in ((1, 4), (2, 8), (3, 16)):
            before = network(x, noise, Conditioning(), bricks=bricks)
            after = network(changed, noise, Conditioning(), bricks=bricks)
            rows, columns = (before != after).any(dim=1)[0].nonzero().unbind(1)
            top, left = 5 // size * size, 6 // size * size
            assert (rows.min(), rows.max()) == (top, top + size - 1)
            assert (columns.min(), columns.max()) == (left, left + size - 1)


def test_given_coordinates_are_those_of_the_whole() -> None:
    """A quadrant told where it lies is made as in the whole picture."""
    network = random_lego()
    x, noise = torch.randn(2, 3, 32, 32), torch.zeros(2)
    coords = full_grid((32, 32)).expand(2, -1, -1, -1)
    with torch.no_grad():
        whole = network(x, noise, Conditioning())
        part = network(x[:, :, 16:, :16], noise, Conditioning(coords=coords[:, :, 16:, :16]))
    torch.testing.assert_close(part, whole[:, :, 16:, :16], atol=1e-5, rtol=1e-5)


def test_canvas_smaller_than_a_brick() -> None:
    network = random_lego()
    output = network(torch.randn(2, 3, 8, 8), torch.zeros(2), Conditioning())
    assert output.shape == (2, 3, 8, 8)


def test_canvas_that_does_not_fit() -> None:
    network = random_lego()
    with pytest.raises(TesseraError, match=r"20x32.*4, 8, 16 pixels.*multiples of 16 or 4, 8"):
        network(torch.randn(1, 3, 20, 32), torch.zeros(1), Conditioning())


@pytest.mark.parametrize("shape", [(32, 16), (16, 48)])
def test_cutting_and_joining(shape: tuple[int, int]) -> None:
    x = torch.arange(2 * 3 * shape[0] * shape[1]).reshape(2, 3, *shape)
    canvas = Grid(*shape, size=8, token=2)
    tokens = canvas.cut(x)
    assert tokens.shape == (2, shape[0] * shape[1] // 4, 12)
    assert torch.equal(tokens[0, 4], x[0, :, 2:4, :2].flatten())  # second row of the first patch
    channel_last = tokens.reshape(2, -1, 3, 4).mT.reshape(2, -1, 12)
    assert torch.equal(canvas.join(channel_last), x)


def test_bfloat16_keeps_the_residual_stream_small() -> None:
    network = random_lego()
    dtypes = []
    network.model[2].blocks[0].register_forward_hook(lambda _m, i, o: dtypes.append(o.dtype))
    x, noise = torch.randn(2, 3, 16, 16), torch.zeros(2)
    with torch.no_grad():
        exact = network(x, noise, Conditioning())
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(x, noise, Conditioning())
    assert dtypes == [torch.float32, torch.bfloat16]
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


class Stages(Denoiser):
    """Estimates that are off by 1 and by 2 everywhere."""

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        return Posterior(torch.full_like(z, 2.0), stages=(torch.full_like(z, 1.0),))


def test_every_estimate_is_supervised_alike() -> None:
    x, draws = torch.zeros(4, 1, 2, 2), AddressedDraws(0, torch.arange(4))
    objective = EdmObjective()
    loss = objective(Stages(), x, Conditioning(), draws)["loss"]
    weight = objective.weight(objective.sigma(draws))
    torch.testing.assert_close(loss, weight * 4 * (1 + 4) / 2)


@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize("scaling", ["discrete", "iddpm"])
def test_discrete_processes_train_every_brick(loss: str, scaling: str) -> None:
    recipe = parse_recipe(
        {
            "name": "steps",
            "data": {"resolution": 16},
            "network": {
                "kind": "lego", "width": 32, "heads": 4,
                "bricks": [{"size": r, "patch": p, "depth": d} for r, p, d in BRICKS],
            },
            "preconditioning": {"kind": scaling, "timesteps": 50},
            "objective": {"kind": "discrete", "loss": loss},
        }
    )  # fmt: skip
    torch.manual_seed(0)
    denoiser = build_denoiser(recipe).train()
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, draws = torch.randn(6, 3, 16, 16), AddressedDraws(0, torch.arange(6))
    terms = recipe_objective(recipe)(denoiser, x, Conditioning(), draws)["loss"]

    # Each estimate alone gives the loss; what is minimised is the mean of them.
    class Alone(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.index, self.levels = index, denoiser.levels

        def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
            return Posterior(denoiser(z, sigma, cond).estimates[self.index])

    draws = AddressedDraws(0, torch.arange(6))
    objective = recipe_objective(recipe)
    alone = [objective(Alone(i), x, Conditioning(), draws)["loss"] for i in range(3)]  # type: ignore[arg-type]
    torch.testing.assert_close(terms, torch.stack(alone).mean(dim=0))
    assert not torch.allclose(terms, alone[-1])


def test_free_form_stack_from_plain_data() -> None:
    recipe = parse_recipe(
        {
            "name": "own",
            "data": {"resolution": 24},
            "network": {
                "kind": "lego",
                "width": 32,
                "heads": 4,
                "bricks": [{"size": 6, "patch": 3, "depth": 1}, {"size": 12, "depth": 2}],
            },
        }
    )
    network = build_network(recipe)
    assert isinstance(network, Lego)
    assert network.specs == ((6, 3, 1), (12, 2, 2))
    assert len(list(network.blocks())) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"resolution": 20}}, "must be a multiple of 16 or 4, 8"),
        ({"network": {"width": 30}}, "multiple of heads"),
        ({"network": {"bricks": [{"size": 6, "patch": 4, "depth": 1}]}}, "multiple of patch"),
        ({"coords": {"frequencies": 3}}, "plain coordinates"),
        ({"view": {"kind": "patches", "sizes": [6, 16]}}, "patches of 6 pixels"),
    ],
)
def test_recipes_that_do_not_fit(change: dict[str, dict[str, object]], message: str) -> None:
    data: dict[str, dict[str, object]] = {
        "data": {"resolution": 16},
        "network": {
            "kind": "lego",
            "width": 32,
            "heads": 4,
            "bricks": [{"size": r, "patch": p, "depth": d} for r, p, d in BRICKS],
        },
    }
    for section, values in change.items():
        data[section] = data.get(section, {}) | values
    with pytest.raises(TesseraError, match=message):
        parse_recipe({"name": "own", **data})


@pytest.mark.parametrize("span", [4, 32])
def test_blocks_have_the_same_results_where_they_are_compiled(span: int) -> None:
    """Attention over few tokens and GELU are written in another way for the compiler."""
    torch.manual_seed(0)
    block = DiTBlock(width=32, heads=2)
    h, c = torch.randn(2, 32, 32), torch.randn(2, 32)
    results = []
    for call in (block, torch.compile(block, backend="eager", fullgraph=True)):
        block.zero_grad()
        output = call(h, c, span)
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad.clone() for p in block.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)

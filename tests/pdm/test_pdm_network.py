"""The patched U-Net: recorded outputs and gradients, sizes, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import case, load, weights
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.errors import TesseraError
from tessera.networks.patched_unet import (
    Norm,
    PatchedUNet,
    ResBlock,
    from_patches,
    position_embedding,
    time_embedding,
    to_patches,
)

CASES = [
    "unet_p2_uncond_sigma",
]
FORMATS = [torch.contiguous_format, torch.channels_last]


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def recorded_unet(config: dict[str, Any]) -> PatchedUNet:
    """The network that a case describes, with fresh weights."""
    return PatchedUNet(
        config["image_size"],
        6 if config.get("super_res") else 3,
        3,
        config["num_classes"] or 0,
        patch_size=config["patch_size"],
        model_channels=config["num_channels"],
        channel_mult=numbers(config["channel_mult"]),
        num_blocks=config["num_res_blocks"],
        attn_resolutions=[int(side) for side in numbers(config["attention_resolutions"])],
        heads=config.get("num_heads", 4),
        head_channels=config.get("num_head_channels"),
        attention_order="split" if config.get("use_new_attention_order") else "legacy",
        resblock_updown=config.get("resblock_updown", False),
        null_class=config.get("classifier_free", True),
        learn_variance=config["learn_sigma"],
    )


def restored(
    name: str, memory_format: torch.memory_format = torch.contiguous_format
) -> tuple[PatchedUNet, dict[str, Tensor], dict[str, Any]]:
    golden, config = load("pdm", name), case("pdm", name)["config"]
    network = recorded_unet(config)
    state = {k: v.float() for k, v in weights(golden).items()}
    network.load_state_dict(state, strict=True)
    return network.to(memory_format=memory_format), golden, config


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_recorded_outputs(name: str, memory_format: torch.memory_format) -> None:
    network, golden, _ = restored(name, memory_format)
    network.eval()
    x = golden["in.x"]
    if "in.low_res" in golden:
        low = torch.nn.functional.interpolate(
            golden["in.low_res"], x.shape[-2:], mode="bilinear", align_corners=False
        )
        x = torch.cat([x, low], dim=1)
    x = x.contiguous(memory_format=memory_format)
    with torch.no_grad():
        output = network(x, golden["in.t"].float(), Conditioning(golden.get("in.y")))
        torch.testing.assert_close(output, golden["out.model"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_recorded_gradients_and_the_detached_variance(memory_format: torch.memory_format) -> None:
    network, golden, config = restored("unet_p2_uncond_sigma", memory_format)
    network.recompute = memory_format == torch.channels_last
    parameters = dict(network.named_parameters())
    output = network(golden["in.x"], golden["in.t"].float(), Conditioning())
    (output * golden["in.cotangent"]).sum().backward(retain_graph=True)
    for name in config["grads"]:
        expected, gradient = golden[f"out.grad.{name}"], parameters[name].grad
        assert gradient is not None
        atol = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=atol)

    network.zero_grad()
    (output * golden["in.cotangent"])[:, 3:].sum().backward()
    norms = torch.stack([parameters[n].grad.norm() for n in config["grads"]])  # type: ignore[union-attr]
    torch.testing.assert_close(norms, golden["out.gradnorm_var_only"], rtol=1e-3, atol=1e-6)


def test_recorded_embeddings_and_patches() -> None:
    golden, config = load("pdm", "embeddings"), case("pdm", "embeddings")["config"]
    for width in config["time_dims"]:
        embedded = time_embedding(golden["in.t"], width)
        expected = golden[f"out.time_emb.{width}"]
        torch.testing.assert_close(embedded, expected, rtol=1e-5, atol=2e-4)
    for width, side in config["pos"]:
        embedded = position_embedding(width, side, side)
        expected = golden[f"out.pos_emb.c{width}.r{side}"]
        torch.testing.assert_close(embedded, expected, rtol=0, atol=1e-5)
    for patch in config["patch_sizes"]:
        patches = to_patches(golden["in.img"], patch)
        assert torch.equal(patches, golden[f"out.patches.p{patch}"])
        assert torch.equal(from_patches(patches, patch), golden["in.img"])


def test_rectangles_falling_widths_and_other_inputs() -> None:
    network = PatchedUNet(
        16, 3, 3, 4, augment_dim=2, patch_size=2, model_channels=64, channel_mult=(1.5, 0.5),
        num_blocks=1, attn_resolutions=(8,), learn_variance=True, null_class=False,
        coord_frequencies=0,
    )  # fmt: skip
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.03)
    x, t = torch.randn(2, 3, 8, 24), torch.tensor([3.0, 700.0])
    cond = Conditioning(torch.tensor([1, -1]), torch.ones(2, 2))
    output = network(x, t, cond)
    assert output.shape == (2, 6, 8, 24)
    assert ((output[:, 3:] > 0) & (output[:, 3:] < 1)).all()
    # Without a null class, no class is the zero embedding, for each image by itself.
    alone = network(x[1:], t[1:], Conditioning(None, cond.augment[1:]))  # type: ignore[index]
    torch.testing.assert_close(output[1:], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(output, network(x, t, Conditioning(cond.labels)))
    # Rows and columns are told apart, each by the grid's own side.
    embedding = position_embedding(32, 4, 8)
    assert torch.equal(embedding[0, :16, 0], position_embedding(32, 8, 8)[0, :16, 0])
    assert torch.equal(embedding[0, 16:, :, 0], position_embedding(32, 4, 4)[0, 16:, :, 0])


def test_a_fresh_network_predicts_zero() -> None:
    network = PatchedUNet(
        16, 3, 3, patch_size=2, model_channels=32, channel_mult=(1, 2), learn_variance=True
    )
    assert not network(torch.randn(1, 3, 16, 16), torch.ones(1), Conditioning())[:, :3].any()
    assert len(list(network.blocks())) == 4 + 2 + 3 + 3 + 6


def test_default_widths_and_bfloat16() -> None:
    network = PatchedUNet(64, 3, 3, patch_size=4, model_channels=32, num_blocks=1)
    assert network.divisor == 8
    x = torch.randn(1, 3, 64, 64)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    exact = network(x, torch.ones(1), Conditioning())
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(x, torch.ones(1), Conditioning())
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_mult": (1, 1.3)}, "41 channels wide"),
        ({"resolution": 24}, "no default widths"),
        ({"channel_mult": (1, 2), "head_channels": 64}, "heads of 64"),
        ({"channel_mult": (1, 2), "heads": 5}, "5 heads"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TesseraError, match=message):
        PatchedUNet(**{"resolution": 16, "in_channels": 3, "out_channels": 3, "patch_size": 2,
                       "model_channels": 32, **options})  # fmt: skip


def test_sizes_that_do_not_fit() -> None:
    network = PatchedUNet(16, 3, 3, patch_size=2, model_channels=32, channel_mult=(1, 2))
    with pytest.raises(TesseraError, match="multiples of 4"):
        network(torch.zeros(1, 3, 16, 18), torch.zeros(1), Conditioning())


def test_narrow_levels_keep_the_means_of_their_channels_with_fewer_groups() -> None:
    x, offset = torch.randn(2, 32, 4, 4), torch.linspace(-2, 2, 32)[:, None, None]
    released, own = Norm(32, 1e-5), Norm(32, 1e-5, None)
    torch.testing.assert_close(released(x), released(x + offset), rtol=1e-3, atol=1e-3)
    assert (own(x) - own(x + offset)).abs().mean() > 0.1
    network = PatchedUNet(
        16, 3, 3, patch_size=2, model_channels=32, channel_mult=(1, 4), attn_resolutions=(8,),
        groups=None,
    )  # fmt: skip
    norms = [module for module in network.modules() if isinstance(module, Norm)]
    assert {(norm.groups, len(norm.weight)) for norm in norms} == {
        (8, 32), (16, 64), (32, 128), (32, 256)
    }  # fmt: skip
    assert {block.groups for block in network.blocks() if isinstance(block, ResBlock)} == {8, 32}

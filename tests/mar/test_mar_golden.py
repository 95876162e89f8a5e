"""MAR against the released code: head, losses, forward passes, gradients, generation."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from golden_cases import load, relative_error, weights
from mar_case import PROCESS, RecordedLoop, RecordedTokens, document, own_names, recorded
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.convert.kl16 import autoencoder_config, build_autoencoder, save_autoencoder
from tessera.data.codec import VaeCodec
from tessera.diffusion.discrete import DiscreteDenoiser, Process, spaced_steps
from tessera.diffusion.discrete_objective import DiscreteObjective
from tessera.diffusion.masked import MaskedModel, MaskedObjective, ToldHead, mask_ratio
from tessera.errors import CheckpointError
from tessera.images import to_uint8
from tessera.networks.diffusion_head import DiffusionHead
from tessera.randomness import Draws
from tessera.sampling.masked import MaskedSampler, TokenMaker, rounds

TABLES = {
    "alphas_cumprod": "alpha_bar",
    "betas": "betas",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance_clipped": "posterior_log_variance",
}


def assert_near(actual: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=rtol, atol=atol)


def assert_gradients(
    module: nn.Module, expected: dict[str, Tensor], rtol: float, atol: float
) -> None:
    """Every recorded gradient, and no parameter without one."""
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        gradient = found[name]
        assert gradient is not None, name
        assert_near(gradient, value, rtol, atol)


def recorded_head(name: str, prefix: str) -> tuple[DiffusionHead, dict[str, Tensor]]:
    golden, c = load("mar", name), document()["cases"][name]["config"]
    channels = c.get("in_channels", c.get("target_channels"))
    head = DiffusionHead(channels, c["z_channels"], c["width"], c["depth"])
    head.load_state_dict(weights(golden, prefix), strict=True)
    return head, golden


@pytest.mark.parametrize("spacing", ["", "100", "4"])
def test_the_process(spacing: str) -> None:
    golden = load("mar", "cosine_tables")
    prefix = f"cos1000{'_s' + spacing if spacing else ''}"
    process = Process.named("cosine", 1000, spacing)
    for name, attribute in TABLES.items():
        assert_near(getattr(process, attribute), golden[f"{prefix}.{name}"], 1e-12, 1e-14)


def test_the_head() -> None:
    head, golden = recorded_head("diffloss_net", "w.")
    told = head.times(golden["in.t"].float(), 1000) + head.cond_embed(golden["in.c"])
    output = head(golden["in.x"], told)
    assert_near(output, golden["out.net"], 1e-4, 2e-5)
    output.square().mean().backward()
    assert_gradients(head, weights(golden, "grad."), 1e-3, 2e-5)


def test_the_table_of_times_is_that_of_each_row() -> None:
    head, golden = recorded_head("diffloss_net", "w.")
    steps = golden["in.t"].float() % 4  # six rows of four steps
    assert_near(head.times(steps, 4), head.times(steps, 1000), 1e-6, 1e-6)


def test_the_guided_head() -> None:
    head, golden = recorded_head("diffloss_net", "w.")
    half = len(golden["in.x"]) // 2
    x, t = golden["in.x"][:half], golden["in.t"].float()
    # The recorded rows are at steps of their own, also in the half without class.
    vectors = head.cond_embed(golden["in.c"]) + head.times(t, 1000) - head.times(t[:1], 1000)
    told = ToldHead(head, vectors, scale=torch.tensor(2.5))
    output = told(x[:, :, None, None], t[:1].expand(half), Conditioning())[:, :, 0, 0]
    guess, place = output.chunk(2, dim=1)
    assert_near(guess, golden["out.cfg"][:half, :16], 1e-4, 2e-5)
    assert_near(1 - 2 * place, golden["out.cfg"][:half, 16:], 1e-4, 2e-5)


class RecordedRows:
    """The draws of a loss of rows."""

    def __init__(self, golden: dict[str, Tensor]) -> None:
        self.golden = golden

    def normal(self, purpose: str, *shape: int) -> Tensor:
        return self.golden["in.noise"].reshape(-1, *shape)

    def integers(self, purpose: str, high: int, *shape: int) -> Tensor:
        return self.golden["in.t"]


def test_the_loss_of_tokens() -> None:
    head, golden = recorded_head("diffloss_train", "w.net.")
    z = golden["in.z"].requires_grad_()
    told = ToldHead(head, head.cond_embed(z), steps=1000)
    denoiser = DiscreteDenoiser(told, PROCESS, (16, 1, 1))
    objective = DiscreteObjective(1000, weight="snr", label_dropout=0)
    rows, draws = golden["in.target"][:, :, None, None], cast(Draws, RecordedRows(golden))
    terms = objective(denoiser, rows, Conditioning(), draws)
    assert (golden["in.t"] == 0).any()
    assert_near(terms["mse"], golden["out.mse"], 2e-5, 1e-5)
    assert_near(terms["vb"], golden["out.vb"], 2e-5, 1e-5)
    mask = golden["in.mask"]
    loss = (mask * terms["loss"]).sum() / mask.sum()
    assert_near(loss, golden["out.loss"], 2e-5, 1e-5)
    loss.backward()
    assert_gradients(head, weights(golden, "grad.net."), 1e-3, 2e-5)
    assert z.grad is not None
    assert_near(z.grad, golden["grad_in.z"], 1e-3, 2e-5)


def test_sampling_of_tokens() -> None:
    head, golden = recorded_head("diffloss_sample", "w.net.")
    levels = PROCESS.levels[spaced_steps(1000, "4")].flip(0).tolist()
    assert spaced_steps(1000, "4") == golden["out.timestep_map"].tolist()

    def made(z: Tensor, first: Tensor, draws: Tensor, temperature: float, scale: Any) -> Tensor:
        model = SimpleNamespace(
            network=SimpleNamespace(head=head),
            denoiser=lambda told: DiscreteDenoiser(told, PROCESS, (16, 1, 1)),
        )
        numbers = torch.cat([first[None], draws[:-1, : len(first)]]).transpose(0, 1)[:, :, None]
        maker = TokenMaker(cast(MaskedModel, model), levels, temperature)
        with torch.no_grad():
            tokens: Tensor = maker(z[:, None], numbers, scale)
        return tokens[:, 0]

    plain = made(golden["in.z"], golden["in.init"], golden["in.draws"], 0.95, None)
    assert relative_error(plain.float(), golden["out.sample"]) < 2e-4
    guided = made(
        golden["in.cfg_z"], golden["in.cfg_init"], golden["in.cfg_draws"], 1.0, torch.tensor(2.5)
    )
    assert relative_error(guided.float(), golden["out.cfg_sample"][: len(guided)]) < 2e-4


@pytest.mark.parametrize("name", ["mar_forward_train", "mar_forward_patch2_eval"])
def test_forward_loss_and_gradients(name: str) -> None:
    model, golden, c = recorded(name)
    model.train(name.endswith("train"))
    network = model.network
    tokens = network.cut(golden["in.x"])
    assert torch.equal(tokens, golden["out.tokens"])
    assert torch.equal(network.join(tokens), golden["in.x"])
    order, count = golden["in.orders"], document()["cases"][name]["facts"]["num_masked"]
    masked, known = (part.sort(dim=1).values for part in (order[:, :count], order[:, count:]))
    assert torch.equal(golden["in.mask"].gather(1, masked), torch.ones(masked.shape))
    cond = Conditioning(labels=golden["in.y"])
    dropout = 0.0
    if "in.drop_uniform" in golden:
        dropout = c["label_drop_prob"]
        cond = cond.drop_labels(golden["in.drop_uniform"] < dropout)
        assert cond.labels is not None
        assert (cond.labels == -1).any()
    encoded = network.encode(tokens, known, cond)
    assert_near(encoded, golden["out.encoder"], 1e-4, 2e-5)
    everywhere = torch.arange(network.tokens).expand(len(tokens), -1)
    assert_near(network.decode(encoded, known, everywhere), golden["out.z"], 1e-4, 2e-5)

    objective = MaskedObjective(1000, repeats=c["diffusion_batch_mul"], label_dropout=dropout)
    draws = cast(Draws, RecordedTokens(golden, masked, network.tokens))
    z = network(tokens, known, masked, cond)
    loss = objective.losses(model, tokens, masked, z, draws)["loss"].mean()
    assert_near(loss, golden["out.loss"], 5e-5, 1e-5)
    loss.backward()
    gradients = own_names(weights(golden, "grad."))
    found = {n: p.grad for n, p in network.named_parameters()}
    assert gradients.keys() <= found.keys()
    if name.endswith("train"):
        assert gradients.keys() == found.keys()
    for key, value in gradients.items():
        gradient = found[key]
        assert gradient is not None, key
        assert_near(gradient, value, 2e-3, 3e-5)


@pytest.mark.parametrize("name", ["mar_sample", "mar_sample_patch2"])
def test_generation(name: str) -> None:
    model, golden, c = recorded(name)
    model.eval()
    facts, network, batch = document()["cases"][name], model.network, len(golden["in.y"])
    for variant in facts["variants"]:
        sampler = MaskedSampler(
            facts["num_iter"], c["num_sampling_steps"], variant["temperature"], variant["cfg"],
            variant["cfg_schedule"],
        )  # fmt: skip
        blank = torch.zeros(batch, network.tokens, network.token_size)
        draws = RecordedLoop(golden, variant["variant"], batch)
        order = golden["in.orders"]
        *_, last = sampler(model, blank, order, network.tokens, golden["in.y"], draws)
        expected = golden[f"out.v{variant['variant']}.latent"]
        assert relative_error(last.x, expected) < 5e-4
        befores = [before for before, _ in rounds(network.tokens, facts["num_iter"])]
        assert befores == variant["masked_before_each_iteration"]


@pytest.mark.parametrize(
    "plan", document()["sampling_schedule"], ids=lambda plan: f"{plan['num_iter']}"
)
def test_the_schedule(plan: dict[str, Any]) -> None:
    made = rounds(plan["seq_len"], plan["num_iter"])
    assert [a - b for a, b in made] == [count for count in plan["tokens_predicted"] if count]
    scales = [MaskedSampler(guidance=2.9).scale(after, plan["seq_len"]) for _, after in made]
    pairs = zip(plan["cfg_iter_for_cfg_2_9"], plan["tokens_predicted"], strict=True)
    assert scales == pytest.approx([scale for scale, count in pairs if count], abs=1e-6)


def test_more_iterations_than_tokens() -> None:
    assert [a - b for a, b in rounds(5, 100)] == [1] * 5


@pytest.mark.parametrize(
    "part", document()["mask_ratio_distribution"], ids=lambda part: f"{part['mask_ratio_min']}"
)
def test_mask_ratios(part: dict[str, Any]) -> None:
    ratios = [mask_ratio(u, part["mask_ratio_min"]) for u in part["u"]]
    assert ratios == pytest.approx(part["rate"], abs=1e-9)
    assert [math.ceil(256 * ratio) for ratio in ratios] == part["masked_of_256"]
    every = [mask_ratio((k + 0.5) / 2000, part["mask_ratio_min"]) for k in range(2000)]
    assert sum(every) / 2000 == pytest.approx(part["mean"], abs=1e-4)
    assert mask_ratio(0.0, part["mask_ratio_min"]) == pytest.approx(part["mask_ratio_min"])
    assert mask_ratio(1 - 2**-53, 0.7) <= 1


def test_the_autoencoder(tmp_path: Path) -> None:
    """KL-16's kind is diffusers' own: strictly converted, with the recorded numbers."""
    pytest.importorskip("diffusers")
    golden = load("mar", "vae_tiny")
    save_autoencoder(build_autoencoder(weights(golden)), tmp_path / "vae")
    codec = VaeCodec(str(tmp_path / "vae"))
    assert (codec.channels, codec.downsample, codec.scale) == (4, 2, 0.2325)
    vae = codec._load()
    with torch.no_grad():
        moments = vae.encode(golden["in.x"]).latent_dist.parameters
        flipped = vae.encode(golden["in.x"].flip(3)).latent_dist.parameters
        decoded = vae.decode(golden["out.latent"] / codec.scale).sample
    assert_near(moments, golden["out.moments"], 1e-4, 5e-5)
    assert_near(flipped, golden["out.moments_flip"], 1e-4, 5e-5)
    assert_near(decoded, golden["out.decoded"], 1e-4, 5e-5)
    draws = cast(Draws, SimpleNamespace(normal=lambda *_: golden["in.noise"]))
    assert_near(codec.train(moments, draws), golden["out.latent"], 1e-4, 5e-5)
    assert torch.equal(codec.decode(golden["out.latent"]), to_uint8(decoded))


def test_autoencoders_that_are_none_or_others(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    state = weights(load("mar", "vae_tiny"))
    with pytest.raises(CheckpointError, match="not those of a KL autoencoder"):
        build_autoencoder({"a": torch.zeros(1)})
    missing = {name: value for name, value in state.items() if name != "decoder.conv_out.bias"}
    with pytest.raises(CheckpointError, match="do not fit"):
        build_autoencoder(missing)
    # Latent diffusion's own decoder has attention on the way up: it is built, not left out.
    attention = {
        name.replace("encoder.down.1.attn.0", f"decoder.up.1.attn.{block}"): value
        for name, value in state.items()
        if "encoder.down.1.attn.0" in name
        for block in (0, 1)
    }
    assert autoencoder_config(state | attention)["up_block_types"][0] == "AttnUpDecoderBlock2D"
    save_autoencoder(build_autoencoder(state | attention), tmp_path / "other")

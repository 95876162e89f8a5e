"""Checkpoints of MAR and its autoencoder: recorded tensors in the released containers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_cases import load, weights
from mar_case import document, own_names
from released_states import arguments, converted, opened, parameters, write_torch
from typer.testing import CliRunner

from tessera.cli import app
from tessera.convert.assemble import plan_conversion
from tessera.errors import CheckpointError
from tessera.recipes.schema import MarConfig

NAME = "mar_forward_patch2_eval"


@pytest.mark.parametrize("training", [True, False])
def test_mar(tmp_path: Path, training: bool) -> None:
    tensors, config = weights(load("mar", NAME)), document()["cases"][NAME]["config"]
    raw = {name: tensor + 1 for name, tensor in tensors.items()}
    content = {"model": raw, "model_ema": parameters(tensors)}
    options = [f"network.heads={config['encoder_num_heads']}"]
    if training:
        content |= {"optimizer": {}, "epoch": 3, "scaler": {}}
        content["args"] = arguments(
            patch_size=config["patch_size"], vae_stride=16, attn_dropout=0.25, num_iter=8
        )
    else:
        channels = config["vae_embed_dim"] * config["patch_size"] ** 2
        # Without arguments a token is one pixel of more channels.
        options += ["codec.kind=vae", f"codec.channels={channels}"]
    path = write_torch(tmp_path / "checkpoint-last.pth", content)
    (part,) = converted(tmp_path / "made", path, options=tuple(options)).parts
    section = part.recipe.network
    assert isinstance(section, MarConfig)
    assert section.buffer == config["buffer_size"]
    assert section.head_depth == config["diffloss_d"]
    assert [*part.states] == ["ema", "raw"]
    pipe = opened(tmp_path / "made")
    assert pipe.kind == "mar"
    state = pipe.networks()[0].state_dict()
    expected = own_names(tensors)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    if training:
        assert (section.patch, section.attn_dropout) == (config["patch_size"], 0.25)
        assert getattr(part.recipe.sampling, "num_iter", 0) == 8


def test_tokens_that_do_not_fit(tmp_path: Path) -> None:
    content = {"model": weights(load("mar", NAME)), "args": arguments(patch_size=7)}
    path = write_torch(tmp_path / "checkpoint-last.pth", content)
    with pytest.raises(CheckpointError, match="not 7 x 7 pixels"):
        plan_conversion([path])


def test_the_autoencoder(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    golden = load("mar", "vae_tiny")
    path = write_torch(tmp_path / "kl16.ckpt", {"model": weights(golden)})
    plan = plan_conversion([path])
    assert (plan.kind, plan.parts) == ("autoencoder", ())
    plan.write(tmp_path / "vae")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert vae.config.scaling_factor == 0.2325
    result = CliRunner().invoke(app, ["convert", "--inspect", str(path)])
    assert result.exit_code == 0, result.output
    for words in ("KL autoencoder", "torch ZIP", "decoder.conv_out.bias", "kl16"):
        assert words in result.output
    broken = {**weights(golden), "decoder.conv_out.bias": torch.full((3,), torch.nan)}
    with pytest.raises(CheckpointError, match="NaN"):
        plan_conversion([write_torch(tmp_path / "broken.ckpt", {"model": broken})])

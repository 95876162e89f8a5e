"""Models in the forms that other code reads: the same tensors, or equal outputs; or why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from golden_cases import load, weights
from mar_case import document
from released_states import (
    RECORDED,
    arguments,
    as_released,
    close,
    converted,
    opened,
    raw_output,
    write_torch,
)
from torch import Tensor
from typer.testing import CliRunner

from tessera.cli import app
from tessera.conditioning import Conditioning
from tessera.convert.assemble import plan_conversion
from tessera.convert.export import plan_export
from tessera.convert.target import ReleasedFile
from tessera.diffusion.discrete import noise_betas
from tessera.errors import CheckpointError, TesseraError
from tessera.pipelines.base import Pipeline
from tessera.pipelines.loading import build_pipeline
from tessera.recipes.build import build_model
from tessera.recipes.loading import parse_recipe

DISCRETE = {
    "preconditioning": {"kind": "discrete", "prediction": "eps"},
    "objective": {"kind": "discrete"},
    "sampling": {"kind": "ddpm"},
}
ADM = {
    "kind": "adm_unet", "model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1,
    "attn_resolutions": [8], "head_channels": 16, "groups": 32,
}  # fmt: skip
DIT = {"kind": "dit", "patch": 2, "depth": 1, "width": 32, "heads": 2}


def tiny(network: dict[str, Any], classes: int = 3, **sections: Any) -> Pipeline:
    """A pipeline with random weights, on images of 16x16."""
    data = {"resolution": 16, "num_classes": classes}
    recipe = parse_recipe(
        {"name": "tiny", "data": data, "network": network, **{**DISCRETE, **sections}}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(recipe)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return build_pipeline(recipe, model)


def state(pipe: Pipeline) -> dict[str, Tensor]:
    (network,) = pipe.networks()
    return network.state_dict()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether they are the same to the bit."""
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], value) for name, value in expected.items())


def there_and_back(pipe: Pipeline, to: str, folder: Path) -> dict[str, Tensor]:
    """The tensors of the exported file, of which the converter makes the same model again."""
    exported = plan_export(pipe, to)
    assert isinstance(exported, ReleasedFile)
    path = folder / "exported.safetensors"
    exported.write(path)
    (part,) = converted(folder / "back", path, options=exported.options).parts
    assert part.source.container == "safetensors"
    unsaid = {"dropout", "attn_dropout", "decoder_heads"}
    for section in ("network", "preconditioning", "codec", "data"):
        given, back = (
            getattr(recipe, section).model_dump(exclude=unsaid)
            for recipe in (pipe.recipe, part.recipe)
        )
        assert given == back
    assert same(state(opened(folder / "back")), state(pipe))
    return safetensors.torch.load_file(path)


# ------------------------------------------------------------------------------- released names


def test_dit(tmp_path: Path) -> None:
    """The file of the released code, again."""
    source = RECORDED / "dit-released-oldformat.pt"
    converted(tmp_path / "made", source, options=("network.heads=3",))
    found = there_and_back(opened(tmp_path / "made"), "dit", tmp_path)
    assert same(found, torch.load(source, weights_only=True))


def test_heads_of_a_published_size() -> None:
    """The recipe may leave them to the size; the released code must be told."""
    pipe = tiny({"kind": "dit", "size": "S/8", "depth": 1})
    exported = plan_export(pipe, "dit")
    assert isinstance(exported, ReleasedFile)
    assert "network.heads=6" in exported.options


def test_mar(tmp_path: Path) -> None:
    name = "mar_forward_patch2_eval"
    tensors, config = weights(load("mar", name)), document()["cases"][name]["config"]
    content = {"model_ema": tensors, "args": arguments(patch_size=2, vae_stride=16)}
    path = write_torch(tmp_path / "checkpoint-last.pth", content)
    converted(tmp_path / "made", path, options=(f"network.heads={config['encoder_num_heads']}",))
    assert same(there_and_back(opened(tmp_path / "made"), "mar", tmp_path), tensors)


def test_pdm(tmp_path: Path) -> None:
    tensors = {k: v.float() for k, v in weights(load("pdm", "unet_p2_uncond_sigma")).items()}
    options = ("data.resolution=16", "network.head_channels=16", "network.attention_order=split")
    converted(tmp_path / "made", write_torch(tmp_path / "a.pt", tensors), options=options)
    assert same(there_and_back(opened(tmp_path / "made"), "guided-diffusion", tmp_path), tensors)


@pytest.mark.parametrize("order", ["split", "legacy"])
def test_guided_diffusion(tmp_path: Path, order: str) -> None:
    """Attention's rows are written in the order that its code has by default."""
    tensors = safetensors.torch.load_file(RECORDED / "guided-class-cond.safetensors")
    options = ("data.resolution=16", "network.head_channels=16", f"attention_order={order}")
    converted(tmp_path / "made", write_torch(tmp_path / "a.pt", tensors), options=options)
    found = there_and_back(opened(tmp_path / "made"), "guided-diffusion", tmp_path)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in tensors.items()}
    others = {k: v for k, v in tensors.items() if order == "legacy" or ".qkv." not in k}
    assert same({name: found[name] for name in others}, others)
    assert (order == "legacy") == all(torch.equal(found[k], v) for k, v in tensors.items())


# -------------------------------------------------------------------------------------- diffusers


@pytest.mark.parametrize("levels", [{}, {"channel_mult": [1, 2, 3], "attn_resolutions": [16, 4]}])
def test_outputs_of_diffusers(tmp_path: Path, levels: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipe = tiny({**ADM, **levels, "learn_variance": True, "num_blocks": 2})
    exported = plan_export(pipe, "diffusers")
    assert "class 3 of its UNet2DModel is no class" in exported.notes
    exported.write(tmp_path / "made")
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "made" / "unet")
    x, t = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)), [3, 500, 999]
    with torch.no_grad():
        found = unet(x, torch.tensor(t), class_labels=torch.tensor([1, 3, 0])).sample
    assert close(found, as_released(raw_output(pipe, x, torch.tensor(t), torch.tensor([1, 3, 0]))))


@pytest.mark.parametrize(("prediction", "schedule"), [("v", "cosine"), ("x0", "linear0.01")])
def test_steps_of_diffusers(tmp_path: Path, prediction: str, schedule: str) -> None:
    """A whole pipeline of its own; the image that a step aims at is that of our denoiser."""
    diffusers = pytest.importorskip("diffusers")
    process = {"kind": "discrete", "prediction": prediction, "schedule": schedule}
    pipe: Any = tiny(ADM, 0, preconditioning=process)
    plan_export(pipe, "diffusers").write(tmp_path / "made")
    theirs = diffusers.DDPMPipeline.from_pretrained(tmp_path / "made")
    betas = noise_betas(schedule, 1000)
    assert torch.allclose(theirs.scheduler.betas, betas.float(), rtol=1e-4, atol=0)
    x, t = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)), 300
    alpha_bar = (1 - betas).cumprod(0)[t]
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt().float()
    theirs.scheduler.register_to_config(clip_sample=False)
    with torch.no_grad():
        output = theirs.unet(x, t).sample
        aim = theirs.scheduler.step(output, t, x).pred_original_sample
        mean = pipe.denoiser(x / alpha_bar.sqrt().float(), sigma[None], Conditioning()).mean
    assert close(aim, mean)


def test_only_exports_are_replaced(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    exported = plan_export(tiny(ADM, 0), "diffusers")
    (tmp_path / "mine").mkdir()
    for _ in range(2):
        exported.write(tmp_path / "made", overwrite=True)
    for folder, overwrite in (("made", False), ("mine", True)):
        with pytest.raises(TesseraError, match="exists already"):
            exported.write(tmp_path / folder, overwrite=overwrite)


# ------------------------------------------------------------------------- what has no counterpart


@pytest.mark.parametrize(
    ("to", "network", "sections", "why"),
    [
        ("dit", ADM, {}, "its network is adm_unet, not dit"),
        ("mar", DIT, {}, "its network is dit, not mar"),
        ("guided-diffusion", DIT, {}, "neither adm_unet nor patched_unet"),
        ("guided-diffusion", {**ADM, "groups": 16}, {}, "groups of 16"),
        ("guided-diffusion", {"kind": "patched_unet", "patch_size": 2, "model_channels": 32,
                              "channel_mult": [1], "groups": None}, {}, "network.groups=32 only"),
        ("guided-diffusion", {**ADM, "channel_mult_emb": 2}, {}, "channel_mult_emb=2, not 4"),
        ("diffusers", DIT, {}, "at other frequencies than DiT"),
        ("diffusers", {**ADM, "head_channels": 64, "heads": 2, "attn_resolutions": [16, 8]}, {},
         "heads of attention differ in width"),
        ("diffusers", {**ADM, "channel_mult": [2, 2]}, {}, "first level is not as wide"),
        ("diffusers", {**ADM, "groups": None, "channel_mult": [1, 4]}, {}, "differ in their group"),
        ("diffusers", ADM, {"preconditioning": {"kind": "discrete", "spacing": "250"}}, "number"),
        ("dit", DIT, {"preconditioning": {"kind": "discrete", "prediction": "v"}}, "predicts v"),
        ("dit", DIT, {"preconditioning": {"kind": "edm"}, "objective": {"kind": "edm"},
                      "sampling": {"kind": "edm"}}, "preconditioned as edm"),
        ("pdm", DIT, {}, "Choose dit, mar, guided-diffusion, diffusers"),
    ],
)  # fmt: skip
def test_refused(to: str, network: dict[str, Any], sections: dict[str, Any], why: str) -> None:
    with pytest.raises(TesseraError, match=why):
        plan_export(tiny(network, **sections), to)


# ------------------------------------------------------------------------------ command, container


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [*map(str, words)])


def test_the_command(tmp_path: Path) -> None:
    pipe = tiny(DIT)
    pipe.save(tmp_path / "made")
    path = tmp_path / "dit.safetensors"
    result = run("export", tmp_path / "made", path, "--to", "dit")
    assert result.exit_code == 0, result.output
    assert "network.heads=2" in result.output
    assert same(safetensors.torch.load_file(path), dict(plan_export(pipe, "dit").tensors))  # type: ignore[attr-defined]
    path.write_bytes(b"mine")
    again = run("export", tmp_path / "made", path, "--to", "dit")
    assert "--overwrite" in str(again.exception)
    assert path.read_bytes() == b"mine"
    run("export", tmp_path / "made", path, "--to", "dit", "--overwrite")
    assert path.stat().st_size > 1000
    other = run("export", tmp_path / "made", tmp_path / "dit.pt", "--to", "dit")
    assert "end the name so" in str(other.exception)
    other = run("export", tmp_path / "made", path, "--to", "dit", "--ema", "7")
    assert "7" in str(other.exception)


@pytest.mark.parametrize("damage", ["cut", "type", "offsets", "shape"])
def test_damaged_safetensors(tmp_path: Path, damage: str) -> None:
    exported: Any = plan_export(tiny(DIT), "dit")
    exported.write(tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    data = {
        "cut": data[:-100],
        "type": data.replace(b'"F32"', b'"F99"', 1),
        "offsets": data.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1),
        "shape": data.replace(b'"shape":[', b'"shape":[7,', 1)[:-2],
    }[damage]
    path = tmp_path / "b.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot be converted"):
        plan_conversion([path], options=exported.options)

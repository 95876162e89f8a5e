"""Checkpoints of every family as pipelines: recorded outputs, what is said, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from golden_cases import case, load, weights
from released_files import Persistent, network, recorded_file, write_snapshot, write_state
from released_states import (
    RECORDED,
    arguments,
    as_released,
    close,
    converted,
    opened,
    parameters,
    raw_output,
    recorded_case,
    write_torch,
)
from torch import Tensor
from typer.testing import CliRunner

from tessera.cli import app
from tessera.conditioning import Conditioning
from tessera.convert.assemble import plan_conversion
from tessera.convert.run import read_source
from tessera.diffusion.guidance import Guided
from tessera.diffusion.preconditioning import Preconditioned
from tessera.errors import CheckpointError, RecipeError, TesseraError
from tessera.networks.adm_unet import AdmUNet
from tessera.networks.lego import Lego
from tessera.recipes.schema import (
    BlurObjectiveConfig,
    EnergyDiTConfig,
    LegoConfig,
    PatchedUNetConfig,
)

DIT = RECORDED / "dit-released-oldformat.pt"
LEGO = RECORDED / "lego-pg-cond-network-snapshot-000128.pkl"
GUIDED = ("data.resolution=16", "network.head_channels=16", "attention_order=split")


def dit_tensors() -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(DIT, weights_only=True)
    return found


def guided_tensors() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The network, of whose classes those of the recorded call are stored alone."""
    tensors = safetensors.torch.load_file(RECORDED / "guided-class-cond.safetensors")
    call = recorded_case("guided-class-cond")["calls"][0]
    rows = tensors["label_emb.weight"]
    tensors["label_emb.weight"] = torch.zeros(1000, rows.shape[1])
    tensors["label_emb.weight"][call["inputs"]["y"]] = rows
    return tensors, call


# ------------------------------------------------------------------------------- recorded files


def test_lego(tmp_path: Path) -> None:
    recorded = recorded_case("lego-pg-cond")
    plan = converted(tmp_path / "made", LEGO)
    (part,) = plan.parts
    section = part.recipe.network
    assert isinstance(section, LegoConfig)
    assert [b.model_dump() for b in section.bricks] == [
        {"size": b["side"], "patch": b["patch"], "depth": b["depth"]}
        for b in recorded["config"]["bricks"]
    ]
    assert (section.width, section.heads, section.positions) == (32, 2, "learned")
    assert part.parameters == recorded["config"]["parameters"]
    pipe = opened(tmp_path / "made")
    denoiser: Any = pipe.model
    stack = denoiser.network
    assert isinstance(stack, Lego)
    for call in [c for c in recorded["calls"] if c["weights"] == "ema"]:
        given, cond = call["inputs"], Conditioning(labels=call["inputs"]["class_labels"].argmax(1))
        model = denoiser
        if "return_stage_idx" in call["call"]:
            bricks = 1 + int(call["call"].split("return_stage_idx=")[1][0])
            model = Preconditioned(stack.prefix(bricks), denoiser.preconditioning, pipe.model.shape)
        if "cfg_scale" in call["call"]:
            model = Guided(denoiser, 1.5)
        with torch.no_grad():
            mean = model(given["x"], given["sigma"], cond).mean
        assert close(mean, call["outputs"]["D"]), call["call"]


@pytest.mark.parametrize("container", ["old", "zip", "training"])
def test_dit(tmp_path: Path, container: str) -> None:
    path = DIT
    if container == "zip":
        path = write_torch(tmp_path / "dit.pt", dit_tensors())
    if container == "training":
        raw = {name: tensor + 1 for name, tensor in dit_tensors().items()}
        content = {"model": raw, "ema": dit_tensors(), "opt": {"state": {}}}
        content["args"] = arguments(model="DiT-XL/2", global_batch_size=256, vae="mse")
        path = write_torch(tmp_path / "0050000.pt", content)
    part = converted(tmp_path / "made", path, options=("network.heads=3",)).parts[0]
    assert [*part.states] == (["ema", "raw"] if container == "training" else ["ema"])
    assert part.images_seen == (50_000 * 256 if container == "training" else 0)
    assert part.settled.origins["options"] == ("network.heads=3",)
    assert "network.width=48" in part.settled.origins["shapes of tensors"]
    assert "preconditioning.prediction=eps" in part.settled.origins["defaults of the released code"]
    pipe = opened(tmp_path / "made")
    call = recorded_case("dit-released")["calls"][0]
    given = call["inputs"]
    output = as_released(raw_output(pipe, given["x"], given["t"], given["y"]))
    assert close(output, call["outputs"]["out"])
    if container == "training":
        state = opened(tmp_path / "made", "raw").networks()[0].state_dict()
        assert torch.equal(state["x_embedder.proj.bias"], raw["x_embedder.proj.bias"])


@pytest.mark.parametrize("old", [True, False])
def test_guided_diffusion(tmp_path: Path, old: bool) -> None:
    tensors, call = guided_tensors()
    path = write_torch(tmp_path / "ema.pt", tensors, old=old)
    part = converted(tmp_path / "made", path, options=GUIDED).parts[0]
    assert part.parameters == recorded_case("guided-class-cond")["config"]["parameters"]
    given = call["inputs"]
    output = raw_output(opened(tmp_path / "made"), given["x"], given["t"], given["y"])
    assert close(as_released(output), call["outputs"]["out"])


def test_the_legacy_order_of_attention(tmp_path: Path) -> None:
    """The same network with rows of q, k and v head by head."""
    tensors, call = guided_tensors()
    for name, tensor in tensors.items():
        if ".qkv." in name:
            parts = tensor.reshape(3, len(tensor) // 48, 16, *tensor.shape[1:])
            tensors[name] = parts.transpose(0, 1).reshape(tensor.shape)
    path = write_torch(tmp_path / "ema.pt", tensors)
    options = (*GUIDED[:2], "attention_order=legacy")
    converted(tmp_path / "made", path, options=options)
    given = call["inputs"]
    output = raw_output(opened(tmp_path / "made"), given["x"], given["t"], given["y"])
    assert close(as_released(output), call["outputs"]["out"])


@pytest.mark.parametrize(
    "name", ["energy_mean_pool", "energy_linear_then_mean_mult", "dit_plain_p1"]
)
@pytest.mark.parametrize("alpha", [True, False])
def test_energy_diffusion(tmp_path: Path, name: str, alpha: bool) -> None:
    golden, config = load("energy", name), case("energy", name)["config"]
    energy = "energy" in name
    tensors = {f"dit.{key}": value for key, value in weights(golden).items()}
    tensors |= {"alpha": torch.tensor(0.25)} if alpha else {}
    content = {"model": parameters({k: v + 1 for k, v in tensors.items()}), "epoch": 3}
    content |= {"model_ema": parameters(tensors), "optimizer": {"state": {}}, "scaler": {}}
    content["args"] = arguments(
        energy_grad_multiplier=float(config.get("energy_gradient_multiplier", 1)),
        linear_then_mean=bool(config.get("linear_then_mean")),
        diffusion_timesteps=500, use_innerloop_opt=True, mcmc_step_size=0.125,
        num_sampling_steps="20",
    )  # fmt: skip
    path = write_torch(tmp_path / "checkpoint-last.pth", content)
    heads = f"network.heads={config['num_heads']}"
    plan = converted(tmp_path / "made", path, options=(heads,))
    (part,) = plan.parts
    assert [*part.states] == ["ema", "raw"]
    assert part.recipe.preconditioning.timesteps == 500
    dead = "dit.final_layer.linear.weight" in part.ignored
    assert dead == energy
    pipe = opened(tmp_path / "made")
    (net,) = pipe.networks()
    if energy:
        assert isinstance(part.recipe.network, EnergyDiTConfig)
        assert net.state_dict()["alpha"].tolist() == [0.25 if alpha else 0.125]
        assert part.recipe.sampling.refine is not None
    else:
        assert ("alpha" in part.ignored) == alpha
    output = raw_output(pipe, golden["in.x"], golden["in.t"], golden["in.y"])
    assert close(output, golden["out.eps"])


def pdm_file(folder: Path, name: str = "ema_0.5_000003.pt", shift: float = 0) -> Path:
    """A recorded network of PDM in a file of its own."""
    tensors = {
        k: v.float() + shift for k, v in weights(load("pdm", "unet_p2_uncond_sigma")).items()
    }
    return write_torch(folder / name, parameters(tensors))


PDM = ("data.resolution=16", "network.head_channels=16", "network.attention_order=split")


def test_pdm(tmp_path: Path) -> None:
    golden = load("pdm", "unet_p2_uncond_sigma")
    sources = pdm_file(tmp_path), pdm_file(tmp_path, "model000003.pt", 1)
    (part,) = converted(tmp_path / "made", *sources, options=PDM).parts
    assert [*part.states] == ["ema", "raw"]
    section = part.recipe.network
    assert isinstance(section, PatchedUNetConfig)
    assert (section.patch_size, section.num_blocks, section.channel_mult) == (2, 2, (1, 2))
    assert (section.attn_resolutions, section.learn_variance) == ((8, 4), True)
    output = raw_output(opened(tmp_path / "made"), golden["in.x"], golden["in.t"], None)
    assert close(output, golden["out.model"])
    raw = opened(tmp_path / "made", "raw").networks()[0].state_dict()
    assert torch.equal(raw["out.2.bias"], part.states["ema"]["out.2.bias"] + 1)


def test_experts(tmp_path: Path) -> None:
    sources = pdm_file(tmp_path, "a.pt"), pdm_file(tmp_path, "b.pt", 0.01)
    plan = converted(tmp_path / "made", *sources, options=(*PDM, "snr_splits=0.25"))
    assert (plan.kind, [part.recipe.expert for part in plan.parts]) == ("experts", [0, 1])
    pipe = opened(tmp_path / "made")
    assert pipe.kind == "experts"
    assert pipe.sample([0], steps=2).shape == (1, 16, 16, 3)
    with pytest.raises(CheckpointError, match=r"snr_splits=0\.25"):
        plan_conversion(sources, options=PDM)


def test_patch_diffusion(tmp_path: Path) -> None:
    golden, config = load("patch", "net_implicit"), case("patch", "net_implicit")["config"]
    given = {k: v for k, v in config.items() if k not in ("precond", "note")}
    tensors = weights(golden)
    path = write_snapshot(tmp_path / "a.pkl", network("Patch_EDMPrecond", tensors, **given))
    (part,) = converted(tmp_path / "made", path).parts
    assert part.recipe.coord_frequencies == 0
    assert part.recipe.view.crops
    pipe = opened(tmp_path / "made")
    denoiser: Any = pipe.model
    for index, sigma in enumerate(golden["in.sigmas"]):
        x = golden["in.images"] + golden["in.p16.noise"] * sigma
        cond = Conditioning(coords=golden["out.p16.pos"])
        with torch.no_grad():
            mean = denoiser(x, sigma.expand(len(x)), cond).mean
        assert close(mean, golden[f"out.p16.D.{index}"])
    other = network("Patch_EDMPrecond", tensors, **given | {"out_channels": 3})
    with pytest.raises(CheckpointError, match="two more than it puts out"):
        plan_conversion([write_snapshot(tmp_path / "b.pkl", other)])


def relay_files(folder: Path, **loss: Any) -> tuple[Path, Path]:
    """Two stages; the second with its loss if arguments of it are given."""
    first = recorded_file("container-network-snapshot.pkl", folder, "first.pkl")
    own = AdmUNet(16, 3, 3, 4, model_channels=16, channel_mult=(1, 2), num_blocks=1,
                  attn_resolutions=())  # fmt: skip
    tensors = {f"model.{name}": value for name, value in own.state_dict().items()}
    net = network(
        "EDMPrecond", tensors, img_resolution=16, img_channels=3, label_dim=4, eff_attn=True,
        model_type="DhariwalUNet", model_channels=16, channel_mult=[1, 2], num_blocks=1,
        attn_resolutions=[],
    )  # fmt: skip
    if loss:
        blur = Persistent("BlurLoss", _init_kwargs=loss)
        return first, write_snapshot(folder / "second.pkl", net, loss_fn=blur)
    return first, write_state(folder / "second.pt", net, ema=net, step=128_000)


@pytest.mark.parametrize("loss", [{}, {"up_scale": 2, "blur_sigma_max": 2.5}])
def test_relay(tmp_path: Path, loss: dict[str, Any]) -> None:
    plan = converted(tmp_path / "made", *relay_files(tmp_path, **loss))
    assert plan.kind == "relay"
    objective = plan.parts[1].recipe.objective
    assert isinstance(objective, BlurObjectiveConfig)
    assert (objective.block, objective.blur_sigma_max) == (2, 2.5 if loss else 3)
    assert objective.block_scale == (0 if loss else 0.15)
    assert [*plan.parts[1].states] == (["ema"] if loss else ["ema", "raw"])
    assert plan.parts[1].images_seen == (0 if loss else 128_000)
    notes = " ".join(plan.parts[1].notes)
    assert ("does not say how images were blurred" in notes) == (not loss)
    pipe = opened(tmp_path / "made")
    assert pipe.sample([0], labels=1, **{"first.steps": 2, "second.steps": 3}).shape[1] == 16


def test_options_of_one_stage(tmp_path: Path) -> None:
    sources = relay_files(tmp_path)
    plan = plan_conversion(sources, options=["second.objective.prob_length=0.89"])
    assert getattr(plan.parts[1].recipe.objective, "prob_length", 0) == 0.89
    (part,) = plan_conversion(sources[1:], options=["stage=second", "objective.block=4"]).parts
    assert part.recipe.start_shape == (3, 4, 4)
    (part,) = plan_conversion(sources[1:]).parts
    assert part.recipe.start_shape is None


# ---------------------------------------------------------------------------- what is not said


def test_what_the_file_does_not_say() -> None:
    for path, options, message in (
        (DIT, [], r"network\.heads=\.\.\. \(number of attention heads; divides 48\)"),
        (DIT, ["network.heads=5"], "multiple of heads"),
        (DIT, ["preset=dit-b-imagenet256-latent"], "is another network: .*network.depth is 2 in"),
        (DIT, ["preset=nothing"], "no recipe is called 'nothing'"),
        (DIT, ["network.heads"], "no such file"),
        (DIT, ["network.heads=3", "network.depth=3"], "tensors missing"),
        (DIT, ["network.heads=3", "magic=3"], "magic"),
    ):
        words = [word for word in options if "=" in word]
        sources = [path, *(Path(word) for word in options if "=" not in word)]
        with pytest.raises(TesseraError, match=message):
            plan_conversion(sources, options=words)


def test_flags_of_guided_diffusion(tmp_path: Path) -> None:
    tensors, _ = guided_tensors()
    path = write_torch(tmp_path / "ema.pt", tensors)
    with pytest.raises(CheckpointError) as error:
        plan_conversion([path])
    for word in ("data.resolution=", "network.head_channels=", "attention_order="):
        assert word in str(error.value)
    # A published one is known by its name.
    named = write_torch(tmp_path / "64x64_diffusion.pt", tensors)
    settled = read_source(named, options=["data.resolution=16", "network.head_channels=16"])
    recipe = settled.settled().recipe
    assert getattr(recipe.preconditioning, "schedule", "") == "cosine"
    for change, message in (
        ({"input_blocks.1.0.emb_layers.1.weight": torch.zeros(32, 128)}, "use_scale_shift_norm"),
        ({"out.2.weight": torch.zeros(5, 32, 3, 3)}, "puts out 5 channels"),
        ({"input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3)}, "takes 4 channels"),
        ({"extra": torch.zeros(1)}, r"1 tensors unknown \(extra\)"),
        ({"label_emb.weight": torch.zeros(7)}, "label_emb.weight has the shape"),
        ({"out.0.bias": torch.full((32,), torch.nan)}, "NaN"),
    ):
        changed = write_torch(tmp_path / "changed.pt", {**tensors, **change})
        with pytest.raises((CheckpointError, RecipeError), match=message):
            plan_conversion([changed], options=GUIDED)


def test_kinds(tmp_path: Path) -> None:
    assert read_source(DIT).family.kind == "dit"
    assert read_source(LEGO, "lego").family.kind == "lego"
    snapshot = recorded_file("container-network-snapshot.pkl", tmp_path)
    assert read_source(snapshot).family.kind == "edm"
    assert read_source(snapshot, "relay").family.kind == "relay"
    for path, kind, message in (
        (DIT, "edm", "is not of the kind edm"),
        (DIT, "magic", "there is none. Choose patch, lego"),
        (write_torch(tmp_path / "a.pt", {"x": 3}), None, "holds x, which is of no kind"),
        (write_torch(tmp_path / "b.pt", [1]), None, "holds a list and no network"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_source(path, kind)


# ------------------------------------------------------------------------------------- command


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [*map(str, words)])


def test_inspect(tmp_path: Path) -> None:
    result = run("convert", "--inspect", DIT)
    assert result.exit_code == 0
    assert "still open" in result.output
    for words in ("x_embedder.proj.weight", "48 x 4 x 2 x 2", "ema: 32 tensors", "old torch file"):
        assert words in result.output
    result = run("convert", "--inspect", DIT, "network.heads=3")
    assert "from shapes of tensors" in result.output
    assert "still open" not in result.output


def test_the_command(tmp_path: Path) -> None:
    result = run("convert", DIT, tmp_path / "made", "network.heads=3")
    assert result.exit_code == 0, result.output
    for words in ("DiT", "106,688", "from options", "network.heads=3", "written to"):
        assert words in result.output
    again = run("convert", DIT, tmp_path / "made", "network.heads=3")
    assert "exists already" in str(again.exception)
    alone = run("convert", DIT)
    assert "--inspect" in str(alone.exception)


@pytest.mark.parametrize("name", ["model.pkl", "model.pt", "checkpoint-last.pth", "model"])
def test_commands_that_take_pipelines_name_this_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(DIT.read_bytes())
    for words in (["sample", path], ["bricks", path, tmp_path / "a.png"]):
        error = run(*words).exception
        assert f"tessera convert {path}" in str(error)
    with pytest.raises(CheckpointError, match="tessera convert"):
        opened(path)


def test_copies_in_half_precision(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in dit_tensors().items()}
    path = write_torch(tmp_path / "half.pt", half)
    (part,) = plan_conversion([path], options=["network.heads=3"]).parts
    state = part.states["ema"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert torch.equal(state["pos_embed"], half["pos_embed"].float())

"""EDM's checkpoints as pipelines: exact weights, the same denoiser, recipes, errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from golden_cases import case, load, recorded_conditioning, relative_error, weights
from released_files import (
    SNAPSHOT,
    STATE,
    Persistent,
    network,
    recorded_file,
    write_snapshot,
    write_state,
)
from torch import Tensor
from typer.testing import CliRunner

import tessera
from tessera.cli import app
from tessera.convert.assemble import plan_conversion
from tessera.convert.checkpoint import CheckpointFile, Settings
from tessera.convert.families import find_family
from tessera.convert.records import ClosedObject
from tessera.convert.run import Part, Read, describe_source
from tessera.errors import CheckpointError, RecipeError, TesseraError
from tessera.networks.adm_unet import AdmUNet
from tessera.recipes.loading import shipped
from tessera.recipes.schema import (
    AdmUNetConfig,
    EdmObjectiveConfig,
    EdmPreconditioningConfig,
    IddpmPreconditioningConfig,
    Recipe,
    SongUNetConfig,
    VeObjectiveConfig,
    VePreconditioningConfig,
    VpPreconditioningConfig,
)

NETWORKS = ["net_ddpmpp", "net_ncsnpp", "net_adm", "net_songskip"]
CLASSES = {"edm": "EDMPrecond", "vp": "VPPrecond", "ve": "VEPrecond"}


def convert(dest: Path, *sources: Path) -> Part:
    """Write a pipeline of one or two checkpoints."""
    plan = plan_conversion(sources)
    plan.write(dest)
    return plan.parts[0]


def recorded_weights(kind: str) -> dict[str, Tensor]:
    return weights(load("edm", "train"), f"out.{kind}.model.")


def same(folder: Path, file: str, expected: dict[str, Tensor]) -> bool:
    state = safetensors.torch.load_file(folder / file)
    return state.keys() == expected.keys() and all(
        torch.equal(state[name], value) for name, value in expected.items()
    )


@pytest.mark.parametrize(
    ("file", "name", "images"),
    [(SNAPSHOT, "ema", 0), (STATE, "net", 0), (SNAPSHOT, "ema", 2_500_000)],
)
def test_recorded_files(tmp_path: Path, file: str, name: str, images: int) -> None:
    path = recorded_file(file, tmp_path, "network-snapshot-002500.pkl" if images else None)
    made = convert(tmp_path / "made", path)
    assert same(tmp_path / "made", "model.safetensors", recorded_weights(name))
    assert [*made.states] == ["ema" if name == "ema" else "raw"]
    assert made.parameters == sum(
        value.numel()
        for key, value in recorded_weights(name).items()
        if not key.endswith("resample_filter")
    )
    pipe = tessera.load(tmp_path / "made", device="cpu")
    assert (pipe.ema, pipe.images_seen) == (next(iter(made.states)), images)
    assert pipe.recipe.shape == (3, 8, 8)
    assert pipe.recipe.data.num_classes == 4
    assert pipe.recipe.data.path is None
    assert pipe.recipe.augment is not None
    # Only the snapshot knows how strong the augmentation was.
    assert pipe.recipe.augment.p == (0.5 if name == "ema" else 0.12)
    images_made = pipe.sample("0-2", labels=1, steps=2)
    assert images_made.shape == (3, 8, 8, 3)


def test_average_and_trained_weights_together(tmp_path: Path) -> None:
    snapshot = recorded_file(SNAPSHOT, tmp_path, "network-snapshot-000001.pkl")
    state = recorded_file(STATE, tmp_path, "training-state-000001.pt")
    made = convert(tmp_path / "made", state, snapshot)
    assert [*made.states] == ["ema", "raw"]
    assert same(tmp_path / "made", "model.safetensors", recorded_weights("ema"))
    assert same(tmp_path / "made", "model-raw.safetensors", recorded_weights("net"))
    averaged, raw = (tessera.load(tmp_path / "made", ema=name) for name in ("ema", "raw"))
    assert averaged.images_seen == raw.images_seen == 1000
    assert (averaged.sample([0], labels=1, steps=2) != raw.sample([0], labels=1, steps=2)).any()


def arguments(name: str) -> dict[str, Any]:
    """The constructor arguments of a recorded network."""
    config = case("edm", name)["config"]
    return {k: v for k, v in config.items() if k != "note"}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_denoiser(tmp_path: Path, name: str, kind: str) -> None:
    golden = load("edm", name)
    tensors = {f"model.{k}": v for k, v in weights(golden).items()}
    net = network(CLASSES[kind], tensors, **arguments(name))
    convert(tmp_path / "made", write_snapshot(tmp_path / "a.pkl", net))
    denoiser = tessera.load(tmp_path / "made", device="cpu").denoiser
    if kind == "vp":
        assert denoiser.sigma_min == 0.0009765625
    cond = recorded_conditioning(golden)
    with torch.no_grad():
        for index, sigma in enumerate(golden["in.sigmas"]):
            z = golden["in.x"] * sigma.clamp(min=0.5)
            mean = denoiser(z, sigma, cond).mean
            assert relative_error(mean, golden[f"out.{kind}.{index}"]) <= 2e-5


def iddpm(**changes: Any) -> Persistent:
    tensors = weights(load("edm", "iddpm"))
    return network("iDDPMPrecond", tensors | changes, **arguments("iddpm"))


def test_improved_ddpm(tmp_path: Path) -> None:
    golden = load("edm", "iddpm")
    # At 8x8 its attention is 32 channels wide, which the released network leaves out.
    convert(tmp_path / "made", write_snapshot(tmp_path / "a.pkl", iddpm()))
    pipe = tessera.load(tmp_path / "made", device="cpu")
    assert pipe.recipe.network.attn_resolutions == ()
    cond = recorded_conditioning(golden)
    with torch.no_grad():
        for index, sigma in enumerate(golden["in.sigmas"]):
            mean = pipe.denoiser(golden["in.x"] * sigma.clamp(min=0.5), sigma, cond).mean
            assert relative_error(mean, golden[f"out.iddpm.{index}"]) <= 2e-5


@pytest.mark.parametrize("width", [96, 160])
def test_attention_at_widths_between_multiples_of_64(tmp_path: Path, width: int) -> None:
    """The released network takes width // 64 heads there."""
    own = AdmUNet(
        8, 3, 3, model_channels=width, channel_mult=(1, 1), num_blocks=1, attn_resolutions=(8,)
    )
    tensors = {f"model.{name}": value for name, value in own.state_dict().items()}
    net = network(
        "EDMPrecond", tensors, img_resolution=8, img_channels=3, label_dim=0,
        model_type="DhariwalUNet", model_channels=width, channel_mult=[1, 1], num_blocks=1,
        attn_resolutions=[8],
    )  # fmt: skip
    convert(tmp_path / "made", write_snapshot(tmp_path / "a.pkl", net))
    pipe = tessera.load(tmp_path / "made", device="cpu")
    assert pipe.recipe.network.attn_resolutions == (8,)
    assert pipe.networks()[0].enc["8x8_block0"].heads == width // 64
    assert pipe.sample([0], steps=1).shape == (1, 8, 8, 3)


# ------------------------------------------------------------------------------------- the recipe


def record(class_name: str, state: dict[str, Any] | None = None, **arguments: Any) -> ClosedObject:
    """A closed object that was made with these arguments."""
    made = ClosedObject()
    made.class_name = class_name
    made.state = {"_init_args": (), "_init_kwargs": arguments, **(state or {})}
    return made


SIZE = {"img_resolution": 32, "img_channels": 3}


def described(net: ClosedObject, name: str = "a.pkl", **parts: Any) -> Read:
    """What is found in a network snapshot with these parts."""
    source = CheckpointFile(Path(name), {"ema": net, **parts}, "pickle")
    return describe_source(source, find_family(source), Settings())


def recipe_of(net: ClosedObject, name: str = "a.pkl", **parts: Any) -> Recipe:
    return described(net, name, **parts).settled().recipe


def test_arguments_that_were_left_out() -> None:
    """The released constructors' defaults."""
    song = SongUNetConfig(
        model_channels=128, channel_mult=(1, 2, 2, 2), channel_mult_emb=4, num_blocks=4,
        attn_resolutions=(16,), dropout=0.10, embedding="positional", channel_mult_noise=1,
        encoder="standard", decoder="standard", resample_filter=(1, 1),
    )  # fmt: skip
    adm = AdmUNetConfig(
        model_channels=192, channel_mult=(1, 2, 3, 4), channel_mult_emb=4, num_blocks=3,
        attn_resolutions=(32, 16, 8), dropout=0.10,
    )  # fmt: skip
    for class_name, unet, scaling in (
        ("EDMPrecond", adm, EdmPreconditioningConfig(sigma_data=0.5)),
        ("VPPrecond", song, VpPreconditioningConfig(beta_d=19.9, beta_min=0.1, timesteps=1000,
                                              epsilon_t=1e-5, released_sigma_min=True)),
        ("VEPrecond", song, VePreconditioningConfig(sigma_min=0.02, sigma_max=100)),
        ("iDDPMPrecond", adm, IddpmPreconditioningConfig(c_1=0.001, c_2=0.008, timesteps=1000)),
    ):  # fmt: skip
        recipe = recipe_of(record(class_name, **SIZE))
        assert recipe.network == unet
        assert recipe.preconditioning == scaling
        assert (recipe.data.num_classes, recipe.augment) == (0, None)
        assert recipe.training.precision == "fp32"


def test_what_it_was_trained_by() -> None:
    net = record(
        "EDMPrecond", **SIZE, model_type="SongUNet", augment_dim=4, label_dim=7,
        label_dropout=0.1, use_fp16=True, sigma_min=0, sigma_max=float("inf"), sigma_data=0.25,
    )  # fmt: skip
    recipe = recipe_of(
        net,
        loss_fn=record("EDMLoss", P_mean=-1.0),
        augment_pipe=record("AugmentPipe", p=0.2, xflip=1e8, rotate_int=1, lumaflip=1),
        dataset_kwargs={"xflip": True, "path": "/somewhere/else.zip"},
    )
    assert recipe.preconditioning == EdmPreconditioningConfig(sigma_data=0.25)
    assert recipe.objective == EdmObjectiveConfig(p_mean=-1.0, label_dropout=0.1)
    assert recipe.augment is not None
    assert (recipe.augment.p, recipe.augment.yflip, recipe.augment.scale_std) == (0.2, 0, 0.2)
    assert recipe.augment_dim == 4
    assert recipe.training.precision == "fp16"
    assert recipe.data.xflip
    assert "somewhere" not in recipe.model_dump_json()
    recipe = recipe_of(record("VEPrecond", **SIZE), loss_fn=record("VELoss"))
    assert recipe.objective == VeObjectiveConfig()


def test_exact_smallest_noise_level_is_kept() -> None:
    net = record("VPPrecond", {"sigma_min": 0.00100050}, **SIZE)
    recipe = recipe_of(net)
    assert recipe.preconditioning == VpPreconditioningConfig(released_sigma_min=False)


def released_arguments(name: str) -> tuple[str, dict[str, Any]]:
    """(file name, arguments) of a published model."""
    recipe = shipped()[name]()
    unet = recipe.network
    assert isinstance(unet, SongUNetConfig | AdmUNetConfig)
    names = {"embedding": "embedding_type", "encoder": "encoder_type", "decoder": "decoder_type"}
    own = {"kind", "implicit_mlp", "head_channels", "heads", "groups", "learn_variance"}
    section = unet.model_dump(exclude=own)
    options = {names.get(key, key): value for key, value in section.items()}
    file = re.sub(r"(ffhq|afhqv2|imagenet)-?64-", r"\1-64x64-uncond-", name)
    file = file.replace("cifar10", "cifar10-32x32").replace("uncond-adm", "cond-adm")
    return f"{file}.pkl", {
        "img_resolution": recipe.data.resolution,
        "img_channels": 3,
        "label_dim": recipe.data.num_classes,
        "augment_dim": recipe.augment_dim,
        "model_type": "SongUNet" if isinstance(unet, SongUNetConfig) else "DhariwalUNet",
        **options,
    }


PUBLISHED = [name for name in shipped() if name.startswith("edm-")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    file, options = released_arguments(name)
    settled = described(record("EDMPrecond", **options), file).settled()
    base = shipped()[name]()
    assert settled.published == name
    assert settled.recipe.sampling == base.sampling
    assert settled.recipe.training == base.training
    other = described(record("EDMPrecond", **options | {"num_blocks": 2}), file).settled()
    assert other.published is None
    assert other.recipe.network.num_blocks == 2


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("net", "parts", "message"),
    [
        (record("EDMPrecond", **SIZE, magic=1), {}, "made with magic=1"),
        (record("EDMPrecond", **SIZE, sigma_min=0.1), {}, "made with sigma_min=0.1"),
        (record("EDMPrecond", img_channels=3), {}, "without img_resolution"),
        (record("EDMPrecond", {"_init_args": (32,)}, **SIZE), {}, "say by name how its EDMPrecond"),
        (record("EDMPrecond", **SIZE, model_type="UViT"), {}, "is a UViT; those of EDM are SongU"),
        (record("EDMPrecond", **SIZE), {"loss_fn": record("XLoss")}, "trained by a XLoss"),
        (
            record("EDMPrecond", **SIZE),
            {"loss_fn": record("EDMLoss", x=1)},
            "EDMLoss was made with x",
        ),
        (record("EDMPrecond", **SIZE, augment_dim=5), {}, "5 augmentation labels"),
        (
            record("EDMPrecond", **SIZE, augment_dim=9),
            {"augment_pipe": record("AugmentPipe", xflip=1)},
            "9 augmentation labels, and the augmentation 1",
        ),
    ],
)
def test_what_is_not_known(net: ClosedObject, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        recipe_of(net, "folder/odd.pkl", **parts)
    assert "odd.pkl" in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"img_resolution": "x"}, {"model_type": []}, {"channel_mult": 3},
                {"attn_resolutions": None}, {"img_channels": 7}, {"label_dim": -1},
                {"img_resolution": 30}, {"model_channels": 1e99}],
)  # fmt: skip
@pytest.mark.parametrize("model_type", ["SongUNet", "DhariwalUNet"])
def test_configurations_that_make_no_sense(
    tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    net = network("EDMPrecond", {}, **{**SIZE, "model_type": model_type, **changes})
    with pytest.raises((CheckpointError, RecipeError), match=r"a\.pkl"):
        convert(tmp_path / "made", write_snapshot(tmp_path / "a.pkl", net))
    assert not (tmp_path / "made").exists()


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    golden, options = recorded_weights("ema"), case("edm", "train")["config"]["network"]
    name = "map_layer0.weight"
    for changes, message in (
        ({name: None}, f"1 tensors missing \\({name}\\)"),
        ({name: torch.ones(2, 2)}, "of another shape"),
        ({name: golden[name].double()}, "not float32"),
        ({"extra": torch.ones(1)}, r"unknown \(extra\)"),
    ):
        tensors = {f"model.{k}": v for k, v in {**golden, **changes}.items() if v is not None}
        path = write_snapshot(tmp_path / "a.pkl", network("EDMPrecond", tensors, **options))
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / "made", path)
    path = write_snapshot(tmp_path / "a.pkl", iddpm(u=torch.linspace(9, 0, 1001)))
    with pytest.raises(CheckpointError, match="table of noise levels"):
        convert(tmp_path / "made", path)
    assert not (tmp_path / "made").exists()


def test_other_files(tmp_path: Path) -> None:
    snapshot, state = (recorded_file(file, tmp_path) for file in (SNAPSHOT, STATE))
    (tmp_path / "taken").mkdir()
    unknown = write_snapshot(tmp_path / "b.pkl", network("PatchPrecond", {}, **SIZE))
    empty = write_state(tmp_path / "c.pt", 3)
    later = recorded_file(STATE, tmp_path, "training-state-000002.pt")
    dest = tmp_path / "made"
    for sources, message in (
        ([unknown], "network is a PatchPrecond, which is of no kind known here. Known are patch"),
        ([empty], "it holds net, optimizer_state, which is of no kind"),
        ([snapshot, snapshot], "two models, and nothing says how they make one pipeline"),
        ([later, snapshot], "not of the same moment"),
        ([state, tmp_path / "absent.pkl"], "no such file"),
        ([], "name one checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(dest, *sources)
    with pytest.raises(CheckpointError, match="taken exists already"):
        convert(tmp_path / "taken", snapshot)
    assert not dest.exists()
    assert not list((tmp_path / "taken").iterdir())


# ---------------------------------------------------------------------------------------- command


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [*map(str, words)])
    if isinstance(result.exception, TesseraError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_command(tmp_path: Path) -> None:
    path = recorded_file(SNAPSHOT, tmp_path, "network-snapshot-002500.pkl")
    with pytest.raises(CheckpointError, match=r"tessera convert .*002500\.pkl .*002500$"):
        run("sample", path, "--out", tmp_path / "images")
    output = run("convert", path, tmp_path / "made")
    for text in ("song_unet", "edm", "18,315", "8 x 8", "ema", "2,500,000"):
        assert text in output
    run("sample", tmp_path / "made", "--seeds", "0-1", "--class", 1, "--steps", 2, "--device",
        "cpu", "--out", tmp_path / "images")  # fmt: skip
    assert len(list((tmp_path / "images").glob("*.png"))) == 2
    with pytest.raises(CheckpointError, match="exists already"):
        run("convert", path, tmp_path / "made")
    state = recorded_file(STATE, tmp_path, "training-state-002500.pt")
    assert "ema, raw" in run("convert", state, path, tmp_path / "both")

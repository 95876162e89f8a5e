"""Pipelines in Python: saving, loading, damage, and what `sample` takes and gives."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pipeline import CLASS_NAMES, tiny_pipeline

import tessera
from tessera import distributed
from tessera.errors import CheckpointError, TesseraError
from tessera.pipelines import hub
from tessera.pipelines.base import Pipeline
from tessera.progress import quantity

PIPE = tiny_pipeline()


def calls(pipe: Pipeline, sample: Callable[[], Any]) -> list[int]:
    """The batch sizes that the network sees."""
    sizes: list[int] = []
    handle = pipe.denoiser.network.register_forward_pre_hook(
        lambda _, inputs: sizes.append(len(inputs[0]))
    )
    sample()
    handle.remove()
    return sizes


# ---------------------------------------------------------------------------------- the folder


def test_round_trip_is_exact(tmp_path: Path) -> None:
    PIPE.save(tmp_path / "p")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    pipe = tessera.load(tmp_path / "p", device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert pipe.recipe == PIPE.recipe
    assert (pipe.images_seen, pipe.class_names, pipe.ema) == (5000, CLASS_NAMES, "1000")
    assert not pipe.denoiser.training
    saved, loaded = PIPE.denoiser.network.state_dict(), pipe.denoiser.network.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert np.array_equal(pipe.sample("0-3"), PIPE.sample("0-3"))
    # A second save replaces the first and says the same.
    weights = (tmp_path / "p" / "model.safetensors").read_bytes()
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    pipe.save(tmp_path / "p")
    assert (tmp_path / "p" / "model.safetensors").read_bytes() == weights
    assert json.loads((tmp_path / "p" / "config.json").read_text()) == config
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_only_pipelines_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    for name in ("photos", "file"):
        with pytest.raises(CheckpointError, match="is no pipeline; saving would remove it"):
            PIPE.save(tmp_path / name)
    assert (tmp_path / "photos" / "cat.png").exists()
    (tmp_path / "empty").mkdir()
    PIPE.save(tmp_path / "empty")
    # Other tools' models have a config.json, too.
    for content in ('{"_class_name": "AutoencoderKL"}', "[]", "damaged"):
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        (other / "config.json").write_text(content)
        (other / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
        with pytest.raises(CheckpointError, match="is no pipeline; saving would remove it"):
            PIPE.save(other)
        assert (other / "diffusion_pytorch_model.safetensors").exists()
    # Damaged, but without doubt ours.
    (tmp_path / "empty" / "config.json").write_text("{")
    PIPE.save(tmp_path / "empty")


def test_run_folder_and_class_method(tmp_path: Path) -> None:
    PIPE.save(tmp_path / "run" / "pipeline")
    assert tessera.load(tmp_path / "run").images_seen == 5000


def test_several_averages(tmp_path: Path) -> None:
    tiny_pipeline(emas=(1000, 500, 500)).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "model-500-2.safetensors", "model-500.safetensors", "model.safetensors",
    ]  # fmt: skip
    first, second = tessera.load(tmp_path), tessera.load(tmp_path, ema=500)
    assert first.emas == second.emas == ("1000", "500", "500-2")
    assert (first.ema, second.ema) == ("1000", "500")
    assert first.checksum != second.checksum
    name = "map_layer0.weight"
    weights = first.denoiser.network.state_dict()[name]
    assert torch.equal(second.denoiser.network.state_dict()[name], weights + 0.1)
    with pytest.raises(CheckpointError, match=r"'7'. What it has: 1000, 500, 500-2"):
        tessera.load(tmp_path, ema="7")


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    return change


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-10] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def wider(folder: Path) -> None:
    recipe = json.loads((folder / "config.json").read_text())["recipe"]
    recipe["network"]["model_channels"] = 16
    edit(recipe=recipe)(folder)


def deeper(folder: Path) -> None:
    recipe = json.loads((folder / "config.json").read_text())["recipe"]
    recipe["network"]["num_blocks"] = 2
    edit(recipe=recipe)(folder)


def elsewhere(folder: Path) -> None:
    entry = {"name": "1000", "file": "../secret.safetensors", "sha256": "0"}
    edit(weights=[entry])(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no pipeline"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (edit(format="other"), "not the configuration of a tessera pipeline"),
        (edit(version=3), "format version 3.*Install a newer"),
        (edit(version=0), "format version 0.*Save the pipeline again"),
        (edit(kind="unheard"), "kind 'unheard'.*Install a newer"),
        (edit(weights=...), "incomplete or damaged.*weights"),
        (edit(recipe={"name": "x"}), "data"),
        (lambda f: (f / "model.safetensors").unlink(), r"model.safetensors is missing"),
        (cut, "damaged or was changed"),
        (flip, "damaged or was changed"),
        (wider, "of another shape"),
        (deeper, "tensors missing"),
        (elsewhere, "missing"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    PIPE.save(tmp_path / "p")
    damage(tmp_path / "p")
    with pytest.raises(TesseraError, match=message):
        tessera.load(tmp_path / "p")


def test_no_such_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="there is no pipeline"):
        tessera.load(tmp_path / "nowhere")
    # A path in a folder that is here is none of the hub's.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "nape").mkdir(parents=True)
    monkeypatch.setattr(hub, "download", Mock(side_effect=AssertionError("asked the hub")))
    with pytest.raises(CheckpointError, match=r"no such folder. Did you mean runs.nape\?"):
        tessera.load("runs/nope")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(TesseraError, match=r"pip install .*\[hub\]"):
        tessera.load("someone/some-model")


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PIPE.save(tmp_path / "cache")

    class Hub:
        @staticmethod
        def snapshot_download(
            repository: str, revision: str | None, allow_patterns: list[str]
        ) -> str:
            if (repository, revision) not in (("someone/tiny", None), ("someone/tiny", "v1")):
                raise OSError("no such repository")
            return str(tmp_path / "cache")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)  # type: ignore[arg-type]
    for pinned in (tessera.load("someone/tiny@v1"), tessera.load("someone/tiny", revision="v1")):
        assert pinned.images_seen == tessera.load("someone/tiny").images_seen == 5000
    for source in ("someone/tiny@v1", tmp_path / "cache"):
        with pytest.raises(CheckpointError, match="`revision=v2`"):
            tessera.load(source, revision="v2")
    with pytest.raises(CheckpointError, match=r"someone/other.*no such repository"):
        tessera.load("someone/other")


def test_the_fastest_device_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PIPE.save(tmp_path / "p")
    fastest = torch.device("meta")
    original = distributed.device
    monkeypatch.setattr(distributed, "device", lambda name: original(name) if name else fastest)
    assert tessera.load(tmp_path / "p").device == fastest
    assert tessera.load(tmp_path / "p").device == fastest
    assert tessera.load(tmp_path / "p", device="cpu").device.type == "cpu"
    with pytest.raises(TesseraError, match="`device=abacus`"):
        tessera.load(tmp_path / "p", device="abacus")


def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    PIPE.save("~/p")
    assert (tmp_path / "p" / "config.json").is_file()
    assert tessera.load("~/p", device="cpu").images_seen == 5000


def test_printed() -> None:
    text = str(PIPE)
    for line in (
        "pipeline of kind diffusion", "recipe       tiny", "shape        (3, 8, 8)",
        "classes      3: ant, bee, cat", "images seen  5,000", "ema          1000",
        "device       cpu",
    ):  # fmt: skip
        assert line in text.splitlines()[0] or f"  {line}" in text.splitlines()
    parameters = sum(p.numel() for p in PIPE.denoiser.parameters())
    assert f"parameters   {quantity(parameters)}" in text
    assert "classes      none" in str(tiny_pipeline(num_classes=0))


def test_the_package_lists_its_names() -> None:
    assert {"Pipeline", "load", "__version__"} <= set(dir(tessera))


def test_encoding_nothing_at_once() -> None:
    images = np.zeros((1, 8, 8, 3), np.uint8)
    with pytest.raises(TesseraError, match="`batch=0`"):
        PIPE.encode(images, noise_schedule="linear", batch=0)
    with pytest.raises(TesseraError, match="does nothing for images without a class"):
        PIPE.encode(images, noise_schedule="linear", guidance=2.0)


def test_import_is_light() -> None:
    code = "import sys, tessera; assert 'torch' not in sys.modules; tessera.Pipeline, tessera.load"
    subprocess.run([sys.executable, "-c", code], check=True)


# -------------------------------------------------------------------------------------- images


def test_outputs() -> None:
    images = PIPE.sample(range(3))
    assert images.shape == (3, 8, 8, 3)
    assert images.dtype == np.uint8
    assert images.std() > 10
    pictures = PIPE.sample(range(3), output="pil")
    assert all(np.array_equal(a, b) for a, b in zip(images, pictures, strict=True))
    tensor = PIPE.sample("0-2", output="tensor")
    assert torch.equal(tensor.permute(0, 2, 3, 1), torch.from_numpy(images))
    assert np.array_equal(PIPE.sample([2]), images[2:])


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 6), st.integers(0, 50), st.sampled_from([0.0, 10.0]))
def test_batch_size_does_not_matter(batch: int, first: int, s_churn: float) -> None:
    seeds = range(first, first + 6)
    whole = PIPE.sample(seeds, s_churn=s_churn).astype(int)
    parts = PIPE.sample(seeds, s_churn=s_churn, batch=batch).astype(int)
    # Libraries may sum in another order for another batch size: a grey level at most.
    assert abs(whole - parts).max() <= 1


def test_batches_are_even_and_in_order() -> None:
    sizes = calls(PIPE, lambda: PIPE.sample(range(10), batch=4, steps=1))
    assert sizes == [4, 3, 3]
    batches = list(PIPE.sample_batches([5, 1, 7], batch=2, steps=1))
    assert [seed for batch in batches for seed in batch.seeds] == [5, 1, 7]
    assert list(PIPE.sample_batches([], steps=1)) == []


def test_classes() -> None:
    drawn = PIPE.labels(range(12))
    assert set(drawn.tolist()) == {0, 1, 2}
    found = [batch.labels for batch in PIPE.sample_batches(range(12), steps=1, batch=5)]
    assert np.array_equal(np.concatenate(found), drawn)
    # An image depends on its class, and drawing one's own is the same as being given it.
    free = PIPE.sample(range(4))
    assert np.array_equal(PIPE.sample(range(4), labels=drawn[:4]), free)
    assert not np.array_equal(PIPE.sample(range(4), labels=(drawn[:4] + 1) % 3), free)
    assert PIPE.labels(range(2), "cat").tolist() == [2, 2]
    assert PIPE.labels(range(2), ["bee", 0]).tolist() == [1, 0]
    assert PIPE.labels([4, 9], "balanced").tolist() == [1, 0]
    assert PIPE.labels([4], -1).tolist() == [-1]
    assert PIPE.labels([4], "1").tolist() == [1]
    assert PIPE.labels([4], np.int64(1)).tolist() == [1]
    assert PIPE.labels([4, 5], torch.tensor([2, 1])).tolist() == [2, 1]


def test_options_reach_the_sampler() -> None:
    assert len(calls(PIPE, lambda: PIPE.sample([0]))) == 5
    assert len(calls(PIPE, lambda: PIPE.sample([0], steps=4, solver="euler"))) == 4
    assert not np.array_equal(PIPE.sample([0]), PIPE.sample([0], sigma_max=3.0))
    # The ablation sampler's default is EDM's; its options do not select it by themselves.
    ablation = {"sampler": "ablation", "steps": 3}
    edm = PIPE.sample([0], sigma_min=0.002, sigma_max=80.0)
    assert np.array_equal(PIPE.sample([0], **ablation, discretization="edm"), edm)
    assert not np.array_equal(PIPE.sample([0], **ablation, discretization="ve"), edm)
    with pytest.raises(TesseraError, match=r"no option `discretization`.*`sampler=ablation`"):
        PIPE.sample([0], discretization="edm")
    seen: list[tuple[list[int], int]] = []
    PIPE.sample([3, 4], on_step=lambda seeds, state: seen.append((list(seeds), state.step)))
    assert seen == [([3, 4], 1), ([3, 4], 2), ([3, 4], 3)]


def test_guidance_calls() -> None:
    assert calls(PIPE, lambda: PIPE.sample([0, 1], guidance=2.0)) == [4] * 5
    limited = calls(PIPE, lambda: PIPE.sample([0, 1], guidance=2.0, guidance_interval=(0.01, 10.0)))
    assert sorted(limited) == [2, 2, 2, 4, 4]
    assert not np.array_equal(PIPE.sample([0], guidance=2.0), PIPE.sample([0]))
    assert np.array_equal(PIPE.sample([0], guidance=1.0), PIPE.sample([0]))
    weak = tiny_pipeline(num_classes=0)
    assert calls(PIPE, lambda: PIPE.sample([0, 1], guidance=2.0, guide=weak)) == [2] * 5


def test_bfloat16_is_close() -> None:
    exact, rough = PIPE.sample(range(4)), PIPE.sample(range(4), precision="bf16")
    assert 0 < abs(exact.astype(int) - rough.astype(int)).mean() < 4


def test_guidance_without_label_dropout_warns_once() -> None:
    pipe = tiny_pipeline(label_dropout=0.0)
    with pytest.warns(UserWarning, match="without label dropout"):
        pipe.sample([0], guidance=2.0, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.sample([0], guidance=2.0, steps=1)
        pipe.sample([0], guidance=2.0, steps=1, guide=PIPE)
        PIPE.sample([0], guidance=2.0, steps=1)
        PIPE.sample([0], -1, steps=1)
    with pytest.warns(UserWarning, match="without label dropout"):
        tiny_pipeline(label_dropout=0.0).sample([0], -1, steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": 3}, "no class 3. The classes are 0 to 2: ant, bee, cat"),
        ({"labels": -2}, "no class -2"),
        ({"labels": "bea"}, "no class 'bea'. Did you mean bee"),
        ({"labels": [1]}, "1 classes were given for 2 seeds"),
        ({"stps": 3}, "no option `stps`. Did you mean `steps`"),
        ({"guidence": 2.0}, "no option `guidence`. Did you mean `guidance`"),
        ({"steps": 0}, "`steps=0`"),
        ({"solver": "dpm"}, "`solver=dpm`"),
        ({"guidance": 2.0, "guidance_interval": (5, 1)}, "lower noise level first"),
        ({"seeds": "3-1"}, "runs backwards"),
        ({"eta": 0.5}, "no option `eta`. It is one of `sampler=ddim`"),
        ({"whatever": 1}, "There are `steps`, `solver`"),
        ({"seeds": []}, "`seeds` is empty"),
        ({"seeds": 4}, r"seed or as a count. Give \[4\] .* or range\(4\)"),
        ({"seeds": np.int64(4)}, r"range\(4\)"),
        ({"seeds": 4.0}, "expected whole numbers"),
        ({"seeds": [0.5]}, "expected whole numbers"),
        ({"batch": 0}, "`batch=0`"),
        ({"output": "foo"}, "`output=foo`.*numpy, pil, tensor"),
        ({"sigma_min": 90}, "`sigma_min=90` must be less than `sigma_max=80`"),
        ({"sampler": "ablation", "sigma_min": 3, "sigma_max": 2}, "must be less than"),
        ({"guidance": 1.5, "labels": -1}, "does nothing for images without a class"),
    ],
)
def test_errors_name_the_mistake(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TesseraError, match=message):
        PIPE.sample(**{"seeds": [0, 1], **options})


def test_models_without_classes() -> None:
    pipe = tiny_pipeline(num_classes=0)
    (batch,) = pipe.sample_batches([0, 1])
    assert batch.labels is None
    with pytest.raises(TesseraError, match="trained without classes"):
        pipe.sample([0], labels=1)
    with pytest.raises(TesseraError, match="trained with classes"):
        pipe.sample([0], guidance=2.0)

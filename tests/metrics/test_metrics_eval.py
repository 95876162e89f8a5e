"""`tessera eval` on small folders and NPZ files, and its errors."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_case import start
from typer.testing import CliRunner, Result

from tessera.cli import app
from tessera.cli.eval import _session
from tessera.errors import DataError, TesseraError
from tessera.images import save_png
from tessera.metrics.classifier import Classifier
from tessera.pipelines.loading import build_pipeline
from tessera.recipes.build import build_denoiser
from tessera.recipes.loading import load_recipe

RUNNER = CliRunner()


def write_images(folder: Path, n: int, size: int = 8, channels: int = 1) -> Path:
    """Two class folders: bright and dark."""
    random = np.random.default_rng(n)
    for index in range(n):
        level, name = ((20, "dark"), (200, "bright"))[index % 2]
        image = random.integers(level, level + 50, (size, size, channels)).astype(np.uint8)
        path = folder / name / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, image)
    return folder


def evaluate(*arguments: object) -> Result:
    return RUNNER.invoke(app, ["eval", *map(str, arguments)], catch_exceptions=True)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("real") / "photos", 40)


@pytest.fixture(scope="module")
def reference(real: Path) -> Path:
    out = real.parent / "photos.ref.npz"
    result = evaluate("reference", real, out, "--training-images", 2000)
    assert result.exit_code == 0, result.output
    assert "40 of photos" in result.output
    return out


def test_reference_file_holds_plain_arrays(reference: Path) -> None:
    with np.load(reference, allow_pickle=False) as file:
        assert file["mu"].shape == (128,)
        assert file["sigma"].shape == (128, 128)
        assert int(file["n"]) == 40
        assert json.loads(str(file["tessera"]))["classifier"]["class_names"] == ["bright", "dark"]


def test_score_table_and_json(reference: Path, tmp_path: Path) -> None:
    samples = write_images(tmp_path / "samples", 30)
    table = evaluate("score", samples, reference)
    assert table.exit_code == 0, table.output
    assert "Fréchet distance (in-domain classifier)" in table.output
    assert "held-out" in table.output
    assert "at least 129 images" in table.output
    result = RUNNER.invoke(app, ["eval", "score", str(samples), str(reference), "--json"])
    score = json.loads(result.stdout)
    assert (score["n"], score["n_reference"]) == (30, 40)
    assert score["recognised"] == 1
    assert score["fd_classifier"] > 0
    assert "fid" not in score


def test_real_images_may_stand_for_the_reference_file(real: Path) -> None:
    result = evaluate("score", real, real, "--training-images", 600, "--json")
    # 40 images for 128 features: a singular covariance, whose root is known to half the digits.
    assert abs(json.loads(result.stdout)["fd_classifier"]) < 1e-3


def test_npz_samples(reference: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 1)).astype(np.uint8)
    np.savez(tmp_path / "samples.npz", images, np.zeros(20, np.int64))
    path = tmp_path / "samples.npz"
    result = RUNNER.invoke(app, ["eval", "score", str(path), str(reference), "--json"])
    score = json.loads(result.stdout)
    assert score["n"] == 20
    assert score["recognised"] is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scores_on_the_gpu(real: Path, tmp_path: Path) -> None:
    samples = write_images(tmp_path / "samples", 30)
    options = ("--features", "classifier", "--training-images", 600, "--metrics", "fd,pr", "--json")
    result = evaluate("score", samples, real, *options)
    assert result.exit_code == 0, result.output
    assert torch.cuda.max_memory_allocated() > 0
    assert {"fd", "precision"} <= set(re.findall(r"[a-z]+", result.output))


def refused(*arguments: object) -> str:
    result = evaluate(*arguments)
    assert isinstance(result.exception, TesseraError), result.output
    return str(result.exception)


def test_samples_of_another_shape(reference: Path, tmp_path: Path) -> None:
    other = write_images(tmp_path / "large", 4, size=16)
    assert "16x16 grey cannot be scored against a reference of 8x8" in refused(
        "score", other, reference
    )
    colour = write_images(tmp_path / "colour", 4, channels=3)
    assert "8x8 RGB" in refused("score", colour, reference)


def test_mixed_sizes_and_empty_folders(reference: Path, tmp_path: Path) -> None:
    mixed = write_images(tmp_path / "mixed", 4)
    save_png(mixed / "dark" / "900.png", np.zeros((9, 9, 1), np.uint8))
    assert "900.png" in refused("score", mixed, reference)
    (tmp_path / "empty").mkdir()
    assert "no images" in refused("score", tmp_path / "empty", reference)
    assert "nowhere" in refused("score", tmp_path / "nowhere", reference)
    assert "31 images asked for" in refused(
        "score", write_images(tmp_path / "few", 30), reference, "--num", 31
    )


def test_alpha_is_refused_wherever_it_is(reference: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "late", 40)
    Image.fromarray(np.zeros((8, 8, 2), np.uint8), "LA").save(folder / "dark" / "950.png")
    assert "950.png: has an alpha channel" in refused("score", folder, reference)
    with zipfile.ZipFile(tmp_path / "late.zip", "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, path.relative_to(folder))
    assert "950.png: has an alpha channel" in refused("score", tmp_path / "late.zip", reference)


def test_a_single_sample(reference: Path, tmp_path: Path) -> None:
    assert "at least 2" in refused("score", write_images(tmp_path / "one", 1), reference)


def test_bad_npz_files(real: Path, reference: Path, tmp_path: Path) -> None:
    whole = reference.read_bytes()
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refused("score", real, cut)
    assert "damaged" in refused("score", cut, reference)
    assert "no images" in refused("score", reference, reference)
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, mu=np.zeros(4), sigma=np.eye(4))
    assert "features of 4 numbers" in refused("score", real, foreign)
    objects = tmp_path / "objects.npz"
    np.savez(objects, arr_0=np.array([{"code": 1}], dtype=object))
    assert "not a readable NPZ" in refused("score", objects, reference)
    floats = tmp_path / "floats.npz"
    np.savez(floats, np.zeros((4, 8, 8, 1)))
    assert "uint8" in refused("score", floats, reference)
    assert "no such file" in refused("score", real, tmp_path / "absent.npz")
    bare = tmp_path / "bare.npz"
    with bare.open("wb") as file:
        np.save(file, np.zeros(4))
    assert "one bare array" in refused("score", real, bare)


def test_an_npz_with_spoiled_bytes(real: Path, tmp_path: Path) -> None:
    path = tmp_path / "packed.npz"
    np.savez_compressed(path, mu=np.arange(2048.0), sigma=np.eye(2048))
    data = bytearray(path.read_bytes())
    data[100:200] = bytes(255 - value for value in data[100:200])
    path.write_bytes(data)
    assert "may be damaged" in refused("score", real, path, "--features", "inception")


def test_a_reference_file_without_its_weights(reference: Path, real: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.npz"
    with zipfile.ZipFile(reference) as source, zipfile.ZipFile(broken, "w") as target:
        for name in source.namelist():
            if "head" not in name:
                target.writestr(name, source.read(name))
    assert "damaged reference file" in refused("score", real, broken)


def test_no_option_is_left_aside(
    reference: Path, real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refused("score", real, reference, "--weights", tmp_path / "w.pth")
    assert "--weights are those of inception or dinov2" in message
    assert "--weights" in refused("reference", real, tmp_path / "a.npz", "--weights", "w.pth")
    sizes = []
    original = Classifier.__call__

    def seen(self: Classifier, images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return original(self, images)

    monkeypatch.setattr(Classifier, "__call__", seen)
    assert evaluate("score", real, reference, "--batch", 7).exit_code == 0
    assert max(sizes) == 7
    result = evaluate(
        "reference", real, tmp_path / "b.npz", "--training-images", 256, "--batch", 9
    )  # fmt: skip
    assert result.exit_code == 0
    assert max(sizes) == 9


def test_reference_needs_the_right_name(real: Path, tmp_path: Path) -> None:
    assert ".npz" in refused("reference", real, tmp_path / "photos.ref")
    with pytest.raises(DataError):
        raise evaluate("reference", tmp_path / "nowhere", tmp_path / "a.npz").exception or OSError


def test_a_pipeline_is_sampled_on_the_fly(reference: Path, tmp_path: Path) -> None:
    overrides = [
        "data.resolution=8", "data.num_classes=2", "network.model_channels=8", "sampling.steps=2",
    ]  # fmt: skip
    recipe = load_recipe("quickstart-digits", overrides)
    build_pipeline(recipe, build_denoiser(recipe)).save(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    result = evaluate("score", tmp_path / "pipe", reference, "--num", 12, "--batch", 5, "--json")
    assert result.exit_code == 0, result.output
    score = json.loads(result.stdout)
    assert score["n"] == 12
    assert 0 <= score["recognised"] <= 1
    assert sorted(tmp_path.rglob("*")) == before
    assert "is a pipeline" in refused("score", tmp_path / "pipe", tmp_path / "pipe")
    assert "is a pipeline" in refused("reference", tmp_path / "pipe", tmp_path / "pipe.ref.npz")


def test_previews_of_a_run_are_no_samples(reference: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "run" / "previews", 4)
    (tmp_path / "run" / "recipe.yaml").write_text("name: tiny")
    assert "holds no pipeline" in refused("score", tmp_path / "run", reference)


def test_options_that_would_do_nothing(reference: Path, real: Path, tmp_path: Path) -> None:
    message = refused("score", real, reference, "--convention", "adm")
    assert "fd has no convention 'adm'" in message
    assert "--num" in refused("reference", real, tmp_path / "a.npz", "--num", 5)
    assert "--device quantum: " in refused("score", real, reference, "--device", "quantum")
    score = evaluate("score", real, reference, "--device", "cpu", "--json")
    assert json.loads(score.stdout)["n"] == 40


def test_the_command_says_it_in_a_line(tmp_path: Path) -> None:
    process = start("eval", "score", str(tmp_path / "nowhere"), str(tmp_path / "absent.npz"))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert "absent.npz: there is no such file" in err
    assert "Traceback" not in err


def test_only_warnings_for_users_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with _session():
        warnings.warn("few images", UserWarning, stacklevel=1)
        warnings.warn("few images", UserWarning, stacklevel=1)
        warnings.warn("unclosed file", ResourceWarning, stacklevel=1)
        warnings.warn("old name", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: few images\n"

"""The quickstart, shrunken, from digits to report."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from html_parts import Parts, code_of, loads_nothing
from typer.testing import CliRunner

import tessera
from tessera.cli import app
from tessera.commands import tessera_command
from tessera.data.dataset import open_dataset
from tessera.errors import TesseraError
from tessera.metrics.reference import load_reference
from tessera.quickstart.digits import enlarge, write_digits
from tessera.quickstart.run import QuickstartResult, run
from tessera.reports.sections import render

pytest.importorskip("sklearn")

TINY = [
    "data.resolution=8", "network.model_channels=8", "network.num_blocks=1",
    "training.images=192", "training.batch=32", "sampling.steps=3", "run.log_every_images=32",
]  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> QuickstartResult:
    out = tmp_path_factory.mktemp("quickstart") / "out"
    return run(out, overrides=TINY, digits=80, samples=30, classifier_images=1500)


def test_measures_everything_that_the_report_shows(result: QuickstartResult) -> None:
    made = result.report.made
    assert made is not None
    assert result.images_seen == 192
    assert made.images.shape == (30, 8, 8, 1)
    assert made.labels is not None
    assert made.labels.tolist() == list(range(10)) * 3
    assert result.recognised == (result.report.predicted == made.labels).mean()
    assert result.score.n == 30
    assert result.score.n_reference == 36  # half of those that are not held out
    assert 0 < result.score.distances["floor"] < result.score.distances["shuffled"]
    losses = [x for x in result.report.subject.metrics if "loss_per_pixel" in x]
    assert len(losses) >= 6
    assert losses[-1]["images"] == 192
    assert set(result.seconds) == {"data", "training", "classifier", "report"}


def test_frames_end_with_the_sample(result: QuickstartResult) -> None:
    frames, made = result.report.frames, result.report.made
    assert made is not None
    assert len(frames) == 3
    assert [f.sigma for f in frames] == sorted((f.sigma for f in frames), reverse=True)
    last = frames[-1].noisy.astype(int)
    assert np.abs(last - made.images[:3]).max() <= 1


def test_what_it_leaves_can_be_used(result: QuickstartResult) -> None:
    images = tessera.load(result.out / "run").sample(range(10), "balanced", guidance=1.5)
    assert result.report.made is not None
    assert np.abs(images.astype(int) - result.report.made.images[:10]).max() <= 1
    assert load_reference(result.out / "digits.ref.npz").statistics.n == 80
    assert open_dataset(result.out / "digits.safetensors").class_names == tuple("0123456789")


def test_the_report_is_that_of_the_run(result: QuickstartResult) -> None:
    page = render(result.report)
    parts = Parts(page)
    assert loads_nothing(page)
    assert "<h1>Handwritten digits from noise</h1>" in page
    assert len(parts.images("made")) == 30
    assert {image["alt"] for image in parts.images("real")} == {
        f"real {digit}" for digit in range(10)
    }
    wrong = sum(image.get("class") == "wrong" for image in parts.images("made"))
    assert wrong == round(30 * (1 - result.recognised))
    assert f"{result.recognised:.1%}" in page
    assert f"{result.reference.extractor.facts.accuracy:.1%}" in page
    for value in result.score.distances.values():
        assert f"{value:.3g}" in page
    assert "not FID" in page


def test_the_commands_can_be_typed_as_they_stand(
    result: QuickstartResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = tmp_path / ".venv/bin"
    scripts.mkdir(parents=True)
    (scripts / "tessera").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in code_of(render(result.report)) if not block.startswith("name: ")]
    commands = [line for block in blocks for line in block.splitlines()]
    assert any(f"tessera sample {result.out}/run guidance=1.5" in line for line in commands)
    assert any("data.path=photos.safetensors" in line for line in commands)
    assert len(commands) >= 7
    ours = [line for line in commands if "photos" not in line]
    assert all(line.startswith(".venv/bin/tessera ") for line in ours)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_of_it_runs_on_the_gpu(result: QuickstartResult) -> None:
    assert result.device == torch.cuda.get_device_name()
    assert 0 < result.score.distances["floor"] < result.score.distances["shuffled"]
    render(result.report)


def test_the_command_refuses_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    outcome = CliRunner().invoke(app, ["quickstart", "--out", str(tmp_path)])
    assert isinstance(outcome.exception, TesseraError)
    assert "--out" in str(outcome.exception)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_command_writes_the_report(
    result: QuickstartResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def recorded(out: Path, **options: object) -> QuickstartResult:
        asked.update(options, out=out)
        return result

    monkeypatch.setattr("tessera.quickstart.run.run", recorded)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    outcome = CliRunner().invoke(app, ["quickstart", "--seed", "3", "--images", "64", "a.b=1"])
    assert outcome.exit_code == 0, outcome.output
    assert asked["out"] == Path("quickstart-2")
    assert asked["seed"] == 3
    assert asked["overrides"] == ["a.b=1", "training.images=64"]
    assert (tmp_path / "quickstart-2" / "report.html").read_text("utf-8") == render(result.report)
    assert f"{result.recognised:.1%} of 30 samples" in outcome.output
    assert f"{result.seconds['training']:.0f} of them to train on 192 images" in outcome.output
    assert f"{tessera_command()} sample quickstart-2/run" in outcome.output


def test_digits_are_the_originals_enlarged(tmp_path: Path) -> None:
    write_digits(tmp_path / "digits.safetensors", 16, 25)
    dataset = open_dataset(tmp_path / "digits.safetensors")
    assert (len(dataset), dataset.shape, dataset.num_classes) == (25, (1, 16, 16), 10)
    assert dataset.labels is not None
    assert dataset.labels[:10].tolist() == list(range(10))
    flat = enlarge(np.full((8, 8), 16.0), 16)
    assert (flat == 255).all()
    assert (enlarge(np.zeros((8, 8)), 32) == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("evaluate.reference=nowhere.npz", "there is nothing at"),
        ("training.initial_weights=nowhere", "no pipeline"),
        ("data.num_classes=0", "samples of each class"),
    ],
)
def test_what_cannot_begin_leaves_nothing(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TesseraError, match=message):
        run(tmp_path / "out", overrides=[*TINY, change], digits=20)
    assert not list(tmp_path.iterdir())

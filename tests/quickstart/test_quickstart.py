"""The quickstart, shrunken, from digits to report."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tessera
from tessera.cli import app
from tessera.commands import tessera_command
from tessera.data.dataset import open_dataset
from tessera.errors import TesseraError
from tessera.metrics.reference import load_reference
from tessera.quickstart.digits import enlarge, write_digits
from tessera.quickstart.report import render
from tessera.quickstart.run import QuickstartResult, run
from tessera.reports import charts

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
    assert result.images_seen == 192
    assert result.samples.shape == (30, 8, 8, 1)
    assert result.labels.tolist() == list(range(10)) * 3
    assert result.recognised == result.score.recognised
    assert result.score.n == 30
    assert result.score.n_reference == 40
    assert 0 < result.floor < result.ceiling
    assert len(result.losses) >= 6
    assert result.losses[-1][0] == 192
    assert set(result.seconds) == {"data", "training", "classifier", "sampling", "scoring"}


def test_frames_end_with_the_sample(result: QuickstartResult) -> None:
    assert len(result.frames) == 3
    assert [f.sigma for f in result.frames] == sorted(
        (f.sigma for f in result.frames), reverse=True
    )
    last = result.frames[-1].noisy.astype(int)
    assert np.abs(last - result.samples[:10]).max() <= 1


def test_what_it_leaves_can_be_used(result: QuickstartResult) -> None:
    images = tessera.load(result.out / "run").sample(range(10), "balanced")
    assert np.abs(images.astype(int) - result.samples[:10]).max() <= 1
    assert load_reference(result.out / "digits.ref.npz").statistics.n == 80
    assert open_dataset(result.out / "digits.safetensors").class_names == tuple("0123456789")


class Parts(HTMLParser):
    """Collects tags and checks that what is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_one_well_formed_file_with_all_parts(result: QuickstartResult) -> None:
    page = render(result)
    parts = Parts()
    parts.feed(page)
    assert parts.open == []
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "http" not in page
    images = [attributes for tag, attributes in parts.tags if tag == "img"]
    real = [image for image in images if str(image["alt"]).startswith("real")]
    made = [image for image in images if str(image["alt"]).startswith("made")]
    assert len(made) == 30
    assert {image["alt"] for image in real} == {f"real {digit}" for digit in range(10)}
    wrong = sum(image.get("class") == "wrong" for image in made)
    assert wrong == round(30 * (1 - result.recognised))
    assert len(images) - len(real) - len(made) == 3 * 2 * len(result.frames)
    assert sum(tag == "svg" for tag, _ in parts.tags) == 2
    assert f"{result.recognised:.1%}" in page
    assert f"{result.reference.extractor.facts.accuracy:.1%}" in page
    for value in (result.score.fd_classifier, result.floor, result.ceiling):
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
    commands = "\n".join(re.findall(r"<pre><code>(.*?)</code></pre>", render(result), re.S))
    assert f".venv/bin/tessera sample {result.out}/run" in commands
    assert len(commands.splitlines()) == 6
    assert all(line.startswith(".venv/bin/tessera ") for line in commands.splitlines())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_of_it_runs_on_the_gpu(result: QuickstartResult) -> None:
    assert result.device == torch.cuda.get_device_name()
    assert len(result.samples) == len(result.predicted) == 30
    assert 0 < result.floor < result.ceiling
    render(result)


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
    assert (tmp_path / "quickstart-2" / "report.html").read_text("utf-8") == render(result)
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


@pytest.mark.parametrize("losses", [[], [(100, 0.5)], [(100, 1.0), (200, 0.99), (300, 0.01)]])
def test_loss_chart_of_any_length(losses: list[tuple[int, float]]) -> None:
    chart = charts.line(losses)
    assert chart.count("<circle") == bool(losses)
    coordinates = re.findall(r'points="([^"]*)"', chart)
    if losses:
        points = [tuple(map(float, p.split(","))) for p in coordinates[0].split()]
        assert len(points) == len(losses)
        assert all(0 <= x <= 720 and 0 <= y <= 280 for x, y in points)
        # Smaller losses are drawn lower, where y is larger.
        assert [y for _, y in points] == sorted(y for _, y in points)


def test_curves_of_several_things() -> None:
    chart = charts.curves(
        [
            charts.Curve("a<b", [(1, 10.0), (2, 1.0)]),
            charts.Curve("none", []),
            charts.Curve("c", [(0, 2.0)]),
        ],
        "minutes",
        "distances",
    )
    assert chart.count("<polyline") == 2
    assert "a&lt;b" in chart
    assert "none" not in chart
    assert "<svg" not in charts.curves([], "minutes", "distances")


def test_scale_draws_longer_bars_for_larger_values() -> None:
    marks = [charts.Mark("a", 0.01, "floor"), charts.Mark("b", 3.0, "ceiling")]
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="16"', charts.scale(marks))]
    assert widths[0] < widths[1]


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

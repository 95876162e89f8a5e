"""The report of a run: what is in it, of models of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import relay_tiny
import torch
from data_files import random_images, write_archive, write_packed
from energy_pipeline import energy_pipeline
from html_parts import Parts, code_of, loads_nothing
from tiny_pipeline import tiny_pipeline
from tiny_vae import latent_recipe, save_vae
from training_case import BASE
from typer.testing import CliRunner

from tessera.cli import app
from tessera.data.dataset import open_dataset
from tessera.errors import TesseraError
from tessera.metrics.reference import build_reference, find_reference, save_reference
from tessera.pipelines.base import Pipeline
from tessera.pipelines.experts import assemble
from tessera.pipelines.loading import build_pipeline
from tessera.pipelines.relay import assemble_relay
from tessera.recipes.loading import parse_recipe
from tessera.recipes.overrides import merge
from tessera.recipes.parts import NO_PARTS
from tessera.reports import making, measured, write_report
from tessera.reports.measured import measure_run
from tessera.reports.sections import render
from tessera.reports.sources import open_subject
from tessera.training.trainer import Trainer

NAMES = ["<script>alert(1)</script>", 'b"e&e']
CHANGES: dict[str, Any] = {
    "data": {"held_out": 0.4, "xflip": True},
    "validation": {"every_images": 48, "images": 16},
}


@pytest.fixture(scope="module", autouse=True)
def counted() -> Iterator[None]:
    """Costs are counted once, of the run; of other models it takes seconds and shows nothing."""
    known: list[Any] = []

    def cost_of(pipe: Pipeline, options: dict[str, Any]) -> Any:
        if pipe.recipe.data.held_out is None:
            return None
        if not known:
            known.append(making.cost_of(pipe, options))
        return known[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "cost_of", cost_of)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run beside its images, two classes with wild names, and their reference."""
    folder = tmp_path_factory.mktemp("run")
    data = write_archive(
        folder / "tiny.zip", random_images(60), [i % 2 for i in range(60)], class_names=NAMES
    )
    recipe = parse_recipe(merge(merge(BASE, {"data": {"path": str(data)}}), CHANGES))
    Trainer(recipe, folder / "a").run()
    save_reference(
        folder / "tiny.ref.npz", build_reference(open_dataset(data), training_images=256)
    )
    return folder / "a"


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run, samples=10, guidance=1.5).read_text("utf-8")


def test_the_page_is_whole_and_loads_nothing(page: str) -> None:
    parts = Parts(page)
    assert loads_nothing(page.replace("data:image/png;base64,", "data:"))
    assert any("default-src 'none'" in str(a.get("content")) for tag, a in parts.tags)
    assert sum(tag == "script" for tag, _ in parts.tags) == 1
    assert {a.get("name") for tag, a in parts.tags if tag == "meta"} >= {"viewport"}


def test_every_part_is_there(page: str, run: Path) -> None:
    parts = Parts(page)
    titles = ("Real and made", "How they come about", "How far from real", "Are they copies?",
              "Loss", "What it took", "Go on")  # fmt: skip
    for title in titles:
        assert f"<h2>{title}</h2>" in page
    assert "Not in this report" not in page
    assert len(parts.images("made")) == 10
    assert len(parts.images("real")) == 10
    assert len(parts.images("state")) == len(parts.images("guess")) == 3 * 2  # two steps
    assert len(parts.images("nearest training image")) == 8
    assert "of 36, " not in page  # all training images were searched
    assert "36 training images" in page
    assert "24 held-out images" in page
    assert "held-out images" in parts.text
    assert "least noise" in page
    assert "in-domain classifier" in page
    assert "96 images seen" in page
    assert sum(tag == "svg" for tag, _ in parts.tags) == 6
    blocks = code_of(page)
    assert sum(block.startswith("name: tiny\n") for block in blocks) == 1
    buttons = [a for tag, a in parts.tags if tag == "button" and a.get("class") == "copy"]
    assert len(buttons) == len(blocks)


def test_names_are_escaped(page: str) -> None:
    assert "<script>alert" not in page
    assert "made &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "made b&quot;e&amp;e" in page


def test_commands_are_those_of_the_run(page: str, run: Path) -> None:
    lines = [line for block in code_of(page) for line in block.splitlines() if "tessera " in line]
    assert any(f"train --resume {run} training.images=192" in line for line in lines)
    assert any(f"sample {run} guidance=1.5 --seeds 0-63 --grid" in line for line in lines)
    assert any(f"report {run} guidance=1.5 --samples 10" in line for line in lines)
    assert any(f"training.initial_weights={run}" in line for line in lines)


def test_a_second_report_has_the_same_bytes(page: str, run: Path, tmp_path: Path) -> None:
    again = write_report(run, tmp_path / "again.html", samples=10, guidance=1.5)
    assert again.read_text("utf-8") == page


def test_a_reference_beside_the_images_is_found(run: Path, tmp_path: Path) -> None:
    assert find_reference(run.parent / "tiny.zip") == run.parent / "tiny.ref.npz"
    assert find_reference(write_packed(tmp_path / "x.safetensors", random_images(4))) is None
    (tmp_path / "x.ref.npz").write_bytes(b"no reference")
    assert find_reference(tmp_path / "x.safetensors") is None


def test_a_pipeline_without_its_images_says_so(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_pipeline(num_classes=0).save(tmp_path / "plain")
    path = write_report("plain", samples=4)
    page = path.read_text("utf-8")
    assert path == Path("plain-report.html")
    Parts(page)
    assert "Not in this report" in page
    assert "--data IMAGES" in page
    assert "Are they copies?" not in page
    assert "<h2>Loss</h2>" not in page
    assert "train --resume" not in page


def test_without_held_out_images_there_is_no_share(tmp_path: Path) -> None:
    tiny_pipeline(num_classes=0).save(tmp_path / "plain")
    data = write_packed(tmp_path / "x.safetensors", random_images(30))
    other = write_packed(tmp_path / "y.safetensors", random_images(25, seed=1))
    report = measure_run(tmp_path / "plain", data=data, samples=4)
    assert report.copies is not None
    assert report.copies.near is None
    assert "data.held_out" in render(report)
    assert [one.of for one in report.quartiles] == ["training images"]
    report = measure_run(tmp_path / "plain", data=data, held_out=other, samples=4)
    assert report.copies is not None
    assert report.copies.near is not None
    assert report.copies.near.m == 25
    assert [one.of for one in report.quartiles] == ["held-out images"]
    Parts(render(report))


def test_copies_of_training_images_are_told(run: Path, monkeypatch: Any) -> None:
    def copied(pipe: Any, seed: int, count: int, *rest: Any) -> Any:
        made = make(pipe, seed, count, *rest)
        source = open_subject(
            run, data=None, held_out=None, dataset=None, device="cpu", parts=NO_PARTS
        ).training
        assert source is not None
        mirrored = source.pictures(np.arange(count))[:, :, ::-1].copy()
        space = torch.from_numpy(mirrored).permute(0, 3, 1, 2)
        return replace(made, images=mirrored, space=space)

    make = measured.make_samples
    monkeypatch.setattr(measured, "make_samples", copied)
    report = measure_run(run, samples=10)
    assert report.copies is not None
    share = report.copies.standing_out
    assert share is not None
    assert share.of_samples == 1
    assert share.more
    assert "look at the pairs" in render(report)
    assert [pair.distance for pair in report.copies.pairs] == [0.0] * 8


# -------------------------------------------------------------------------- models of other kinds


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    return write_packed(
        folder / "x.safetensors", random_images(24), labels=[i % 2 for i in range(24)]
    )


def of_kind(folder: Path, pipe: Any, data: Path, **options: Any) -> tuple[Any, str]:
    """The report of a pipeline, as measured and as a page."""
    pipe.save(folder / "p")
    report = measure_run(folder / "p", data=data, samples=4, **options)
    page = render(report)
    Parts(page)
    return report, page


def test_a_relay(tmp_path: Path, images: Path) -> None:
    stages = [relay_tiny.pipeline(relay_tiny.FIRST), relay_tiny.pipeline(relay_tiny.SECOND)]
    report, page = of_kind(tmp_path, assemble_relay(stages), images)
    assert [one.name for one in report.quartiles] == ["first", "second"]
    assert page.count("The recipe, all of it, of ") == 2
    assert all(frame.denoised is not None for frame in report.frames)
    assert report.copies is not None


def test_a_second_stage_alone_starts_from_pictures(tmp_path: Path, images: Path) -> None:
    report, page = of_kind(tmp_path, relay_tiny.pipeline(relay_tiny.SECOND), images)
    assert report.copies is None
    assert "starts from pictures of the data" in page
    assert len(report.made.images) == 4


def test_experts_together_and_one_alone(tmp_path: Path, images: Path) -> None:
    split = {"snr_splits": [1.0]}
    pair = [relay_tiny.pipeline(split, {"expert": index}) for index in (0, 1)]
    report, _ = of_kind(tmp_path, assemble(pair), images)
    assert len(report.quartiles) == 1
    alone, page = of_kind(tmp_path / "alone", pair[1], images)
    assert alone.made is None
    assert len(alone.quartiles) == 1
    assert "is expert 1 of 0 to 1" in page


def test_masked_tokens_grey_and_discrete(tmp_path: Path) -> None:
    mar = {
        "data": {"num_classes": 0, "channels": 1},
        "network": {
            "kind": "mar", "patch": 2, "width": 16, "depth": 1, "heads": 2, "decoder_depth": 1,
            "buffer": 2, "head_width": 16, "head_depth": 1,
        },
        "preconditioning": {"kind": "discrete", "prediction": "eps"},
        "objective": {"kind": "mar", "repeats": 2},
        "sampling": {"kind": "mar", "num_iter": 4, "head_steps": "3"},
    }  # fmt: skip
    plain = {name: value for name, value in BASE.items() if name != "network"}
    grey = write_packed(tmp_path / "x.safetensors", random_images(24, channels=1))
    report, page = of_kind(tmp_path, build_pipeline(parse_recipe(merge(plain, mar))), grey)
    assert all(frame.denoised is None and frame.sigma is None for frame in report.frames)
    assert "order drawn at random" in page
    assert report.quartiles[0].values == ()
    assert report.quartiles[0].mean > 0


def test_energies_and_steps_of_a_discrete_process(tmp_path: Path, images: Path) -> None:
    report, _ = of_kind(tmp_path, energy_pipeline(data={"num_classes": 2}), images)
    assert len(report.quartiles[0].values) == 4
    discrete = {
        "preconditioning": {"kind": "discrete", "prediction": "eps"},
        "objective": {"kind": "discrete"},
        "sampling": {"kind": "ddpm", "steps": "3"},
    }
    pipe = build_pipeline(parse_recipe(merge(BASE, discrete)))
    report, _ = of_kind(tmp_path / "discrete", pipe, images)
    assert len(report.frames) == 3
    assert len(report.quartiles[0].values) == 4


def test_latents_are_decoded_and_searched_as_they_are(tmp_path: Path) -> None:
    vae = save_vae(tmp_path / "vae")
    pictures = write_packed(
        tmp_path / "x.safetensors", random_images(40, size=16), labels=[i % 2 for i in range(40)]
    )
    latents = tmp_path / "z.safetensors"
    call("data", "latents", pictures, latents, "--vae", vae)
    pipe = build_pipeline(latent_recipe(vae, latents, data={"held_out": 0.6}))
    pipe.save(tmp_path / "p")
    report = measure_run(tmp_path / "p", samples=4)
    page = render(report)
    assert report.made is not None
    assert report.made.images.shape == (4, 16, 16, 3)
    assert report.made.space.shape == (4, 4, 8, 8)
    assert {real.shape[1:] for real in report.real.values()} == {(16, 16, 3)}
    assert report.copies is not None
    assert report.copies.near is not None
    assert not report.copies.pixels
    assert report.copies.pairs[0].training.shape == (16, 16, 3)
    assert "units of latents" in page
    assert "eval reference IMAGES" in page


# ------------------------------------------------------------------------------------ the command


def call(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    outcome = call("report", run, "guidance=1.5", "--samples", 10, "--out", out)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout == f"written to {out}\n"
    assert "guidance=1.5" in out.read_text("utf-8")


def test_a_training_writes_its_report_if_asked(run: Path, tmp_path: Path) -> None:
    small = ("training.images=16", "sampling.steps=1", "sampling.solver=euler")
    recipe = ("train", run / "recipe.yaml", *small)
    outcome = call(*recipe, f"run.dir={tmp_path / 'b'}", "run.report=true")
    assert outcome.exit_code == 0, outcome.output
    assert f"the report is {tmp_path / 'b' / 'report.html'}" in outcome.stdout
    assert (tmp_path / "b/report.html").is_file()
    assert call(*recipe, f"run.dir={tmp_path / 'c'}").exit_code == 0
    assert not (tmp_path / "c/report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere.zip"], "there is nothing at"),
        (["--held-out", "nowhere.zip"], "data.validation: there is nothing at"),
        (["--reference", "nowhere.npz"], "there is no such file"),
        (["stesp=3"], "stesp"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_lost(
    run: Path, page: str, words: list[str], message: str
) -> None:
    outcome = call("report", run, "--samples", 4, *words)
    assert isinstance(outcome.exception, TesseraError)
    assert message in str(outcome.exception)
    assert (run / "report.html").read_text("utf-8") == page


def test_no_run_no_report(tmp_path: Path) -> None:
    with pytest.raises(TesseraError, match="no pipeline"):
        write_report(tmp_path / "nothing", tmp_path / "x.html")
    with pytest.raises(TesseraError, match="two or more"):
        write_report(tmp_path / "nothing", tmp_path / "x.html", samples=1)
    assert not (tmp_path / "x.html").exists()

"""Previews of given classes, histograms, and numbers that modules report."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training_parallel import in_processes
from test_training_tracking import Wandb
from torch import nn
from training_case import read_metrics, tiny_recipe

from tessera.errors import RecipeError, TesseraError, TrainingError
from tessera.model import reported
from tessera.pipelines.diffusion import DiffusionPipeline
from tessera.recipes.schema import PreviewConfig
from tessera.training.histograms import Histograms, histogram
from tessera.training.preview import shown_labels
from tessera.training.trainer import Trainer

# ------------------------------------------------------------------------------------ previews


@pytest.mark.parametrize(
    ("rows", "columns", "labels", "expected"),
    [
        (2, 3, None, [0, 1, 2, 0, 1, 2]),
        (2, 3, (7, 5), [7, 5, 7, 7, 5, 7]),
        (2, 3, (7, 5, 1), [7, 5, 1, 7, 5, 1]),
        (2, 2, (4, 3, 2), [4, 3, 2, 4]),
        (1, 2, (-1,), [-1, -1]),
    ],
)
def test_classes_of_a_grid(rows: int, columns: int, labels: Any, expected: list[int]) -> None:
    config = PreviewConfig(rows=rows, columns=columns, labels=labels)
    assert shown_labels(config, 10) == expected
    assert shown_labels(PreviewConfig(rows=rows, columns=columns), 0) is None


def test_previews_show_the_classes_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    real = DiffusionPipeline.sample

    def sample(self: Any, seeds: Any, labels: Any = None, **options: Any) -> Any:
        asked.append(labels)
        return real(self, seeds, labels, **options)

    monkeypatch.setattr(DiffusionPipeline, "sample", sample)
    preview = {"every_images": 16, "rows": 2, "columns": 2, "labels": "1,0"}
    recipe = tiny_recipe(tmp_path, training={"images": 16}, run={"preview": preview})
    Trainer(recipe, tmp_path / "run").run()
    assert asked == [["1", "0", "1", "0"]]


@pytest.mark.parametrize(
    ("labels", "data", "message"),
    [
        ([2], {}, r"run\.preview\.labels: there is no class 2"),
        (["cat"], {}, r"run\.preview\.labels: there is no class 'cat'"),
        ([0], {"num_classes": 0}, r"run\.preview\.labels: .*without classes"),
        ([0, 1, 0, 1, 0], {}, "labels has 5 classes, and rows x columns shows 4"),
        ([], {}, "run.preview.labels"),
    ],
)
def test_classes_that_there_are_not(
    tmp_path: Path, labels: list[Any], data: dict[str, Any], message: str
) -> None:
    preview = {"rows": 2, "columns": 2, "labels": labels}
    with pytest.raises(RecipeError, match=message):
        Trainer(tiny_recipe(tmp_path, data=data, run={"preview": preview}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------- histograms


@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50))
def test_a_histogram_counts_every_value(values: list[float]) -> None:
    found = histogram(torch.tensor([*values, torch.nan, torch.inf]))
    assert found is not None
    assert found.counts.sum() == len(values)
    assert len(found.edges) == len(found.counts) + 1
    assert (np.diff(found.edges) > 0).all()
    assert found.total == pytest.approx(sum(np.float32(values).astype(float)), abs=1e-3)


def test_no_values_no_histogram() -> None:
    assert histogram(torch.tensor([torch.nan])) is None
    assert histogram(torch.zeros(0)) is None


class Kept:
    """A tracker that keeps histograms."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, dict[str, Any]]] = []

    def histograms(self, histograms: dict[str, Any], images: int) -> None:
        self.taken.append((images, histograms))


def test_weights_and_gradients_of_every_parameter(tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(tmp_path, optimizer={"clip_norm": 0.01}), tmp_path / "run")
    steps = trainer.steps()
    next(steps)
    kept = Kept()
    Histograms([kept]).make(trainer.learner, 8)  # type: ignore[list-item]
    ((images, found),) = kept.taken
    assert images == 8
    names = [n.removeprefix("model.") for n, _ in trainer.learner.step.named_parameters()]
    assert {n for n in found if n.startswith("weights/")} == {f"weights/{n}" for n in names}
    assert {n for n in found if n.startswith("gradients/")} == {f"gradients/{n}" for n in names}
    for name, parameter in trainer.learner.step.named_parameters():
        spread = found[f"weights/{name.removeprefix('model.')}"]
        assert spread.counts.sum() == parameter.numel()
        assert spread.edges[-1] >= parameter.max()
    # Those that the optimiser used: the norm of all of them is the largest allowed.
    squares = sum(h.squares for n, h in found.items() if n.startswith("gradients/"))
    assert squares**0.5 == pytest.approx(0.01, rel=1e-3)
    steps.close()


def test_histograms_go_to_tensorboard_and_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fake = Wandb()
    fake.Histogram = lambda np_histogram: SimpleNamespace(made=np_histogram)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    run = {"wandb": "mine", "tensorboard": True, "histograms_every_images": 16}
    recipe = tiny_recipe(tmp_path, training={"images": 32}, run=run)
    Trainer(recipe, tmp_path / "run").run()
    sent = [line for line in fake.asked("log") if any("/" in name for name in line)]
    assert [line["images"] for line in sent] == [16, 32]
    name = next(name for name in sent[0] if name.startswith("gradients/"))
    counts, edges = sent[0][name].made
    assert len(edges) == len(counts) + 1

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"histograms": 0})
    events.Reload()
    shown = events.Histograms(name)
    assert [event.step for event in shown] == [16, 32]
    assert shown[0].histogram_value.num == counts.sum()


def test_training_is_the_same_with_histograms(tmp_path: Path) -> None:
    weights = []
    for name, every in (("with", 8), ("without", None)):
        run = {"histograms_every_images": every}
        trainer = Trainer(tiny_recipe(tmp_path, run=run), tmp_path / name)
        trainer.run()
        weights.append(trainer.learner.average(0))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


def _sharded_histograms(folder: Path, run_dir: Path) -> None:
    recipe = tiny_recipe(folder, training={"images": 16, "parallel": "fsdp"})
    trainer = Trainer(recipe, run_dir)
    steps = trainer.steps()
    next(steps)
    kept = Kept()
    Histograms([kept]).make(trainer.learner, 8)  # type: ignore[list-item]
    found = kept.taken[0][1]
    for name, parameter in trainer.learner.step.model.named_parameters():
        assert found[f"weights/{name}"].counts.sum() == parameter.numel()
        assert found[f"gradients/{name}"].counts.sum() == parameter.numel()
    steps.close()


def test_shards_are_put_together(tmp_path: Path) -> None:
    in_processes(2, _sharded_histograms, tmp_path, tmp_path / "run")


# ------------------------------------------------------------------------- numbers of modules


class Telling(nn.Module):
    def __init__(self, **numbers: Any) -> None:
        super().__init__()
        self.numbers = numbers

    def reports(self) -> dict[str, Any]:
        return self.numbers


def test_numbers_of_modules_are_logged(tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(tmp_path, training={"images": 32}), tmp_path / "run")
    network = trainer.learner.step.model.network
    asked: list[int] = []

    def reports() -> dict[str, torch.Tensor]:
        asked.append(trainer.images_seen)
        first = next(iter(network.parameters()))
        return {"first_weight": first.flatten()[0], "nothing": torch.tensor(torch.nan)}

    network.reports = reports
    trainer.run()
    lines = read_metrics(tmp_path / "run")
    assert asked == [line["images"] for line in lines] == [8, 16, 32]
    assert len({line["first_weight"] for line in lines}) > 1
    assert lines[-1]["first_weight"] == next(iter(network.parameters())).flatten()[0].item()
    assert [line["nothing"] for line in lines] == [None] * 3


def test_names_that_are_taken(tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(tmp_path), tmp_path / "run")
    trainer.learner.step.model.network.reports = lambda: {"loss": torch.zeros(())}
    with pytest.raises(TrainingError, match=r"reports\(\) names loss"):
        trainer.run()


def test_numbers_that_cannot_be() -> None:
    one = torch.zeros(())
    assert reported(nn.Sequential(Telling(a=one), nn.Linear(1, 1), Telling(b=one))).keys() == {
        "a",
        "b",
    }
    with pytest.raises(TesseraError, match="two modules name 'a'"):
        reported(nn.Sequential(Telling(a=one), Telling(a=one)))
    with pytest.raises(TesseraError, match="Telling: 'a' is no tensor of one number"):
        reported(Telling(a=torch.zeros(2)))

"""Where metrics and pictures go: JSON lines, TensorBoard, Weights & Biases, lines on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from training_case import tiny_recipe

from tessera.errors import TesseraError, TrainingError
from tessera.training import tracking
from tessera.training.trainer import Trainer


class Wandb:
    """Stands for the package and for its run: notes what it is asked to do."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.Image = SimpleNamespace

    def init(self, **options: Any) -> Wandb:
        self.calls.append(("init", options))
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.calls.append(("define_metric", (name, step_metric)))

    def log(self, values: dict[str, Any]) -> None:
        self.calls.append(("log", values))

    def finish(self) -> None:
        self.calls.append(("finish", None))

    def asked(self, name: str) -> list[Any]:
        return [what for call, what in self.calls if call == name]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    return fake


def test_wandb_gets_metrics_and_previews_and_a_resumed_run_continues(
    wandb: Wandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb, "Image", lambda image: np.asarray(image).shape, raising=False)
    recipe = tiny_recipe(
        tmp_path,
        training={"images": 32},
        run={"wandb": "mine", "preview": {"every_images": 32, "rows": 1, "columns": 2}},
    )
    Trainer(recipe, tmp_path / "run").run()
    (options,) = wandb.asked("init")
    assert (options["project"], options["name"]) == ("mine", "run")
    assert options["config"]["training"]["images"] == 32
    assert wandb.asked("define_metric") == [("*", "images")]
    lines = [line for line in wandb.asked("log") if "loss" in line]
    written = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert lines == [json.loads(line) for line in written]
    (preview,) = [line for line in wandb.asked("log") if "samples" in line]
    assert preview["images"] == 32
    assert preview["samples"][2] == 3
    assert wandb.asked("finish") == [None]

    longer = recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"images": 48})}
    )
    Trainer(longer, resume=tmp_path / "run").run()
    again = wandb.asked("init")[1]
    assert again["id"] == options["id"]
    assert again["resume"] == "allow"


def test_wandb_that_refuses_the_run_is_explained(
    wandb: Wandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise Wandb.Error("no API key")

    monkeypatch.setattr(wandb, "init", refuse, raising=False)
    recipe = tiny_recipe(tmp_path, run={"wandb": "mine"})
    with pytest.raises(TrainingError, match=r"no API key.*run\.wandb=null.*--resume"):
        Trainer(recipe, tmp_path / "run").run()


def test_wandb_that_is_not_installed_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    recipe = tiny_recipe(tmp_path, run={"wandb": "mine"})
    with pytest.raises(TesseraError, match=r"install .*\[log\]"):
        Trainer(recipe, tmp_path / "run").run()


def test_values_that_do_not_exist_are_left_out(wandb: Wandb, tmp_path: Path) -> None:
    tracker = tracking.WeightsAndBiases(tmp_path, "mine", tiny_recipe(tmp_path))
    tracker.log({"images": 8, "loss": None, "lr": 0.5})
    assert wandb.asked("log") == [{"images": 8, "lr": 0.5}]


@pytest.mark.parametrize(
    "foreign",
    [
        b'{"images": 16, "lo',
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"17",
        b"null",
        b'{"images": "16"}',
        b'{"images": null}',
        b'{"images": true}',
        b'{"images": NaN}',
        b'{"step": 3}',
        b'{"images": 8, "a": {"b": 1}}',
        b"[" * 100_000,
        b'{"images":' * 50_000,
        b"1" * 5000,
        b'"' + b"x" * 2**21 + b'"',
        b"\x00" * 100,
    ],
)
@pytest.mark.parametrize("end", [b"", b"\n", b'\n{"images": 24, "loss": 2}\n'])
def test_lines_that_are_none_of_ours_are_cut(
    foreign: bytes, end: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    good = b'{"images": 8, "loss": 1.5}\n{"images": 16, "loss": null}\n'
    path.write_bytes(good + foreign + end)
    tracking.cut_lines(path, 24)
    assert path.read_bytes() == good + end.removeprefix(b"\n")
    message = capsys.readouterr().err
    assert "metrics.jsonl: 1 of " in message
    assert "(line 3)" in message
    tracking.cut_lines(path, 8)
    assert path.read_bytes() == good.splitlines(keepends=True)[0]
    assert capsys.readouterr().err == ""

"""Energies trained by every engine: recomputing, bfloat16, two processes, shards, compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes_case import in_processes
from safetensors.torch import load_file
from torch import nn
from training_case import read_metrics, tiny_recipe

from tessera.pipelines.loading import load
from tessera.recipes.overrides import merge
from tessera.training.trainer import Trainer

pytestmark = pytest.mark.slow

ALL_TERMS: dict[str, Any] = {
    "network": {
        "kind": "energy_dit", "size": "S/2", "depth": 1, "width": 16, "heads": 2,
        "step_size": 0.05, "learn_step_size": True,
    },
    "energy": {"contrastive": 0.05, "refinement": 0.1, "contrastive_steps": 2},
    "training": {"images": 32},
    "run": {"preview": {"every_images": 32, "rows": 1, "columns": 2}},
}  # fmt: skip


def train(folder: Path, run_dir: Path, changes: dict[str, Any]) -> None:
    Trainer(tiny_recipe(folder, **merge(ALL_TERMS, changes)), run_dir).run()


def averaged(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "pipeline" / "model.safetensors")


def assert_same_runs(one: Path, other: Path, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(averaged(one), averaged(other), atol=1e-5, rtol=rtol)
    for a, b in zip(read_metrics(one), read_metrics(other), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    assert len(list((other / "previews").glob("*.png"))) == 1


def test_recomputing_trains_the_same(tmp_path: Path) -> None:
    for name, changes in (("plain", {}), ("less", {"network": {"recompute": True}})):
        train(tmp_path, tmp_path / name, changes)
    assert_same_runs(tmp_path / "plain", tmp_path / "less")


@pytest.mark.parametrize("attention", ["explicit", "math"])
def test_every_kind_of_attention_trains_the_same(tmp_path: Path, attention: str) -> None:
    for name, changes in (("plain", {}), ("other", {"network": {"attention": attention}})):
        train(tmp_path, tmp_path / name, changes)
    assert_same_runs(tmp_path / "plain", tmp_path / "other")


def test_micro_batches_train_the_same(tmp_path: Path) -> None:
    for name, micro in (("plain", None), ("parts", 4)):
        train(tmp_path, tmp_path / name, {"training": {"micro_batch": micro}})
    assert_same_runs(tmp_path / "plain", tmp_path / "parts")


def test_bfloat16_is_near(tmp_path: Path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        train(tmp_path, tmp_path / precision, {"training": {"precision": precision}})
        losses.append(read_metrics(tmp_path / precision)[-1]["loss"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_the_same(tmp_path: Path, parallel: str) -> None:
    changes = {"training": {"parallel": parallel}}
    train(tmp_path, tmp_path / "one", changes)
    in_processes(2, train, tmp_path, tmp_path / "two", changes)
    assert_same_runs(tmp_path / "one", tmp_path / "two", rtol=1e-3)
    assert load(tmp_path / "two").sample([0], labels=1).shape == (1, 8, 8, 3)


@pytest.mark.slow
def test_a_compiled_run_is_an_eager_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile_with(self: nn.Module, **options: Any) -> None:
        compiled.append(type(self).__name__)
        function = torch.compile(self._call_impl, backend="aot_eager", **options)
        self._compiled_call_impl = function  # type: ignore[assignment]

    monkeypatch.setattr(nn.Module, "compile", compile_with)
    train(tmp_path, tmp_path / "eager", {})
    torch._dynamo.reset()
    train(tmp_path, tmp_path / "compiled", {"training": {"compile": True}})
    assert compiled == ["EnergyDiT"]
    assert_same_runs(tmp_path / "eager", tmp_path / "compiled", rtol=1e-3)

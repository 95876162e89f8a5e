"""What `auto` is: by device, in recipes, in runs, and while sampling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_pipeline import tiny_pipeline
from training_case import tiny_recipe
from typer.testing import CliRunner

from tessera import distributed, precision
from tessera.cli import app
from tessera.precision import fast_dtype, reason, resolve  # before the tests' own is in its place
from tessera.recipes.loading import dump_recipe, load_recipe, parse_recipe, shipped
from tessera.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies bfloat16."""
    monkeypatch.setattr(precision, "fast_dtype", lambda device: torch.bfloat16)


@pytest.mark.parametrize(
    ("found", "dtype"),
    [
        ({"avx2": True, "avx512_f": True}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_bfloat16_is_fast_where_the_processor_multiplies_it(
    found: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    monkeypatch.setattr(precision, "fast_dtype", fast_dtype)
    assert fast_dtype(CPU) == dtype
    native = dtype == torch.bfloat16
    assert resolve("auto", CPU) == ("bf16" if native else "fp32")
    assert resolve("bf16", CPU) == "bf16"
    assert resolve("fp32", CPU) == "fp32"
    assert ("emulation" in reason("auto", CPU)) != native
    assert ("emulation" in reason("bf16", CPU)) != native
    assert "recipe" in reason("fp32", CPU)


def test_all_processes_take_what_is_fast_on_all(
    native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "gather", lambda value: [value, False])
    assert resolve("auto", CPU) == "bf16"
    assert resolve("auto", CPU, together=True) == "fp32"


@pytest.mark.parametrize("name", shipped())
def test_every_recipe_leaves_it_to_the_device(name: str) -> None:
    assert load_recipe(name).training.precision == "auto"


def test_other_precisions_stay_as_they_were_written() -> None:
    for chosen in ("fp32", "bf16", "fp16"):
        written = dump_recipe(load_recipe("cifar10-small", [f"training.precision={chosen}"]))
        assert parse_recipe(written).training.precision == chosen


def test_a_run_keeps_what_auto_was_when_it_began(native: None, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, training={"precision": "auto", "images": 16})
    trainer = Trainer(recipe, tmp_path / "run")
    assert "natively" in trainer.precision_reason
    assert trainer.learner.training.precision == "bf16"
    trainer.run()
    assert load_recipe(tmp_path / "run" / "recipe.yaml").training.precision == "bf16"
    with pytest.MonkeyPatch.context() as patch:  # the same folder on another machine
        patch.setattr(precision, "fast_dtype", lambda device: torch.float32)
        assert Trainer(resume=tmp_path / "run").recipe.training.precision == "bf16"


def test_a_resumed_run_changes_it_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path, training={"precision": "fp16", "images": 16})
    Trainer(recipe, tmp_path / "run").run()
    arguments = ["train", "--resume", str(tmp_path / "run"), "training.images=32"]
    result = CliRunner().invoke(app, [*arguments, "training.precision=auto"])
    assert result.exit_code == 0, result.output
    assert "was fp16 and is fp32" in result.stderr
    assert "no longer equal" in result.stderr
    assert "fp32 (auto: this processor" in " ".join(result.stdout.split())
    again = Trainer(resume=tmp_path / "run")
    assert again.recipe.training.precision == "fp32"
    # The scale of fp16 has not come along.
    assert again.learner.counters()["loss_scale"] == 1
    assert "was fp16" not in capsys.readouterr().err


def test_samples_are_made_in_what_is_fast(native: None, tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    assert (pipe.sample(range(4)) == pipe.sample(range(4), precision="bf16")).all()
    assert (pipe.sample(range(4)) != pipe.sample(range(4), precision="fp32")).any()
    pipe.save(tmp_path / "tiny")
    out = str(tmp_path / "samples")
    arguments = ["sample", str(tmp_path / "tiny"), "--seeds", "0-1", "--out", out]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert '"precision": "bf16"' in (tmp_path / "samples" / "sampling.json").read_text()

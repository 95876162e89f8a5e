"""What relays and other saved models cost, and their scores, from the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from data_files import random_images, write_packed
from relay_tiny import FIRST, SECOND, pipeline, recipe, run
from training_case import read_metrics

import tessera
from tessera.errors import RecipeError, TesseraError
from tessera.pipelines.experts import assemble
from tessera.pipelines.relay import RelayPipeline, assemble_relay
from tessera.training.trainer import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a relay in r."""
    made = tmp_path_factory.mktemp("costs")
    assemble_relay([pipeline(FIRST, name="low"), pipeline(SECOND, name="high")]).save(made / "r")
    return made


def test_costs_of_a_folder(folder: Path) -> None:
    relay = tessera.load(folder / "r", device="cpu")
    assert isinstance(relay, RelayPipeline)
    first, second = relay.costs(**{"first.steps": 9}).values()
    assert first.evaluations == 17
    assert second == relay.pipes[1].cost()
    told = json.loads(run("cost", folder / "r", "--sample", "first.steps=9", "--json"))
    assert [*told["stages"]] == ["first", "second"]
    for name, cost in (("first", first), ("second", second)):
        own = told["stages"][name]
        assert own == dataclasses.asdict(cost) | {"train_bytes": cost.train_bytes}
    for key in ("sample_flops", "evaluations", "parameters", "images", "run_flops"):
        assert told[key] == getattr(first, key) + getattr(second, key)
    table = run("cost", folder / "r", "--sample", "stages=second")
    rows = [row.split() for row in table.splitlines()]
    assert any(row[:1] == ["second"] and str(second.evaluations) in row for row in rows)
    assert not any(row[:1] == ["first"] for row in rows)
    assert "skipped" not in table
    assert max(map(len, table.splitlines())) <= 80


def test_costs_of_single_models_and_experts(folder: Path) -> None:
    one = pipeline(FIRST)
    one.save(folder / "one")
    told = json.loads(run("cost", folder / "one", "--json"))
    assert "stages" not in told
    assert told["evaluations"] == 3
    experts = assemble([pipeline(snr_splits=[4.0], expert=index) for index in range(2)])
    experts.save(folder / "e")
    assert "3 evaluations" in run("cost", folder / "e")


def test_what_only_recipes_take_is_refused(folder: Path) -> None:
    for arguments in (["training.batch=4"], ["--probe"]):
        with pytest.raises(TesseraError, match=rf"{arguments[0]} would be of a recipe.*--sample"):
            run("cost", folder / "r", *arguments)
    with pytest.raises(TesseraError, match="both take it"):
        run("cost", folder / "r", "--sample", "steps=3")
    with pytest.raises(RecipeError, match="no recipe is called"):
        run("cost", "nothing-like-it")


def test_a_second_stage_is_shown_and_scored_while_it_trains(folder: Path) -> None:
    path = folder / "d.safetensors"
    write_packed(path, random_images(30), labels=[i % 2 for i in range(30)])
    made = recipe(
        SECOND,
        data={"path": str(path)},
        training={"images": 32},
        run={"preview": {"every_images": 16, "rows": 1, "columns": 2}},
        evaluate={"every_images": 16, "images": 16, "metrics": ["fd"], "features": "classifier"},
    )
    Trainer(made, folder / "second").run()
    assert len(list((folder / "second" / "previews").glob("*.png"))) == 2
    scores = [row for row in read_metrics(folder / "second") if "evaluate/fd" in row]
    assert [row["images"] for row in scores] == [16, 32]
    assert all(row["evaluate/fd"] > 0 for row in scores)
    assert (folder / "second" / "best" / "pipeline" / "config.json").is_file()
    # The relay of it is scored from seeds alone, like any pipeline.
    run("relay", folder / "r" / "stage-0", folder / "second", folder / "whole")
    told = run("eval", "score", folder / "whole", path, "--features", "classifier", "--num", "16",
               "--training-images", "64", "--device", "cpu", "--json")  # fmt: skip
    result = json.loads(told[told.index("{") :])
    assert any(isinstance(value, float) and value > 0 for value in result.values())
    with pytest.raises(TesseraError, match=r"starts from pictures .*samples first.*tessera sample"):
        run("eval", "score", folder / "second", path, "--features", "classifier", "--num", "16",
            "--training-images", "64", "--device", "cpu")  # fmt: skip

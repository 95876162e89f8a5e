"""Two gloo processes against one: DDP, FSDP2, checkpoints that change hands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from processes_case import in_processes
from safetensors.torch import load_file
from training_case import read_metrics, tiny_recipe

from tessera import distributed
from tessera.training.trainer import Trainer

TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


def train(folder: Path, run_dir: Path, changes: dict[str, Any]) -> None:
    """A run that records, on every process, what each step trained on."""
    trainer = Trainer(tiny_recipe(folder, **changes), run_dir)
    objective, seen = trainer.learner.step.objective, []

    def recording(denoiser, x, cond, draws):
        seen.append(
            {
                "numbers": draws.images,
                "x": x.contiguous(),
                "labels": cond.labels,
                "sigma": objective.sigma(draws),
                "noise": draws.normal("noise", *x.shape[1:]),
                "loss": (terms := objective(denoiser, x, cond, draws))["loss"].detach(),
            }
        )
        return terms

    trainer.learner.step.objective = recording
    trainer.run()
    torch.save(seen, run_dir / f"seen-{distributed.rank()}.pt")


def resume(run_dir: Path) -> None:
    Trainer(resume=run_dir).run()


def recorded(run_dir: Path, world: int) -> dict[str, torch.Tensor]:
    """What all processes trained on, in the order of image numbers."""
    rounds = [r for k in range(world) for r in torch.load(run_dir / f"seen-{k}.pt")]
    joined = {name: torch.cat([r[name] for r in rounds]) for name in rounds[0]}
    order = joined["numbers"].argsort()
    return {name: tensor[order] for name, tensor in joined.items()}


def averaged(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "pipeline" / "model.safetensors")


def assert_close_runs(one: Path, other: Path) -> None:
    for a, b in zip(read_metrics(one), read_metrics(other), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    expected, actual = averaged(one), averaged(other)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, **TOLERANCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


CHANGES = {
    "training": {"images": 64, "micro_batch": 2},
    "augment": {"p": 0.5, "yflip": 1},
    # A large epsilon keeps Adam from turning rounding noise into whole steps.
    "optimizer": {"eps": 1e-2, "clip_norm": 20},
    "run": {"log_every_images": 16, "checkpoint_every_images": 32},
}


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    tiny_recipe(folder)
    in_processes(1, train, folder, folder / "alone", CHANGES)
    return folder / "alone"


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_train_as_one(mode: str, alone: Path, folder: Path) -> None:
    changes = {**CHANGES, "training": {**CHANGES["training"], "parallel": mode}}
    in_processes(2, train, folder, folder / mode, changes)
    one, two = recorded(alone, 1), recorded(folder / mode, 2)
    assert torch.equal(one["numbers"], torch.arange(64))
    for name in ("numbers", "x", "labels", "sigma", "noise"):
        assert torch.equal(one[name], two[name]), name
    torch.testing.assert_close(one["loss"], two["loss"], rtol=1e-4, atol=1e-4)
    assert_close_runs(alone, folder / mode)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2)])
def test_sharded_checkpoints_change_hands(
    before: int, after: int, alone: Path, folder: Path
) -> None:
    run_dir = folder / f"sharded-{before}-{after}"
    training = {**CHANGES["training"], "parallel": "fsdp"}
    in_processes(before, stop_after, folder, run_dir, {**CHANGES, "training": training}, 4)
    kinds = {p.name for p in (run_dir / "checkpoints" / "000000000032").iterdir()}
    assert ("shards" in kinds) == (before > 1)
    in_processes(after, resume, run_dir)
    assert_close_runs(alone, run_dir)


@pytest.mark.slow
def test_a_resumed_sharded_run_is_equal_bit_for_bit(folder: Path) -> None:
    """With the usual epsilon, by which Adam makes whole steps of any difference."""
    changes = {"training": {"images": 64, "parallel": "fsdp"}, "run": CHANGES["run"]}
    in_processes(2, train, folder, folder / "unbroken", changes)
    in_processes(2, stop_after, folder, folder / "broken", changes, 6)
    in_processes(2, resume, folder / "broken")
    assert read_metrics(folder / "unbroken") == read_metrics(folder / "broken")
    shards = Path("checkpoints") / "000000000064" / "shards"
    files = sorted((folder / "unbroken" / shards).iterdir())
    assert len(files) == 2
    for file in files:
        expected, found = load_file(file), load_file(folder / "broken" / shards / file.name)
        assert {name.split("/")[0] for name in expected} == {"model", "ema-0", "optimizer"}
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name


def stop_after(folder: Path, run_dir: Path, changes: dict[str, Any], count: int) -> None:
    steps = Trainer(tiny_recipe(folder, **changes), run_dir).steps()
    for _ in range(count):
        next(steps)
    steps.close()


def fail_on_one(folder: Path, run_dir: Path, changes: dict[str, Any]) -> None:
    """Gradients that are not finite on the second process alone."""
    trainer = Trainer(tiny_recipe(folder, **changes), run_dir)
    good = trainer.learner.step.objective

    def bad(denoiser, x, cond, draws):
        factor = float("nan") if distributed.rank() == 1 else 1.0
        return {"loss": good(denoiser, x, cond, draws)["loss"] * factor}

    bits = []
    for report in trainer.steps():
        bits.append(float(report.update.bad))
        trainer.learner.step.objective = bad if report.step == 1 else good
    assert bits == [0, 1, 0, 0]
    assert trainer.learner.counters()["skipped"] == 1
    assert trainer.learner.weights_finite()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_processes_agree_on_a_bad_step(mode: str, folder: Path) -> None:
    changes = {"training": {"images": 32, "parallel": mode}}
    in_processes(2, fail_on_one, folder, folder / f"bad-{mode}", changes)


def signalled(folder: Path, run_dir: Path, changes: dict[str, Any]) -> None:
    """A signal that reaches the second process alone."""
    import signal

    trainer = Trainer(tiny_recipe(folder, **changes), run_dir)
    for report in trainer.steps():
        if report.step == 2 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    assert trainer.stopped_by == signal.SIGTERM
    assert distributed.gather(trainer.images_seen) == [trainer.images_seen] * 2
    assert trainer.images_seen < 96


def test_processes_stop_together(folder: Path) -> None:
    in_processes(2, signalled, folder, folder / "signalled", {})
    assert list((folder / "signalled" / "checkpoints").iterdir())


def test_batch_must_be_shared_equally(folder: Path) -> None:
    with pytest.raises(mp.ProcessRaisedException, match=r"training\.batch \(9\)"):
        in_processes(2, train, folder, folder / "odd", {"training": {"batch": 9}})

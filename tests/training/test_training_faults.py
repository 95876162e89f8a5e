"""Full disks, no memory left, processes gone: one line, and nothing that was saved is lost."""

from __future__ import annotations

import errno
import json
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import fork, fork_ranks
from safetensors import SafetensorError
from test_training_parallel import in_processes
from training_case import read_metrics, tiny_recipe, write_recipe

import tessera
from tessera import distributed, memory
from tessera.errors import RecipeError, TesseraError, TrainingError
from tessera.recipes.loading import load_recipe
from tessera.training import checkpoints, tracking
from tessera.training.trainer import Trainer


def hidden(folder: Path) -> list[Path]:
    """Left-overs of what was being written."""
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    return Trainer(resume=run_dir).learner.tensors()


def assert_equal_runs(one: Path, other: Path) -> None:
    assert read_metrics(one) == read_metrics(other)
    expected, found = state(one), state(other)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run that met no fault: 96 images, checkpoints at 32, 64 and 96."""
    Trainer(tiny_recipe(folder), folder / "whole").run()
    return folder / "whole"


def fails_at(count: int, function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    """`function`, whose call number `count` and all later ones raise."""
    calls: list[int] = []

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) >= count:
            raise error
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "x"), "the disk is full"),
        (OSError(errno.EDQUOT, "x"), "your quota of the disk is used up"),
        (SafetensorError("Error: I/O error: File too large (os error 27)"), "ulimit -f"),
        (OSError(errno.EROFS, "x"), "the disk can only be read from"),
    ],
)
def test_a_full_disk_names_the_last_good_checkpoint(
    error: Exception, words: str, whole: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = folder / f"full-{words.split()[1]}-{words.split()[-1]}"
    with monkeypatch.context() as patch:
        # Three files a checkpoint: the second one fails at its second file.
        patch.setattr(checkpoints, "save_file", fails_at(5, checkpoints.save_file, error))
        with pytest.raises(TrainingError) as raised:
            Trainer(tiny_recipe(folder), run_dir).run()
    text = str(raised.value)
    assert f"{run_dir}/checkpoints/000000000064 cannot be written: " in text
    assert words in text
    assert f"The last good checkpoint is {run_dir}/checkpoints/000000000032" in text
    assert f"tessera train --resume {run_dir}" in text
    assert "\n" not in text
    assert not hidden(run_dir)
    Trainer(resume=run_dir).run()
    assert_equal_runs(whole, run_dir)


def test_metrics_that_cannot_be_written_end_the_run_in_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = folder / "full-metrics"
    full = OSError(errno.ENOSPC, "No space left on device")
    failing = SimpleNamespace(**vars(json))
    failing.dumps = fails_at(4, json.dumps, full)
    monkeypatch.setattr(tracking, "json", failing)
    with pytest.raises(
        TrainingError, match=r"metrics\.jsonl cannot be written: the disk is full.*000000000032"
    ):
        Trainer(tiny_recipe(folder), run_dir).run()


def test_the_command_ends_with_code_2_and_one_line(folder: Path) -> None:
    recipe = write_recipe(folder, tiny_recipe(folder))
    # Metrics and recipe are smaller than this, the files of a checkpoint larger.
    limit = 20_000
    process = fork(
        ["train", recipe, f"run.dir={folder / 'limited'}"],
        code=f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "from tessera.cli import main; main()",
    )
    _, errors = process.communicate()
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    assert "checkpoints/000000000032 cannot be written" in errors.splitlines()[-1]
    assert "No checkpoint had been written yet" in errors.splitlines()[-1]
    assert not hidden(folder / "limited")


def too_much_memory(*_: Any) -> None:
    torch.empty(2**58)


def no_memory(*_: Any) -> None:
    raise MemoryError


def primitive(*_: Any) -> None:
    raise RuntimeError("could not create a primitive")


@pytest.mark.parametrize("fault", [too_much_memory, no_memory, primitive])
def test_used_up_memory_says_what_to_do(
    fault: Callable[..., None], whole: Path, folder: Path
) -> None:
    run_dir = folder / f"memory-{fault.__name__}"
    trainer = Trainer(tiny_recipe(folder), run_dir)
    good = trainer.learner.step.objective

    def bad(*arguments: Any) -> Any:
        if trainer.images_seen == 48:
            fault()
        return good(*arguments)

    trainer.learner.step.objective = bad
    with pytest.raises(TrainingError) as raised:
        trainer.run()
    text = str(raised.value)
    assert "the memory is used up" in text
    assert "8 are a micro-batch" in text
    assert f"The last good checkpoint is {run_dir}/checkpoints/000000000032" in text
    assert text.endswith(f"tessera train --resume {run_dir} training.micro_batch=4")


def test_where_one_image_is_too_much_a_smaller_batch_is_not_advised(folder: Path) -> None:
    trainer = Trainer(tiny_recipe(folder, training={"micro_batch": 1}), folder / "memory-one")
    trainer.learner.step.objective = no_memory
    with pytest.raises(TrainingError, match=r"training\.parallel=fsdp.*No checkpoint had been"):
        trainer.run()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("can't start new thread"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("could not create a primitive descriptor for a convolution"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_words_for_used_up_memory(error: Exception, expected: bool) -> None:
    assert memory.used_up(error) is expected


# ----------------------------------------------------------------------------- other processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "process 0 of 2 lost another one, which has ended"),
        (signal.SIGSTOP, "which did not answer for 0.05 minutes.*run.timeout_minutes"),
    ],
)
def test_a_process_that_is_gone_or_silent_ends_the_others_in_one_line(
    number: signal.Signals, words: str, folder: Path
) -> None:
    run_dir = folder / f"gone-{number.name}"
    changes = {"training": {"images": 10_000_000}, "run": {"timeout_minutes": 0.05}}
    recipe = write_recipe(folder, tiny_recipe(folder, **changes))
    survivor, victim = fork_ranks(2, "train", recipe, f"run.dir={run_dir}")
    try:
        while not (run_dir / "pipeline").exists():
            assert survivor.poll() is None, survivor.communicate()[1]
            time.sleep(0.01)
        victim.send_signal(number)
        _, errors = survivor.communicate(timeout=120)
    finally:
        survivor.kill()
        victim.kill()
        victim.communicate()
    assert survivor.returncode == 2, errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert re.search(words, last), errors
    assert "The last good checkpoint is" in last


def test_other_errors_are_no_lost_processes() -> None:
    assert distributed.lost_process(RuntimeError("Connection closed by peer")) is None  # alone


def first_gradients(folder: Path, run_dir: Path, changes: dict[str, Any]) -> None:
    """Save Adam's first moments after one step: a share of the gradient."""
    trainer = Trainer(tiny_recipe(folder, **changes), run_dir)
    next(trainer.steps())
    from tessera.training import parallel

    moments = {
        name: parallel.whole(tensor).clone()
        for name, tensor in trainer.learner.tensors().items()
        if name.startswith("optimizer/exp_avg/")
    }
    if distributed.is_main():
        torch.save(moments, run_dir / "moments.pt")


def test_sharded_gradients_are_those_of_one_process_up_to_rounding(folder: Path) -> None:
    """What Adam makes of that is documented: whole steps where gradients are next to nothing."""
    tiny_recipe(folder)
    changes: dict[str, Any] = {"training": {"micro_batch": 4, "parallel": "fsdp"}}
    in_processes(1, first_gradients, folder, folder / "gradients-1", changes)
    in_processes(2, first_gradients, folder, folder / "gradients-2", changes)
    one, two = (torch.load(folder / f"gradients-{n}" / "moments.pt") for n in (1, 2))
    for name, tensor in one.items():
        error = (two[name] - tensor).norm() / tensor.norm().clamp(min=1e-30)
        assert error < 1e-5, name


# ------------------------------------------------------------------- keeping what was trained


def test_steps_left_early_can_be_saved_and_gone_on_with(whole: Path, folder: Path) -> None:
    trainer = Trainer(tiny_recipe(folder), folder / "early")
    for report in trainer.steps():
        if report.images == 56:
            break
    assert trainer.save() == folder / "early" / "checkpoints" / "000000000056"
    assert tessera.load(folder / "early").images_seen == 56
    resumed = Trainer(resume=folder / "early")
    assert resumed.images_seen == 56
    resumed.run()
    assert_equal_runs(whole, folder / "early")


def test_saving_between_steps_and_a_second_call_change_nothing(whole: Path, folder: Path) -> None:
    trainer = Trainer(tiny_recipe(folder), folder / "between")
    for report in trainer.steps():
        if report.images == 24:
            trainer.save()
        if report.images == 40:
            break
    trainer.run()
    assert_equal_runs(whole, folder / "between")


def test_the_pipeline_of_the_moment_stays_as_it_is(folder: Path) -> None:
    recipe = tiny_recipe(folder, ema=[{"halflife_images": 50}, {"halflife_images": 20}])
    trainer = Trainer(recipe, folder / "moment")
    for report in trainer.steps():
        if report.images == 40:
            break
    pipe = trainer.pipeline()
    assert (pipe.images_seen, pipe.emas) == (40, ("50", "20"))
    before = pipe.sample("0-1", 0)
    trainer.run()
    assert (pipe.sample("0-1", 0) == before).all()
    # The other average, too, is that of 40 images, not of now.
    pipe.save(folder / "moment-pipeline")
    then = tessera.load(folder / "moment-pipeline", ema="20").denoiser.state_dict()
    now = trainer.learner.average(1)
    assert any(not torch.equal(now[name], tensor) for name, tensor in then.items())
    assert (trainer.pipeline().sample("0-1", 0) != before).any()


def test_what_is_no_recipe_is_refused_with_what_to_give() -> None:
    with pytest.raises(TrainingError, match=r"load_recipe\(.*resume="):
        Trainer("cifar10-small")  # type: ignore[arg-type]


# ----------------------------------------------------------- refused before there is a folder


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"run": {"wandb": "mine"}}, TesseraError),
        ({"evaluate": {"reference": "nowhere.npz"}}, RecipeError),
    ],
)
def test_what_is_refused_leaves_no_run_folder(
    changes: dict[str, Any],
    error: type[TesseraError],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(error):
        Trainer(tiny_recipe(tmp_path, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    Trainer(tiny_recipe(tmp_path), tmp_path / "run")


def test_an_expert_makes_no_previews_and_scores_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(
        tmp_path, snr_splits=[0.25], expert=0, training={"images": 16},
        evaluate={"every_images": 8, "images": 10},
        run={"preview": {"every_images": 8, "rows": 1, "columns": 2}},
    )  # fmt: skip
    Trainer(recipe, tmp_path / "run").run()
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert len(notes) == 1
    assert "no previews and no scores" in notes[0]
    assert not {"previews", "best"} & {path.name for path in (tmp_path / "run").iterdir()}
    with pytest.raises(TesseraError, match=r"expert 0 of 0 to 1.*tessera experts"):
        tessera.load(tmp_path / "run").sample("0")


def test_the_limit_of_waiting_is_a_setting() -> None:
    assert load_recipe("cifar10-small").run.timeout_minutes == 30
    with pytest.raises(RecipeError, match=r"run\.timeout_minutes"):
        load_recipe("cifar10-small", ["run.timeout_minutes=0"])

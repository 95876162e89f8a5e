"""The example for Slurm: a run that is warned saves, and its job is queued again and goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from test_training_trainer import final_state
from training_case import read_metrics, start, tiny_recipe, write_recipe

from tessera.training.trainer import Trainer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "slurm.sh"
REQUEUED = 128 + signal.SIGUSR1


def test_the_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    text = SCRIPT.read_text()
    assert f"code == {REQUEUED}" in text
    assert re.search(r"^#SBATCH --signal=USR1@\d+$", text, re.M)  # no B:, so to the processes


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """srun runs its command with a warning after the first log line, where there is a file `late`;
    scontrol notes what it is asked."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "tessera").write_text(
        f'#!/bin/bash\nexec {sys.executable} -SE {forked.__file__} run {forked.server()} "$@"\n'
    )
    (commands / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\n')
    (commands / "srun").write_text(
        f"#!/bin/bash\nshift\n"
        f'echo "$@" >> {tmp_path}/started\n'
        f'if [[ -f {tmp_path}/late ]]; then "$@" & pid=$!\n'
        f"  until [[ -s {tmp_path}/run/metrics.jsonl ]] || ! kill -0 $pid; do sleep 0.01; done\n"
        f"  kill -USR1 $pid; wait $pid\n"
        f'else "$@"; fi\n'
    )
    for command in commands.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return tmp_path


def submit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), str(folder / "run"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_job_is_queued_again_until_the_run_is_done(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(cluster, training={"images": 160})
    path = write_recipe(cluster, recipe)
    (cluster / "late").touch()
    first = submit(cluster, str(path))
    assert first.returncode == REQUEUED, first.stderr
    assert (cluster / "asked").read_text() == "requeue 17\n"
    assert list((cluster / "run" / "checkpoints").iterdir())

    # The second time, the lock of a node that was lost may be left.
    (cluster / "late").unlink()
    (cluster / "run" / "run.lock").write_text('{"host": "gone", "pid": 1, "processes": 1}')
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = submit(cluster, str(path))
    assert second.returncode == 0, second.stderr
    assert (cluster / "asked").read_text() == "requeue 17\n"
    started = (cluster / "started").read_text().splitlines()
    assert started[0] == f"tessera train {path} run.dir={cluster / 'run'}"
    assert started[1] == f"tessera train --resume {cluster / 'run'}"

    Trainer(recipe, cluster / "whole").run()
    assert read_metrics(cluster / "run") == read_metrics(cluster / "whole")
    expected, found = final_state(cluster / "whole"), final_state(cluster / "run")
    assert all((expected[name] == found[name]).all() for name in expected)


def test_a_run_that_fails_is_not_queued_again(cluster: Path) -> None:
    failed = submit(cluster, "no-such-recipe")
    assert failed.returncode == 2
    assert not (cluster / "asked").exists()


def test_a_warning_saves_and_has_its_own_code(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_recipe(tmp_path, training={"images": 8 * 10**6}))
    process = start("train", str(recipe), f"run.dir={tmp_path / 'run'}")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate()
    assert process.returncode == REQUEUED, errors
    assert "stopped by SIGUSR1" in output
    assert list((tmp_path / "run" / "checkpoints").iterdir())

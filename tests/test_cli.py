"""The command as a user meets it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import typer

from tessera import cli
from tessera.cli import app
from tessera.metrics.images import ArrayImages
from tessera.metrics.reference import build_reference, save_reference

HEAVY = ("torch", "numpy", "PIL", "scipy", "sklearn", "matplotlib")


def commands(command: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and group below `command`."""
    inner = getattr(command, "commands", {})
    return [path, *(found for name, sub in inner.items() for found in commands(sub, (*path, name)))]


COMMANDS = commands(typer.main.get_command(app))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tessera", *arguments], capture_output=True, text=True, check=False
    )


def test_help_of_every_command_answers_without_torch() -> None:
    # One process for all: starting Python is what takes time.
    script = f"""
import contextlib, io, sys
from tessera import cli
from tessera.cli import app
for path in {COMMANDS!r}:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            app([*path, "--help"])
        except SystemExit as end:
            assert not end.code, path
    assert "Usage:" in text.getvalue(), path
print(*[name for name in {HEAVY!r} if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "", "imported for --help"


def test_every_command_says_what_it_does() -> None:
    root: Any = typer.main.get_command(app)
    for path in COMMANDS:
        command = root
        for name in path:
            command = command.commands[name]
        assert command.help, " ".join(path)


def test_version() -> None:
    result = run("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("tessera ")


def test_listing_recipes_needs_no_torch_and_fits_the_terminal() -> None:
    script = (
        "import sys; from tessera.cli import app; app(['recipes'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0
    assert "cifar10-small" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_shown_recipe_is_a_recipe_file(tmp_path: Path) -> None:
    from tessera.recipes.loading import load_recipe

    result = run("recipes", "show", "edm-cifar10-cond-ve", "training.batch=256")
    path = tmp_path / "mine.yaml"
    path.write_text(result.stdout)
    assert load_recipe(path) == load_recipe("edm-cifar10-cond-ve", ["training.batch=256"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipes", "show", "cifar10-smal"], "did you mean cifar10-small?"),
        (["recipes", "show", "cifar10-small", "lr=1"], "did you mean optimizer.lr?"),
        (["recipes", "show", "cifar10-small", "training.batch=[bold]x"], "training.batch"),
    ],
)
def test_mistakes_end_with_code_2_and_no_traceback(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert "error:" in result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr + result.stdout


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), "runs/a: No space left on"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (torch.OutOfMemoryError("CUDA out of memory"), "training.micro_batch"),
        (MemoryError(), "--batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."), "--batch"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "memory"),
    ],
)
def test_what_the_machine_lacks_is_said_in_words(
    error: Exception,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "app", Mock(side_effect=error))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of memory")
def test_too_little_memory_is_said_in_a_line(tmp_path: Path) -> None:
    """The images fit, what the network makes of them does not."""
    reference, samples = tmp_path / "a.ref.npz", tmp_path / "samples.npz"
    images = np.random.default_rng(0).integers(0, 255, (6000, 32, 32, 1)).astype(np.uint8)
    few = ArrayImages("a", images[:20].transpose(0, 3, 1, 2), np.arange(20) % 2)
    save_reference(reference, build_reference(few, training_images=256))
    np.savez(samples, images)
    limited = (
        "import resource, sys, torch, tessera.metrics.evaluate\n"
        "from tessera.cli import main\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 500_000_000,) * 2)\n"
        "main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", limited, "eval", "score", samples, reference, "--batch", "6000"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: the memory is used up")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("error", [ValueError("a mistake"), OSError("of a library")])
def test_errors_of_the_program_are_not_hidden(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "app", Mock(side_effect=error))
    with pytest.raises(type(error), match=str(error)):
        cli.main()

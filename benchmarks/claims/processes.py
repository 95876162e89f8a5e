"""Arms of a claim that are processes of its own program, for what is no recipe of ours."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_arm_options(parser: argparse.ArgumentParser, arms: Sequence[str]) -> None:
    """The options of claims whose arms are processes."""
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of all arms")
    parser.add_argument("--arm", choices=arms, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)


def run_arms(
    module: str, arms: Sequence[str], options: argparse.Namespace, folder: Path
) -> tuple[list[dict[str, Any]], int]:
    """All arms at once; the lines of JSON that they print, and the threads of each."""
    threads = max(1, options.threads // len(arms))
    running = [_start(module, arm, threads, folder) for arm in arms]
    results = [line for process in running for line in _finish(process)]
    return results, threads


def _start(module: str, arm: str, threads: int, folder: Path) -> subprocess.Popen[str]:
    """The program of a claim again, as one arm (options `--arm` and `--folder`)."""
    again = ["-m", f"benchmarks.claims.{module}", *sys.argv[1:]]
    return subprocess.Popen(
        [sys.executable, *again, "--arm", arm, "--folder", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Its lines of JSON, once it has ended."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]

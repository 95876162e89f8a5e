"""What can be done next with a run or pipeline, as commands that can be typed as they stand."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from tessera.commands import tessera_command
from tessera.convert.export import TARGETS, plan_export
from tessera.errors import TesseraError
from tessera.pipelines.base import Pipeline
from tessera.reports.measured import RunReport
from tessera.training.run_folder import longer


def advice(report: RunReport) -> list[tuple[str, str]]:
    """(what for, command) in the order in which people want them."""
    subject = report.subject
    run, found = shlex.quote(subject.name), []
    own = f"--with {report.with_module} " if report.with_module else ""

    def add(title: str, command: str, rest: str) -> None:
        found.append((title, f"{tessera_command()} {command} {own}{rest}"))

    if report.made is not None:
        options = _options(report)
        given = f"{run}{options}"
        if not needs_pictures(subject.pipeline, report.options):
            add("More samples", "sample", f"{given} --seeds 0-63 --grid --out samples")
            names = subject.pipeline.class_names
            if names and report.classes:
                label = shlex.quote(names[report.classes[-1]])
                add("Of one class", "sample",
                    f"{given} --class {label} --seeds 0-63 --grid --out one-class")  # fmt: skip
            add("Watch them come about", "sample",
                f"{given} --seeds 0-15 --out few.png --trajectory few.gif")  # fmt: skip
            if report.judge is not None and not options:
                path = shlex.quote(str(report.judge.path))
                add("Score more of them", "eval score", f"{run} {path} --images 2000")
    if subject.run_dir is not None:
        _add_training(report, run, add)
    found += report.more_commands
    for target in TARGETS:
        if _exports(subject.pipeline, target.name):
            end = "" if target.name == "diffusers" else ".safetensors"
            add(f"For other code ({target.name})", "export",
                f"{run} exported-{target.name}{end} --to {target.name}")  # fmt: skip
    again = "".join(
        f" {option} {shlex.quote(str(value))}" for option, value in _report_options(report)
    )
    add("This report again", "report", f"{run}{_options(report)}{again}")
    return found


def _add_training(report: RunReport, run: str, add: Any) -> None:
    """How to finish, prolong or repeat the training of a run."""
    subject = report.subject
    training = subject.recipe.training
    if subject.pipeline.images_seen < training.images and training.minutes is None:
        add("Finish the training", "train", f"--resume {run}")
    else:
        add(
            "Train for twice as long",
            "train",
            f"--resume {run} {longer(subject.recipe)}",
        )
    recipe = shlex.quote(str(Path(subject.name) / "recipe.yaml"))
    add(
        "Another run that begins with these weights", "train",
        f"{recipe} training.initial_weights={run} run.dir={shlex.quote(subject.name + '-next')}",
    )  # fmt: skip


def needs_pictures(pipe: Pipeline, options: dict[str, Any]) -> bool:
    """Whether a model starts from pictures that the options do not name."""
    return options.get("start_from") is None and pipe.with_start(options) != options


def _options(report: RunReport) -> str:
    """The options of sampling, as words of a command."""
    words = {k: v for k, v in report.options.items() if isinstance(v, str | int | float)}
    return "".join(f" {shlex.quote(f'{name}={value}')}" for name, value in words.items())


def _report_options(report: RunReport) -> list[tuple[str, Any]]:
    made = report.made
    found: list[tuple[str, Any]] = []
    if made is not None:
        found.append(("--samples", len(made.images)))
    if report.seed:
        found.append(("--seed", report.seed))
    if report.judge is not None:
        found.append(("--reference", report.judge.path))
    return found


def _exports(pipe: Pipeline, form: str) -> bool:
    """Whether a model has a counterpart of that form."""
    try:
        plan_export(pipe, form)
    except TesseraError:
        return False
    return True

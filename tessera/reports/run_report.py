"""The report of a run: one HTML file of samples, scores, the search for copies, losses, costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tessera.data.dataset import Dataset
from tessera.files import atomic_file, check_writable, user_path
from tessera.recipes.parts import NO_PARTS, Parts
from tessera.reports.measured import measure_run
from tessera.reports.sections import render
from tessera.training.run_folder import RECIPE

FILE = "report.html"


def write_report(
    run: str | Path,
    out: str | Path | None = None,
    *,
    samples: int | None = None,
    seed: int = 0,
    data: str | Path | None = None,
    held_out: str | Path | None = None,
    dataset: Dataset | None = None,
    reference: str | Path | None = None,
    device: str | torch.device | None = None,
    parts: Parts = NO_PARTS,
    title: str | None = None,
    with_module: str | None = None,
    more_commands: Sequence[tuple[str, str]] = (),
    **options: Any,
) -> Path:
    """Sample from a trained model, measure it beside real images, and write it as one HTML file.

    The same run, images and arguments give the same bytes on the same machine. Nothing is trained.

    Args:
        run: the folder of a run or pipeline, or a hub id.
        out: the file to write, replaced if it is there; by default report.html in the run's folder,
            or `NAME-report.html` in the current folder for what is no run.
        samples: images to make and score; by default what takes about half a minute, 20 to 500.
        seed: the first of the samples' seeds, and that of all else that is drawn.
        data: the training images, where they are not at the recipe's `data.path`.
        held_out: images of the same kind that were not trained on, in place of `data.validation`
            and `data.held_out`: without any, copies cannot be told from likeness.
        dataset: the training images as an object, in place of `data`.
        reference: reference file with its own classifier; by default the one in the run's folder
            or beside the images, if there is one.
        device: where to compute; by default the fastest.
        parts: functions that make the recipe's external parts.
        title: of the page, by default the recipe's name.
        with_module: the module of these parts, for the commands that the page shows.
        more_commands: (what for, command) to be shown beside them.
        options: of sampling, as of `Pipeline.sample`.

    Returns:
        The file.

    Raises:
        TesseraError: there is no such run, or images, reference or options do not fit it.

    Example:
        >>> write_report("runs/a", guidance=1.5)  # doctest: +SKIP
        PosixPath('runs/a/report.html')
    """
    path = _place(run) if out is None else user_path(out)
    check_writable(path)
    measured = measure_run(
        run, samples=samples, seed=seed, data=data, held_out=held_out, dataset=dataset,
        reference=reference, device=device, parts=parts, title=title, with_module=with_module,
        more_commands=more_commands, **options,
    )  # fmt: skip
    with atomic_file(path) as file:
        file.write(render(measured).encode())
    return path


def _place(run: str | Path) -> Path:
    """Where a report goes that nobody named a place for."""
    folder = user_path(run)
    if (folder / RECIPE).is_file():
        return folder / FILE
    return Path(f"{folder.resolve().name}-{FILE}")

"""Compare recipes at equal time, and what was trained before, by the same samples."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tessera import distributed
from tessera.comparing.arms import (
    DONE,
    JOINS,
    Arm,
    CompareSettings,
    Point,
    Way,
    file_name,
    is_done,
    place,
    recipe_of,
    run_folder,
    score_arm,
    train_arm,
)
from tessera.comparing.timed import Scored
from tessera.errors import DataError, TesseraError
from tessera.files import read_json, user_path, write_json
from tessera.images import grid, save_png
from tessera.metrics.reference import Reference, open_reference, save_reference
from tessera.pipelines.base import Pipeline
from tessera.pipelines.loading import load
from tessera.training.tracking import read_metrics

REFERENCE = "reference.ref.npz"
_MOST_STEPS = 1000  # of a sampler that is to cost what another does


@dataclass(frozen=True)
class ArmResult:
    """What is known of an arm in the end.

    Attributes:
        name: of the arm, and the way in which it was sampled.
        arm: its name alone.
        seed: of its training; None for what was trained before, as for the next two.
        minutes: of training here.
        flops: of training here.
        images: that it was trained on.
        evaluations, gflops, ms: of the networks, and time, for each sampled image.
        points: scores on the way.
        losses: (images, loss) as its run has logged them.
        first: the first samples, uint8 [N, H, W, C]; not in the JSON.
    """

    name: str
    arm: str
    source: str
    changes: tuple[str, ...]
    seed: int | None
    parameters: int
    minutes: float | None
    flops: float | None
    images: int
    evaluations: float
    gflops: float
    ms: float
    distance: float | None
    recognised: float | None
    points: tuple[Point, ...]
    losses: tuple[tuple[int, float], ...]
    first: NDArray[np.uint8]

    @property
    def picture(self) -> str:
        """The name of its grid of samples."""
        return f"{file_name(self.name)}.png"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {name: value for name, value in vars(self).items() if name != "first"}
        return {**values, "points": [asdict(point) for point in self.points]}


@dataclass(frozen=True)
class Comparison:
    """All results, and what they were measured with.

    Attributes:
        results: of all arms, each in all ways and for all seeds of its training.
        accuracy: of the classifier on held-out real images; None without one.
        note: why there are no distances, or "".
        device: in words.
    """

    results: tuple[ArmResult, ...]
    settings: CompareSettings
    accuracy: float | None
    note: str
    device: str

    @property
    def rows(self) -> list[list[ArmResult]]:
        """The results that are rows of a table: those of all seeds of one name together."""
        found: dict[str, list[ArmResult]] = {}
        for result in self.results:
            found.setdefault(result.name, []).append(result)
        return list(found.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "settings": asdict(self.settings),
            "device": self.device,
            "accuracy": self.accuracy,
            "note": self.note,
            "arms": [result.as_dict() for result in self.results],
        }


def compare_arms(
    arms: Sequence[Arm],
    out: str | os.PathLike[str],
    settings: CompareSettings,
    *,
    parallel: bool = False,
) -> Comparison:
    """Train the recipes among the arms for the same time, then sample and score all of them.

    In `out` are a run folder and the samples of each arm. What is there already, from a comparison
    with the same settings that was interrupted, is not trained again.

    Args:
        parallel: train all at once, each on its share of the cores.

    Raises:
        TesseraError: an arm or an option that cannot be; the message says what to do.
    """
    out = user_path(out)
    _check(arms, settings)
    device = distributed.device()
    reference, note = _reference(arms, out, settings, device)
    for seed in settings.seeds:
        waiting = [a for a in arms if not a.trained and not is_done(a, out, settings, seed)]
        if parallel and len(waiting) > 1:
            _train_at_once(waiting, arms, out, settings, seed)
        else:
            for arm in waiting:
                train_arm(arm, out, settings, reference, seed)
    results, notes = _results(arms, out, settings, reference, device)
    accuracy = None if reference is None else reference.extractor.facts.accuracy
    note = " ".join([*([note] if note else []), *notes])
    made = Comparison(results, settings, accuracy, note, _device_name(device))
    for row in made.rows:
        save_png(out / row[0].picture, grid(row[0].first[:50], columns=10))
    write_json(out / "comparison.json", made.as_dict())
    return made


def _check(arms: Sequence[Arm], settings: CompareSettings) -> None:
    names = [arm.folder for arm in arms]
    rows = [file_name(f"{arm.name} {way.name}") for arm in arms for way in arm.ways]
    if len(set(names)) < len(names) or len(set(rows)) < len(rows):
        raise TesseraError(f"two of {', '.join(names)} are the same; leave one out, or change it")
    if settings.samples < 2 or min(settings.points, settings.trainings) < 1:
        raise TesseraError("give at least 2 samples, 1 point and 1 training")
    if settings.minutes <= 0 or (settings.flops is not None and settings.flops <= 0):
        raise TesseraError("give some minutes, or some FLOPs")
    for arm in arms:
        if arm.trained and arm.changes:
            raise TesseraError(
                f"{arm.source} was trained before, so {arm.changes[0]} cannot change it any more; "
                "put changes behind a recipe, or before all arms for all recipes"
            )
        if arm.stages and arm.join not in JOINS:
            raise TesseraError(f"{arm.name}: its stages are joined as one of {', '.join(JOINS)}")
        for number, stage in enumerate(arm.stages):
            if stage.begins_as is not None and not 0 <= stage.begins_as < number:
                raise TesseraError(
                    f"{arm.name}: stage {number} cannot begin as stage {stage.begins_as}; name one "
                    "before it, from 0"
                )
        if not arm.trained:
            for stage in arm.trainings:
                recipe_of(arm, stage, settings.seed)


def _reference(
    arms: Sequence[Arm], out: Path, settings: CompareSettings, device: torch.device
) -> tuple[Reference | None, str]:
    """What samples are scored by, kept in `out`; or why there is nothing."""
    path = settings.reference
    for arm in arms:
        if path is None and not arm.trained:
            path = recipe_of(arm, arm.trainings[-1], settings.seed).data.path
        elif path is None:
            path = load(arm.source).recipe.data.path
    if path is None:
        raise TesseraError("name the images of all arms: data.path=IMAGES, before the first arm")
    try:
        reference = open_reference(path, device=device)
    except DataError as error:
        if settings.reference is not None:
            raise
        return None, f"There are no distances: {error}"
    out.mkdir(parents=True, exist_ok=True)
    save_reference(out / REFERENCE, reference)
    return reference, ""


def _train_at_once(
    waiting: Sequence[Arm], arms: Sequence[Arm], out: Path, settings: CompareSettings, seed: int
) -> None:
    """All in processes of their own, which share the cores."""
    threads = max(1, torch.get_num_threads() // len(waiting))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    request = out / ".arms.json"
    write_json(request, {"settings": asdict(settings), "arms": [asdict(arm) for arm in arms]})
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tessera.comparing.arm", str(request), arm.name, str(seed)],
            env=environment,
        )
        for arm in waiting
    ]
    try:
        failed = [process.wait() for process in running]
    finally:
        for process in running:
            process.terminate()
    request.unlink(missing_ok=True)
    if any(failed):
        raise TesseraError("an arm could not be trained; its error stands above")


# -------------------------------------------------------------------------------------- results


def _results(
    arms: Sequence[Arm],
    out: Path,
    settings: CompareSettings,
    reference: Reference | None,
    device: torch.device,
) -> tuple[tuple[ArmResult, ...], list[str]]:
    """All arms as they are in the end, and what is to be said of them."""

    def score(pipe: Pipeline, way: Way) -> Scored:
        return score_arm(pipe, reference, settings, way)

    results, notes = list[ArmResult](), list[str]()
    for arm in arms:
        ways = list(arm.ways)
        seeds: Sequence[int | None] = [None] if arm.trained else settings.seeds
        for seed in seeds:
            folder = None if seed is None else place(arm, out, settings, seed)
            pipe = load(arm.source if folder is None else folder / "pipeline", device=device)
            if settings.equal_cost and arm is not arms[0] and seed in (None, settings.seed):
                equal = _equal_way(pipe, ways[0], settings, results[0].gflops)
                if equal is None:
                    notes.append(f"{arm.name} has no one number of steps, so no row of equal cost.")
                elif equal is not ways[0]:
                    ways.append(equal)
            for way in ways:
                known = _training_of(arm, folder, pipe, settings, first=way is ways[0])
                results.append(_result(arm, way, seed, pipe, score(pipe, way), settings, known))
    return tuple(results), notes


def _result(
    arm: Arm,
    way: Way,
    seed: int | None,
    pipe: Pipeline,
    found: Scored,
    settings: CompareSettings,
    training: dict[str, Any],
) -> ArmResult:
    """A row of one seed."""
    options = {**settings.sampling, **way.options}
    return ArmResult(
        name=", ".join([arm.name, *([way.name] if way.name else [])]),
        arm=arm.name,
        source=arm.source or " + ".join(stage.source for stage in arm.stages),
        changes=arm.changes,
        seed=seed,
        parameters=sum(p.numel() for p in pipe.model.parameters()),
        evaluations=found.evaluations,
        gflops=pipe.cost(**options).sample_flops / 1e9,
        ms=1e3 * found.seconds / settings.samples,
        distance=None if found.score is None else found.score.fd_classifier,
        recognised=None if found.score is None else found.score.recognised,
        first=found.first,
        **training,
    )


def _training_of(
    arm: Arm, folder: Path | None, pipe: Pipeline, settings: CompareSettings, *, first: bool
) -> dict[str, Any]:
    """What is known of the training of an arm; its curves belong to its first row."""
    run, kept = user_path(arm.source), dict[str, Any]()
    if folder is not None:
        run = run_folder(folder, len(arm.trainings) - 1)
        kept = read_json(folder / DONE)
    minutes = kept.get("minutes") if settings.flops is not None else settings.minutes
    return {
        "minutes": None if folder is None else minutes,
        "flops": kept.get("flops"),
        "images": kept.get("images", pipe.images_seen),
        "points": tuple(Point(**p) for p in kept.get("points", ())) if first else (),
        "losses": tuple(_losses(run)) if first else (),
    }


def _equal_way(pipe: Pipeline, way: Way, settings: CompareSettings, gflops: float) -> Way | None:
    """The way with as many steps as cost nearest to so many GFLOPs, which may be what there is.

    None where the steps are not one number.
    """
    if "steps" not in {option.name for option in pipe.options()}:
        return None
    options = {**settings.sampling, **way.options}

    def cost(steps: int) -> float:
        return pipe.cost(**{**options, "steps": steps}).sample_flops / 1e9

    low, high = 1, 2
    while high < _MOST_STEPS and cost(high) <= gflops:  # costs rise with the steps
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= gflops else (low, middle)
    steps = min((low, high), key=lambda n: abs(cost(n) - gflops))
    if cost(steps) == pipe.cost(**options).sample_flops / 1e9:
        return way
    return Way(f"{steps} steps for the same cost", {**way.options, "steps": steps})


def _losses(run: Path) -> Iterator[tuple[int, float]]:
    """What a run has logged; nothing for what is no run."""
    for line in read_metrics(run):
        images, loss = line.get("images"), line.get("loss_per_pixel")
        if isinstance(images, int) and isinstance(loss, float):
            yield images, loss


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads"

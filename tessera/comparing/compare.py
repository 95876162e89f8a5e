"""Compare recipes at equal time, and what was trained before, by the same samples."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tessera import distributed
from tessera.comparing.timed import TIMED, Scored, averaged, scored, train_by_time
from tessera.errors import DataError, TesseraError
from tessera.files import read_json, user_path, write_json
from tessera.images import grid, save_png
from tessera.metrics.reference import Reference, open_reference, save_reference
from tessera.pipelines.base import Pipeline
from tessera.pipelines.loading import load
from tessera.recipes.loading import load_recipe
from tessera.training.tracking import read_metrics
from tessera.training.trainer import Trainer

REFERENCE = "reference.ref.npz"
_DONE = "arm.json"


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared.

    Attributes:
        name: in tables.
        source: a recipe, by name or file, or the folder of a run or pipeline.
        changes: `key.path=value` of the recipe.
    """

    name: str
    source: str
    changes: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Its name as that of a folder."""
        return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in self.name)

    @property
    def trained(self) -> bool:
        """Whether it is a folder, which is sampled as it is."""
        return user_path(self.source).is_dir()


@dataclass(frozen=True)
class CompareSettings:
    """What all arms have in common.

    Attributes:
        minutes: of training, of each recipe.
        points: scores on the way, spread evenly over the minutes, the last at the end.
        samples: images of a score, of seeds 0, 1, ...
        batch: images made at once.
        seed: of the trainings.
        sampling: options of sampling, in place of the recipes'.
        reference: images, or a file of `tessera eval reference`; None: the images at data.path.
    """

    minutes: float = 10
    points: int = 4
    samples: int = 500
    batch: int = 100
    seed: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None


@dataclass(frozen=True)
class Point:
    """An arm on its way.

    Attributes:
        minutes: of training.
        images: seen so far.
        distance: Fréchet distance on the features of the classifier; None without one.
        recognised: share of the samples taken for their class.
    """

    minutes: float
    images: int
    distance: float | None
    recognised: float | None


@dataclass(frozen=True)
class ArmResult:
    """What is known of an arm in the end.

    Attributes:
        minutes: of training here; None for what was trained before.
        images: that it was trained on.
        evaluations, gflops, ms: of the networks, and time, for each sampled image.
        points: scores on the way.
        losses: (images, loss) as its run has logged them.
        first: the first samples, uint8 [N, H, W, C]; not in the JSON.
    """

    name: str
    source: str
    changes: tuple[str, ...]
    parameters: int
    minutes: float | None
    images: int
    evaluations: float
    gflops: float
    ms: float
    distance: float | None
    recognised: float | None
    points: tuple[Point, ...]
    losses: tuple[tuple[int, float], ...]
    first: NDArray[np.uint8]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {name: value for name, value in vars(self).items() if name != "first"}
        return {**values, "points": [asdict(point) for point in self.points]}


@dataclass(frozen=True)
class Comparison:
    """All results, and what they were measured with.

    Attributes:
        accuracy: of the classifier on held-out real images; None without one.
        note: why there are no distances, or "".
        device: in words.
    """

    results: tuple[ArmResult, ...]
    settings: CompareSettings
    accuracy: float | None
    note: str
    device: str

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
    waiting = [arm for arm in arms if not arm.trained and not _done(out, arm, settings)]
    if parallel and len(waiting) > 1:
        _train_at_once(waiting, arms, out, settings)
    else:
        for arm in waiting:
            train_arm(arm, out, settings, reference)
    results = tuple(_result(arm, out, settings, reference, device) for arm in arms)
    for arm, result in zip(arms, results, strict=True):
        save_png(out / f"{arm.folder}.png", grid(result.first[:50], columns=10))
    accuracy = None if reference is None else reference.extractor.facts.accuracy
    made = Comparison(results, settings, accuracy, note, _device_name(device))
    write_json(out / "comparison.json", made.as_dict())
    return made


def _check(arms: Sequence[Arm], settings: CompareSettings) -> None:
    names = [arm.folder for arm in arms]
    if len(set(names)) < len(names):
        raise TesseraError(f"two of {', '.join(names)} are the same; leave one out, or change it")
    if settings.samples < 2 or settings.points < 1 or settings.minutes <= 0:
        raise TesseraError("give at least 2 samples, 1 point and some minutes")
    for arm in arms:
        if arm.trained and arm.changes:
            raise TesseraError(
                f"{arm.source} was trained before, so {arm.changes[0]} cannot change it any more; "
                "put changes behind a recipe, or before all arms for all recipes"
            )
        if not arm.trained:
            load_recipe(arm.source, _changes(arm, settings))


def _changes(arm: Arm, settings: CompareSettings) -> list[str]:
    return [*TIMED, f"training.seed={settings.seed}", *arm.changes]


def _reference(
    arms: Sequence[Arm], out: Path, settings: CompareSettings, device: torch.device
) -> tuple[Reference | None, str]:
    """What samples are scored by, kept in `out`; or why there is nothing."""
    path = settings.reference
    for arm in arms:
        if path is None and not arm.trained:
            path = load_recipe(arm.source, arm.changes).data.path
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


# ------------------------------------------------------------------------------------- training


def train_arm(arm: Arm, out: Path, settings: CompareSettings, reference: Reference | None) -> None:
    """Train a recipe for its minutes, with scores on the way; its folder is then done."""
    folder = out / arm.folder
    if folder.exists():
        _clear(folder)
    trainer = Trainer(load_recipe(arm.source, _changes(arm, settings)), folder / "run")
    limit, points = 60 * settings.minutes, list[Point]()
    for spent in train_by_time(trainer, limit):
        if spent * settings.points < limit * (len(points) + 1):
            continue
        score = None
        if reference is not None:
            score = _scored(averaged(trainer), reference, settings).score
        points.append(
            Point(
                spent / 60,
                trainer.images_seen,
                None if score is None else score.fd_classifier,
                None if score is None else score.recognised,
            )
        )
    averaged(trainer).save(folder / "pipeline")
    content = {"settings": _facts(arm, settings), "points": [asdict(point) for point in points]}
    write_json(folder / _DONE, content)


def _scored(pipe: Pipeline, reference: Reference | None, settings: CompareSettings) -> Scored:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few images: the table says how many
        return scored(pipe, reference, settings.samples, settings.batch, settings.sampling)


def _facts(arm: Arm, settings: CompareSettings) -> dict[str, Any]:
    """What decides how an arm has been trained, as JSON has it."""
    return {"source": arm.source, "changes": list(arm.changes), **asdict(settings)}


def _done(out: Path, arm: Arm, settings: CompareSettings) -> bool:
    """Whether the arm has been trained with these settings.

    Raises:
        TesseraError: with others.
    """
    path = out / arm.folder / _DONE
    if not path.is_file():
        return False
    if read_json(path).get("settings") != _facts(arm, settings):
        raise TesseraError(
            f"{path.parent} was made with other settings; choose another folder by --out"
        )
    return True


def _clear(folder: Path) -> None:
    """Remove an arm that was not finished; nothing else."""
    strange = [path.name for path in folder.iterdir() if path.name not in ("run", "pipeline")]
    if strange:
        raise TesseraError(f"{folder} holds {strange[0]}; choose another folder by --out")
    shutil.rmtree(folder)


def _train_at_once(
    waiting: Sequence[Arm], arms: Sequence[Arm], out: Path, settings: CompareSettings
) -> None:
    """All in processes of their own, which share the cores."""
    threads = max(1, torch.get_num_threads() // len(waiting))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    request = out / ".arms.json"
    write_json(request, {"settings": asdict(settings), "arms": [asdict(arm) for arm in arms]})
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tessera.comparing.arm", str(request), arm.name], env=environment
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


def _result(
    arm: Arm,
    out: Path,
    settings: CompareSettings,
    reference: Reference | None,
    device: torch.device,
) -> ArmResult:
    """Sample and score an arm as it is in the end."""
    folder = out / arm.folder
    pipe = load(arm.source if arm.trained else folder / "pipeline", device=device)
    found = _scored(pipe, reference, settings)
    points = () if arm.trained else tuple(_points(folder / _DONE))
    run = user_path(arm.source) if arm.trained else folder / "run"
    score = found.score
    return ArmResult(
        name=arm.name,
        source=arm.source,
        changes=arm.changes,
        parameters=sum(p.numel() for p in pipe.model.parameters()),
        minutes=None if arm.trained else settings.minutes,
        images=pipe.images_seen,
        evaluations=found.evaluations,
        gflops=pipe.cost(**settings.sampling).sample_flops / 1e9,
        ms=1e3 * found.seconds / settings.samples,
        distance=None if score is None else score.fd_classifier,
        recognised=None if score is None else score.recognised,
        points=points,
        losses=tuple(_losses(run)),
        first=found.first,
    )


def _points(path: Path) -> Iterator[Point]:
    for values in read_json(path)["points"]:
        yield Point(**values)


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

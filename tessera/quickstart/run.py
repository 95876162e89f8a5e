"""From digits to a scored model: data, training, samples, scores, in one go."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tessera.commands import tessera_command
from tessera.data.dataset import open_dataset
from tessera.errors import TesseraError, TrainingError
from tessera.files import user_path
from tessera.metrics.reference import Reference, build_reference, save_reference
from tessera.quickstart.digits import write_digits
from tessera.recipes.loading import load_recipe
from tessera.recipes.schema import Recipe
from tessera.reports.measured import RunReport, measure_run
from tessera.reports.scores import Ladder
from tessera.training.trainer import Trainer

RECIPE = "quickstart-digits"
REFERENCE = "digits.ref.npz"
GUIDANCE = 1.5  # of the samples and of the denoising that is shown
_HELD_OUT = 0.1  # of the digits, so that the report can tell copies from likeness


@dataclass
class QuickstartResult:
    """What the quickstart has made.

    Attributes:
        out: folder with all that was written.
        recipe: as trained.
        device: in words.
        images_seen: images trained on, counting repetitions.
        reference: statistics of the real digits and the classifier.
        report: samples, scores and all else that the page shows.
        seconds: time of each part, by name.
    """

    out: Path
    recipe: Recipe
    device: str
    images_seen: int
    reference: Reference
    report: RunReport
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def recognised(self) -> float:
        """Share of the samples that are taken for the class they were asked to be."""
        assert self.report.recognised is not None
        return self.report.recognised

    @property
    def score(self) -> Ladder:
        """Distances of the samples, and of other images, on the classifier's features."""
        return self.report.ladders[0]


def run(
    out: Path,
    *,
    seed: int = 0,
    overrides: Sequence[str] = (),
    digits: int | None = None,
    samples: int | None = None,
    classifier_images: int = 20_000,
) -> QuickstartResult:
    """Train on digits, sample, score; a few minutes on two CPU cores.

    Args:
        out: an empty or new folder; gets the data set, the run folder and the reference file.
        seed: of everything.
        overrides: changes of the recipe, as `key.path=value`.
        digits: use the first so many; by default all 1,797.
        samples: images to score; by default half as many as digits.
        classifier_images: images to train the judging classifier on at most.

    Raises:
        TesseraError: an extra is missing, the folder is not empty, or training was stopped.
    """
    out = user_path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TesseraError(f"{out} is not empty; choose another folder with --out")
    seconds: dict[str, float] = {}
    data_path, run_dir = out / "digits.safetensors", out / "run"
    own = [f"data.path={data_path}", f"data.held_out={_HELD_OUT}", f"training.seed={seed}"]
    recipe = load_recipe(RECIPE, [*own, *overrides])
    _check(recipe)
    with _data_taken_back(data_path):
        with _timed(seconds, "data"):
            write_digits(data_path, recipe.data.resolution, digits)
            dataset = open_dataset(data_path)
        trainer = Trainer(recipe, run_dir)
    with _timed(seconds, "training"):
        _train(trainer)
    with _timed(seconds, "classifier"):
        reference = build_reference(
            dataset, seed=seed, training_images=classifier_images, device=trainer.device
        )
        save_reference(out / REFERENCE, reference)
    with _timed(seconds, "report"):
        report = measure_run(
            run_dir, samples=samples or len(dataset) // 2, reference=out / REFERENCE,
            device=trainer.device, title="Handwritten digits from noise",
            more_commands=_own_images(), guidance=GUIDANCE,
        )  # fmt: skip
    return QuickstartResult(
        out, trainer.recipe, trainer.device_name, trainer.images_seen, reference, report, seconds
    )


def _own_images() -> list[tuple[str, str]]:
    """How to go on with other images than digits."""
    command = tessera_command()
    return [
        (
            "Your own images",
            f"{command} data convert photos/ photos.safetensors --resolution 32x32 "
            "--transform center-crop --format packed\n"
            f"{command} train cifar10-small data.path=photos.safetensors data.num_classes=0",
        )
    ]


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    begin = time.monotonic()
    yield
    seconds[part] = time.monotonic() - begin


def _check(recipe: Recipe) -> None:
    """Refuse, before anything is written, what the report could not show after the training."""
    if recipe.data.num_classes == 0 or recipe.expert is not None:
        raise TesseraError(
            "the quickstart shows samples of each class from one model: leave data.num_classes "
            "and expert as they are"
        )


@contextmanager
def _data_taken_back(path: Path) -> Iterator[None]:
    """When the block fails, remove the data set that it wrote, and its folder if that is empty."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        with suppress(OSError):
            path.parent.rmdir()
        raise


def _train(trainer: Trainer) -> None:
    trainer.run()
    if trainer.stopped_by is not None:
        raise TrainingError(
            f"stopped; to finish the training: {tessera_command()} train --resume {trainer.run_dir}"
        )

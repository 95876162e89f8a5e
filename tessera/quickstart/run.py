"""From digits to a scored model: data, training, samples, scores, in one go."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tessera.commands import tessera_command
from tessera.data.dataset import ImageDataset, open_dataset
from tessera.errors import TesseraError, TrainingError
from tessera.files import user_path
from tessera.images import to_uint8
from tessera.metrics.evaluate import Score, score_images
from tessera.metrics.features import feature_statistics
from tessera.metrics.frechet import frechet_distance
from tessera.metrics.images import ArrayImages
from tessera.metrics.reference import Reference, build_reference, save_reference
from tessera.metrics.statistics import FeatureStatistics
from tessera.pipelines.base import Pipeline
from tessera.pipelines.loading import build_pipeline, load
from tessera.progress import progress
from tessera.quickstart.digits import write_digits
from tessera.randomness import derive_seed, numpy_generator
from tessera.recipes.loading import load_recipe
from tessera.recipes.schema import Recipe
from tessera.sampling.core import SamplerState
from tessera.training.trainer import Trainer

RECIPE = "quickstart-digits"
GUIDANCE = 1.5  # of the samples and of the denoising that is shown
_UNTRAINED = {"steps": 4, "solver": "euler"}  # it makes noise of noise, however slowly


@dataclass(frozen=True)
class Frame:
    """A moment of the denoising of some images: σ, the noisy state and the estimate, NHWC."""

    sigma: float
    noisy: NDArray[np.uint8]
    denoised: NDArray[np.uint8]


@dataclass
class QuickstartResult:
    """Everything that the report shows.

    Attributes:
        out: folder with all that was written.
        recipe: as trained.
        device: in words.
        parameters: of the network.
        images_seen: images trained on, counting repetitions.
        losses: (images seen, loss per pixel) through the training.
        dataset: the real digits.
        reference: their statistics and the classifier.
        samples: uint8 [N, H, W, C], the class of sample i is i modulo the number of classes.
        labels: int64 [N], the class that each sample was asked to be.
        predicted: int64 [N], the class that the classifier takes it for.
        score: of the samples, against one half of the real digits.
        floor: Fréchet distance of the other half.
        ceiling: Fréchet distance of samples of the untrained network.
        nearest: mean distance (root mean square of grey levels) from a sample to the closest real
            digit, and from a real digit to the closest other one.
        frames: the denoising of one image per class.
        seconds: time of each part, by name.
    """

    out: Path
    recipe: Recipe
    device: str
    parameters: int
    images_seen: int
    losses: list[tuple[int, float]]
    dataset: ImageDataset
    reference: Reference
    samples: NDArray[np.uint8]
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    score: Score
    floor: float
    ceiling: float
    nearest: tuple[float, float]
    frames: list[Frame]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def recognised(self) -> float:
        """Share of the samples that are taken for the class they were asked to be."""
        return float((self.predicted == self.labels).mean())


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
    recipe = load_recipe(RECIPE, [f"data.path={data_path}", f"training.seed={seed}", *overrides])
    _check(recipe)
    with _data_taken_back(data_path):
        with _timed(seconds, "data"):
            write_digits(data_path, recipe.data.resolution, digits)
            dataset = open_dataset(data_path)
        trainer = Trainer(recipe, run_dir)
    with _timed(seconds, "training"):
        losses = _train(trainer)
    pipeline = load(run_dir, device=trainer.device)
    with _timed(seconds, "classifier"):
        reference = build_reference(
            dataset, seed=seed, training_images=classifier_images, device=trainer.device
        )
        save_reference(out / "digits.ref.npz", reference)
    with _timed(seconds, "sampling"):
        made, labels = _sample(pipeline, samples or len(dataset) // 2, "samples", guidance=GUIDANCE)
        frames = _denoising(pipeline)
    with _timed(seconds, "scoring"):
        scored = _scores(recipe, reference, dataset, made, labels, seed)
    return QuickstartResult(
        out=out,
        recipe=trainer.recipe,
        device=trainer.device_name,
        parameters=sum(p.numel() for p in pipeline.model.parameters()),
        images_seen=trainer.images_seen,
        losses=losses,
        dataset=dataset,
        reference=reference,
        samples=made,
        labels=labels,
        frames=frames,
        seconds=seconds,
        **scored,
    )


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


def _train(trainer: Trainer) -> list[tuple[int, float]]:
    logged = [(r.images, r.metrics["loss_per_pixel"]) for r in trainer.steps() if r.metrics]
    if trainer.stopped_by is not None:
        raise TrainingError(
            f"stopped; to finish the training: {tessera_command()} train --resume {trainer.run_dir}"
        )
    return [(images, float(loss)) for images, loss in logged if loss is not None]


def _sample(
    pipeline: Pipeline, count: int, title: str, **options: Any
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 [N, H, W, C] of all classes in turn, and their classes int64 [N]."""
    with progress(title, count, unit="images") as bar:

        def advance(seeds: Sequence[int], state: SamplerState) -> None:
            bar.advance(len(seeds) / state.steps)

        batches = pipeline.sample_batches(
            range(count), "balanced", batch=128, on_step=advance, **options
        )
        images = np.concatenate([made.images for made in batches])
    return images, np.arange(count) % pipeline.model.num_classes


def _denoising(pipeline: Pipeline) -> list[Frame]:
    """The course of the first sample of each class."""
    frames = []

    def keep(seeds: Sequence[int], state: SamplerState) -> None:
        noisy, denoised = (
            to_uint8(x).permute(0, 2, 3, 1).cpu().numpy() for x in (state.unit, state.denoised)
        )
        frames.append(Frame(state.sigma, noisy, denoised))

    pipeline.sample(range(pipeline.model.num_classes), "balanced", on_step=keep, guidance=GUIDANCE)
    return frames


def _scores(
    recipe: Recipe,
    reference: Reference,
    dataset: ImageDataset,
    samples: NDArray[np.uint8],
    labels: NDArray[np.int64],
    seed: int,
) -> dict[str, Any]:
    """Samples, real digits and an untrained network, all against the same half of the digits.

    A Fréchet distance shrinks as the sets grow, so all three have the same number of images.
    """
    classifier = reference.extractor
    order = numpy_generator(seed, "quickstart", "halves").permutation(len(dataset))
    half, other = np.array_split(order, 2)
    real = torch.from_numpy(dataset.read(half))
    against = Reference(
        dataset.name, feature_statistics(classifier, torch.split(real, 256)), classifier
    )
    untrained, _ = _sample(_untrained(recipe, seed), len(samples), "untrained", **_UNTRAINED)
    made = torch.from_numpy(samples).permute(0, 3, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few images: the report shows how many
        score = score_images(_as_set("samples", samples, labels), against)
        ceiling = score_images(_as_set("untrained", untrained), against).fd_classifier
        floor = frechet_distance(
            FeatureStatistics.of(classifier(torch.from_numpy(dataset.read(other)))),
            against.statistics,
        )
    return {
        "predicted": classifier.predict(made).numpy(),
        "score": score,
        "floor": floor,
        "ceiling": ceiling,
        "nearest": _nearest(samples.transpose(0, 3, 1, 2), dataset.read(np.arange(len(dataset)))),
    }


def _untrained(recipe: Recipe, seed: int) -> Pipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "quickstart", "untrained"))
        return build_pipeline(recipe)


def _as_set(
    name: str, images: NDArray[np.uint8], labels: NDArray[np.int64] | None = None
) -> ArrayImages:
    return ArrayImages(name, images.transpose(0, 3, 1, 2), labels)


def _nearest(samples: NDArray[np.uint8], real: NDArray[np.uint8]) -> tuple[float, float]:
    """Mean root-mean-square difference to the closest real image, of samples and of real ones."""
    a, b = (torch.from_numpy(x.reshape(len(x), -1)).to(torch.float32) for x in (samples, real))
    among_real = torch.cdist(b, b).fill_diagonal_(torch.inf)
    scale = b.shape[1] ** 0.5
    to_real = torch.cdist(a, b).min(dim=1).values.mean() / scale
    return float(to_real), float(among_real.min(dim=1).values.mean() / scale)

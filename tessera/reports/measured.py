"""Everything that the report of a run shows, measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.data.dataset import Dataset
from tessera.errors import TesseraError
from tessera.metrics.classifier import Classifier
from tessera.metrics.features import FeatureExtractor
from tessera.pipelines.base import Pipeline
from tessera.pipelines.counting import Cost
from tessera.pipelines.diffusion import DiffusionPipeline
from tessera.pipelines.experts import ExpertsPipeline
from tessera.randomness import numpy_generator
from tessera.recipes.parts import NO_PARTS, Parts
from tessera.reports.copies import (
    FEWEST_HELD_OUT,
    Neighbours,
    Share,
    nearest_images,
    share_closer,
    small_pictures,
)
from tessera.reports.losses import Quartiles, last_quartiles, measure_quartiles
from tessera.reports.making import (
    Frame,
    Made,
    affordable,
    cost_of,
    make_frames,
    make_samples,
    shown_classes,
)
from tessera.reports.scores import ColourLayout, Ladder, halves, ladder
from tessera.reports.sources import (
    ImageSource,
    Judge,
    Subject,
    find_judge,
    open_subject,
    with_images,
)
from tessera.training.validation import whole_images

PAIRS = 8
_SEARCHED, _SEARCHED_BYTES = 50_000, 2 * 10**9
_HELD_OUT = 500
_REAL, _REAL_BYTES = 2_000, 3 * 10**8
_LOSS_FLOPS, _LOSS_IMAGES = 4e11, (32, 512)


@dataclass(frozen=True)
class Pair:
    """A sample beside its nearest training image; both uint8 [H, W, C]."""

    sample: NDArray[np.uint8]
    training: NDArray[np.uint8]
    distance: float
    relative: float


@dataclass(frozen=True)
class CopyCheck:
    """What the search for copies has found; see `tessera.reports.copies`.

    Attributes:
        samples, held_out: their nearest training images; `held_out` is None without such images.
        near: how many samples are closer than nearly all held-out images.
        standing_out: how many have a nearest image that stands out as much from their other ones.
        searched, trained_on: training images that were searched, and all of them.
        pixels: whether distances are grey levels; else units of latents.
        pairs: the closest ones, by how much the nearest image stands out.
    """

    samples: Neighbours
    held_out: Neighbours | None
    near: Share | None
    standing_out: Share | None
    searched: int
    trained_on: int
    pixels: bool
    pairs: list[Pair]


@dataclass
class RunReport:
    """Everything that the page shows.

    Attributes:
        title: of the page.
        subject: what it is about.
        seed: of all that was drawn.
        options: of the sampling.
        cost: None where it cannot be counted.
        classes: that are shown; [] without classes.
        made: None for a model that makes no images alone.
        frames: how the first samples come about.
        real: images of the data set by class, or under -1; uint8 [n, H, W, C].
        judge: the in-domain classifier; None where there is none.
        predicted: int64 [N], the class that it takes each sample for; None if it knows none.
        ladders: the scores.
        copies: None without training images.
        quartiles: losses by quarters of the noise levels.
        with_module: the user's own parts, for commands.
        more_commands: (what for, command) to be shown beside the others.
    """

    title: str
    subject: Subject
    seed: int
    options: dict[str, Any]
    cost: Cost | None = None
    classes: list[int] = field(default_factory=list)
    made: Made | None = None
    frames: list[Frame] = field(default_factory=list)
    real: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    judge: Judge | None = None
    predicted: NDArray[np.int64] | None = None
    ladders: list[Ladder] = field(default_factory=list)
    copies: CopyCheck | None = None
    quartiles: list[Quartiles] = field(default_factory=list)
    with_module: str | None = None
    more_commands: Sequence[tuple[str, str]] = ()

    @property
    def recognised(self) -> float | None:
        """Share of the samples that are taken for the class they were asked to be."""
        if self.predicted is None or self.made is None:
            return None
        return float((self.predicted == self.made.labels).mean())


def measure_run(
    run: str | Path,
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
) -> RunReport:
    """Sample, score, search and measure; args: see `write_report`."""
    if samples is not None and samples < 2:
        raise TesseraError(f"`samples={samples}`: a report needs two or more")
    subject = open_subject(
        run, data=data, held_out=held_out, dataset=dataset, device=device, parts=parts
    )
    report = RunReport(
        title or subject.recipe.name, subject, seed, options,
        with_module=with_module, more_commands=more_commands,
    )  # fmt: skip
    pipe = subject.pipeline
    report.classes = shown_classes(pipe.model.num_classes) if pipe.model.num_classes else []
    report.cost = cost_of(pipe, report.options)
    if _can_sample(report):
        started = _start_pictures(report, samples)
        chosen = report.options if started is None else {**report.options, "start_from": started}
        count = samples or affordable(report.cost, subject.device, len(report.classes))
        report.made = make_samples(pipe, seed, count, report.classes, chosen)
        report.frames = make_frames(pipe, seed, report.classes, chosen)
        report.real = _real(report)
        _score(report, reference)
        _search(report, started is not None)
    report.quartiles = _quartiles(report, data, held_out)
    return report


def _can_sample(report: RunReport) -> bool:
    """Whether the model makes images by itself; if not, that is noted."""
    pipe = report.subject.pipeline
    if isinstance(pipe, DiffusionPipeline):
        try:
            pipe.check_complete()
        except TesseraError as error:
            report.subject.missing.append(f"Samples and all that is measured on them: {error}.")
            return False
    return True


def _start_pictures(report: RunReport, samples: int | None) -> Any:
    """Pictures to start from, for a model that starts from some; None for others."""
    subject, options = report.subject, report.options
    pipe = subject.pipeline
    if not isinstance(pipe, DiffusionPipeline) or options.get("start_from") is not None:
        return None
    if pipe.with_start(options).get("start_from") is None:
        return None
    images = subject.held_out or subject.training
    if images is None:
        raise TesseraError(
            "this model starts from pictures of low resolution, and there are none: say where the "
            "training images are (`data`)"
        )
    most = samples or 64
    feed = whole_images(subject.recipe, subject.device, images.dataset, subject.parts, most).feed
    return feed.start_pictures(most)


# ------------------------------------------------------------------------------------ real images


def _rows_of(source: ImageSource, label: int | None) -> NDArray[np.int64]:
    """The images of a class, or all."""
    if label is None or source.labels is None:
        return np.arange(len(source))
    return np.flatnonzero(source.labels == label)


def _real(report: RunReport) -> dict[int, NDArray[np.uint8]]:
    """As many images of the data set as are shown of the samples, drawn at random."""
    training, made = report.subject.training, report.made
    assert made is not None
    if training is None:
        return {}
    generator = numpy_generator(report.seed, "report", "shown")
    found = {}
    for label in report.classes or [-1]:
        rows = _rows_of(training, None if label < 0 else label)
        most = shown_columns(report) if label >= 0 else shown_columns(report) ** 2
        chosen = np.sort(generator.permutation(rows)[:most])
        if len(chosen):
            found[label] = training.pictures(chosen)
    return found


def shown_columns(report: RunReport) -> int:
    """Images in a row of samples: of small ones more, and no more than there are of a class."""
    assert report.made is not None
    count, side = len(report.made.images), max(report.made.images.shape[1:3])
    most = 10 if side <= 32 else 6 if side <= 96 else 4
    if report.classes:
        return max(1, min(most, count // len(report.classes)))
    return max(1, min(most, int(count**0.5)))


# ----------------------------------------------------------------------------------------- scores


def _score(report: RunReport, given: str | Path | None) -> None:
    """Compare samples and others with real images, by all that can be had without training."""
    subject, made = report.subject, report.made
    assert made is not None
    report.judge = judge = find_judge(subject, given)
    chw = made.images.transpose(0, 3, 1, 2)
    if judge is not None:
        report.predicted = _predicted(report, judge.reference.extractor, chw)
    if subject.training is None:
        return
    rows = np.arange(len(subject.training))
    if len(report.classes) < subject.pipeline.model.num_classes:
        labels = subject.training.labels
        assert labels is not None
        rows = np.flatnonzero(np.isin(labels, report.classes))
    most = min(_REAL, _REAL_BYTES // made.images[0].nbytes)
    if not subject.recipe.codec.of_pixels:
        most = 2 * len(made.images)  # to decode more would take longer than the samples
    reference, others = halves(rows, report.seed, most)
    if len(others) < 2:
        subject.missing.append(f"Distances: {len(rows)} real images are too few for two halves.")
        return
    theirs = subject.training.pictures(reference).transpose(0, 3, 1, 2)
    rest = subject.training.pictures(others).transpose(0, 3, 1, 2)
    extractors: list[FeatureExtractor] = [ColourLayout(made.images.shape[3])]
    if judge is not None:
        extractors.insert(0, judge.reference.extractor)
    for extractor in extractors:
        report.ladders.append(ladder(extractor, chw, rest, theirs, report.seed))


def _predicted(
    report: RunReport, classifier: Classifier, images: NDArray[np.uint8]
) -> NDArray[np.int64] | None:
    """The class of each sample; None if the classifier tells other things apart."""
    facts, num_classes = classifier.facts, report.subject.pipeline.model.num_classes
    if facts.task != "classes" or not num_classes or facts.outputs != num_classes:
        return None
    parts = torch.split(torch.from_numpy(np.ascontiguousarray(images)), 256)
    found: NDArray[np.int64] = torch.cat([classifier.predict(part) for part in parts]).numpy()
    return found


# ----------------------------------------------------------------------------------------- copies


def _search(report: RunReport, started: bool) -> None:
    """Look for each sample, and for held-out images, among the training images."""
    subject, made = report.subject, report.made
    training, held_out = subject.training, subject.held_out
    assert made is not None
    if training is None:
        return
    if started:
        subject.missing.append(
            "The search for copies: the model starts from pictures of the data, so its samples "
            "are close to them anyway."
        )
        return
    if made.space.shape[1:] != training.dataset.shape:
        subject.missing.append(
            f"The search for copies: samples have the shape {tuple(made.space.shape[1:])}, the "
            f"training images {tuple(training.dataset.shape)}."
        )
        return
    generator = numpy_generator(report.seed, "report", "searched")
    most = min(_SEARCHED, max(1, _SEARCHED_BYTES // int(np.prod(training.dataset.shape))))
    among = np.sort(generator.permutation(len(training))[:most])
    mirrored = subject.pipeline.recipe.data.xflip
    sides = [_sides(made.space, mirrored=mirrored)]
    if held_out is not None and len(held_out) >= FEWEST_HELD_OUT:
        rows = np.sort(generator.permutation(len(held_out))[:_HELD_OUT])
        sides.append(_sides(held_out.space(rows), mirrored=mirrored))
    found = nearest_images(
        torch.cat([plain for plain, _ in sides]),
        lambda rows: small_pictures(training.space(rows)),
        among,
        mirrored=torch.cat([other for _, other in sides if other is not None])
        if mirrored
        else None,
    )
    ours, theirs = _divided(found, len(made.images))
    near = standing_out = None
    if theirs is not None:
        near = share_closer(ours.distances, theirs.distances)
        standing_out = share_closer(ours.relative, theirs.relative)
    report.copies = CopyCheck(
        ours, theirs, near, standing_out, len(among), len(training),
        subject.recipe.codec.of_pixels, _pairs(ours, made, training),
    )  # fmt: skip


def _sides(space: Tensor, *, mirrored: bool) -> tuple[Tensor, Tensor | None]:
    """What is searched for, and its mirror image where the model was trained on those, too."""
    return small_pictures(space), small_pictures(space.flip(-1)) if mirrored else None


def _divided(found: Neighbours, count: int) -> tuple[Neighbours, Neighbours | None]:
    """The neighbours of the samples, and those of the held-out images behind them."""
    theirs = found.part(slice(count, None)) if len(found.rows) > count else None
    return found.part(slice(count)), theirs


def _pairs(found: Neighbours, made: Made, training: ImageSource) -> list[Pair]:
    order = np.argsort(found.relative, kind="stable")[:PAIRS]
    theirs = training.pictures(found.rows[order])
    return [
        Pair(made.images[i], near, float(found.distances[i]), float(found.relative[i]))
        for i, near in zip(order, theirs, strict=True)
    ]


# ----------------------------------------------------------------------------------------- losses


def _quartiles(
    report: RunReport, data: str | Path | None, held_out: str | Path | None
) -> list[Quartiles]:
    """Of the log, and measured here where it says nothing of the averaged weights."""
    subject = report.subject
    found = [last_quartiles(subject.metrics), last_quartiles(subject.metrics, "validation/")]
    of_log = [one for one in found if one is not None]
    if found[1] is not None or subject.training is None:
        return of_log
    for name, pipe in _trained(subject):
        recipe = with_images(pipe.recipe, data, held_out)
        source = _source(subject, pipe)
        if source is None:
            continue
        images, of = source
        flops = None if report.cost is None else report.cost.forward_flops
        most = _LOSS_IMAGES[1] if flops is None else int(_LOSS_FLOPS / max(flops, 1))
        most = min(max(most, _LOSS_IMAGES[0]), _LOSS_IMAGES[1])
        of_log.append(measure_quartiles(name, pipe, recipe, images, of, most, subject.parts))
    return of_log


def _trained(subject: Subject) -> list[tuple[str, Pipeline]]:
    """The models whose objective is measured; experts together, each at its own noise levels."""
    if isinstance(subject.pipeline, ExpertsPipeline):
        return [("", subject.pipeline)]
    return subject.models()


def _source(subject: Subject, pipe: Pipeline) -> tuple[ImageSource, str] | None:
    """The images for the loss of a model; a stage's are as small as it was trained on them."""
    own = subject if pipe is subject.pipeline else subject.of_stage(pipe)
    if own.held_out is not None:
        return own.held_out, "held-out images"
    return None if own.training is None else (own.training, "training images")

"""`tessera eval`: score images against real ones."""

from __future__ import annotations

import contextlib
import functools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from tessera.cli.eval_checks import (
    check_destination,
    check_metrics,
    check_weights,
    known_convention,
    known_features,
    known_metrics,
)
from tessera.cli.nll import nll
from tessera.cli.score_tables import (
    measured_rows,
    print_results,
    print_score,
    print_table,
    reference_rows,
)
from tessera.errors import DataError, TesseraError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tessera.metrics.evaluate import Metric, Needs, Source
    from tessera.metrics.features import FeatureExtractor, Features
    from tessera.metrics.formats import Measured
    from tessera.metrics.reference import Reference

eval_app = typer.Typer(no_args_is_help=True, help="Score images against real ones.")
eval_app.command()(nll)

FEATURES = typer.Option(None, help="Feature extractor: classifier, inception or dinov2.")
WEIGHTS = typer.Option(
    None, help="File with the extractor's weights; or it is found or downloaded."
)
OVERWRITE = typer.Option(False, "--overwrite", help="Replace OUT if it exists.")
DEVICE = typer.Option(None, help="cpu, cuda, ... (default: the fastest)")
# torchrun takes --num for an abbreviation of options of its own, wherever it stands.
NUM = ("--images", "--num")
_SAMPLED = 1000


@eval_app.command()
def features(
    images: Path = typer.Argument(help="Images (folder, archive, packed set, NPZ) or a pipeline."),
    out: Path = typer.Argument(help="Feature file to write (.npz)."),
    features: str = typer.Option("inception", help="Feature extractor: inception or dinov2."),
    weights: Path | None = WEIGHTS,
    num: int | None = typer.Option(
        None, *NUM, min=2, help="Images; of a pipeline 1,000 by default."
    ),
    seed: int = typer.Option(0, min=0, help="A pipeline's first seed; of a drawn subset."),
    batch: int = typer.Option(64, min=1, help="Images at once."),
    device: str | None = DEVICE,
    overwrite: bool = OVERWRITE,
) -> None:
    """Write the features of every image to OUT, from which any score can be computed later."""
    from tessera.metrics.evaluate import Needs, measure_images
    from tessera.metrics.features import open_extractor
    from tessera.metrics.formats import save_features

    check_destination(out, "feature", overwrite=overwrite, source=images)
    with _session(device) as where:
        source = _source(images, num, seed, batch, where)
        extractor = open_extractor(known_features(features), weights, where)
        wanted = Needs(features=True, spatial=features == "inception")
        measured, _ = measure_images(source, extractor, wanted)
        if _is_main():
            save_features(out, measured)
            print_table("Features", [*measured_rows(measured), ("written to", str(out))])


@eval_app.command()
def reference(
    data: Path = typer.Argument(help="Real images: archive, packed set, folder or NPZ."),
    out: Path = typer.Argument(help="Reference file to write (.npz)."),
    features: str = typer.Option("classifier", help="Extractor: classifier, inception or dinov2."),
    weights: Path | None = WEIGHTS,
    num: int | None = typer.Option(
        None, *NUM, min=2, help="Images, not for the classifier; of a pipeline 1,000 by default."
    ),
    seed: int = typer.Option(0, min=0, help="Of the classifier's training; as in `features`."),
    training_images: int | None = typer.Option(
        None,
        min=1,
        help="Images to train the classifier on at most, counting repetitions; by default as many "
        "as the set needs.",
    ),
    batch: int = typer.Option(64, min=1, help="Images at once."),
    device: str | None = DEVICE,
    overwrite: bool = OVERWRITE,
) -> None:
    """Write statistics of the features of DATA to OUT.

    By default they are the features of a classifier that is trained on DATA first and kept beside
    it, in a hidden file.
    """
    from tessera.metrics.evaluate import Needs, measure_images
    from tessera.metrics.features import open_extractor
    from tessera.metrics.formats import save_statistics
    from tessera.metrics.reference import reference_of, save_reference

    check_destination(out, "reference", overwrite=overwrite, source=data)
    name = known_features(features)
    check_weights(weights, name)
    if name == "classifier" and num is not None:
        raise TesseraError("--num: the classifier is trained on all images; leave it out")
    with _session(device) as where:
        if name != "classifier":
            source = _source(data, num, seed, batch, where)
            extractor = open_extractor(name, weights, where)
            wanted = Needs(moments=True, spatial_moments=name == "inception")
            measured, _ = measure_images(source, extractor, wanted)
            if _is_main():
                save_statistics(out, measured)
                print_table("Reference", [*measured_rows(measured), ("written to", str(out))])
        elif _is_main():
            _refuse_pipeline(data)
            result = reference_of(
                data,
                seed=seed,
                training_images=training_images,
                device=where,
                batch=batch,
            )
            save_reference(out, result)
            print_table("Reference", [*reference_rows(result), ("written to", str(out))])


@eval_app.command()
def score(
    samples: Path = typer.Argument(
        help="Images (folder, archive, packed set, NPZ), a pipeline, or a feature file."
    ),
    reference: Path | None = typer.Argument(
        None,
        help="Reference or feature file, also EDM's, ADM's, RDM's, torch-fidelity's; or images. "
        "Only `is` needs none.",
        show_default=False,
    ),
    metrics: str | None = typer.Option(
        None, help="Any of fid,sfid,is,kid,pr,fd; by default fid, or fd without Inception."
    ),
    convention: str | None = typer.Option(
        None, help="Score as this tool does: edm, adm, rdm, torch-fidelity; all for every one."
    ),
    features: str | None = FEATURES,
    weights: Path | None = WEIGHTS,
    num: int | None = typer.Option(
        None, *NUM, min=2, help="Images to score; of a pipeline 1,000 by default, of images all."
    ),
    seed: int = typer.Option(0, min=0, help="A pipeline's first seed; the classifier's seed."),
    batch: int = typer.Option(64, min=1, help="Images at once."),
    training_images: int | None = typer.Option(
        None, min=1, help="As in `reference`, if REFERENCE is a set of images."
    ),
    device: str | None = DEVICE,
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """Score SAMPLES against REFERENCE."""
    from tessera.metrics.evaluate import chosen, compare
    from tessera.metrics.reference import open_reference

    wanted = known_metrics(metrics)
    named_convention = None if convention is None else known_convention(convention)
    if reference is not None:
        _refuse_pipeline(reference)
    elif wanted != ["is"]:
        raise TesseraError("name a REFERENCE to compare with; only --metrics is needs none")
    with _session(device) as where:

        def open_classifier() -> Reference:
            assert reference is not None
            return open_reference(
                reference,
                seed=seed,
                training_images=training_images,
                device=where,
                batch=batch,
            )

        known, name = _known(reference, features, wanted, convention)
        check_weights(weights, name)
        if name == "classifier" and wanted is None and convention is None:
            _score_classic(samples, open_classifier, num, seed, batch, as_json, where)
            return
        if wanted is None:
            wanted = ["fid"] if name == "inception" else ["fd"]
        check_metrics(wanted, name)
        pairs = chosen(wanted, cast(Any, named_convention))
        sides = _Sides(samples, reference, known, name, weights, where, open_classifier)
        ours, theirs, scores = sides.measure(pairs, num, seed, batch)
        if _is_main():
            results = compare(ours, theirs, pairs, scores, where)
            print_results(results, ours, theirs, as_json)


class _Sides:
    """Samples and reference of a score, measured with one extractor that is opened when needed."""

    def __init__(
        self,
        samples: Path,
        reference: Path | None,
        known: Measured | None,
        name: Features,
        weights: Path | None,
        device: torch.device,
        open_classifier: Callable[[], Reference],
    ) -> None:
        self.samples, self.reference, self.known = samples, reference, known
        self.name, self.weights, self.device = name, weights, device
        self._open_classifier = open_classifier

    @functools.cached_property
    def classifier(self) -> Reference:
        """The reference with its classifier."""
        return self._open_classifier()

    @functools.cached_property
    def extractor(self) -> FeatureExtractor:
        """The extractor of both sides."""
        from tessera.metrics.features import open_extractor

        if self.name == "classifier":
            return self.classifier.extractor
        return open_extractor(self.name, self.weights, self.device)

    def measure(
        self, pairs: list[Any], num: int | None, seed: int, batch: int
    ) -> tuple[Measured, Measured | None, dict[Any, tuple[float, float]]]:
        """Both sides, and Inception Scores by convention."""
        from tessera.metrics.evaluate import (
            check_comparable,
            check_enough,
            complete,
            draw,
            measure_images,
            needs,
        )
        from tessera.metrics.formats import Measured, is_measured, read_measured
        from tessera.metrics.images import npz_names

        theirs = self.known
        is_file = is_measured(self.samples) and "arr_0" not in npz_names(self.samples)
        ours = read_measured(self.samples, self.name) if is_file else None
        if ours is not None and num is not None:
            ours = draw(ours, num, seed)
        # What cannot be compared should be said before hours of extraction.
        source = None
        if ours is None:
            source = _source(self.samples, num, seed, batch, self.device)
            check_enough(source.name, source.total, needs(pairs))
        expected = ours or Measured(str(self.samples), self.name, None)
        if theirs is not None:
            check_comparable(expected, theirs)
            _check_dim(theirs, self.name)
            if ours is None and theirs.weights is not None:
                digits = getattr(self.extractor, "weights", None)
                check_comparable(Measured(str(self.samples), self.name, digits), theirs)
        wanted = needs(pairs, reference=True)
        only_samples = all(metric == "is" for metric, _ in pairs)
        if theirs is not None and not only_samples:
            theirs, _ = complete(theirs, wanted, lambda: self.extractor)
        if self.known is None and not only_samples:
            theirs = self._reference_images(wanted, batch)
        if ours is not None:
            ours, scores = complete(ours, needs(pairs), lambda: self.extractor)
        else:
            assert source is not None
            ours, scores = measure_images(source, self.extractor, needs(pairs))
        return ours, theirs, scores

    def _reference_images(self, wanted: Needs, batch: int) -> Measured:
        from tessera.errors import DataError
        from tessera.metrics.evaluate import data_source, measure_images
        from tessera.metrics.formats import Measured
        from tessera.metrics.images import open_images
        from tessera.metrics.reference import has_classifier

        assert self.reference is not None
        if self.name == "classifier":
            stored = self.classifier
            if not wanted.features:
                statistics = stored.statistics
                return Measured(
                    stored.name, stored.extractor.name, n=statistics.n, moments=statistics.moments()
                )
            if has_classifier(self.reference):
                raise DataError(
                    f"{self.reference} holds statistics only; kid and pr compare the features of "
                    "each image. Give the real images themselves as REFERENCE"
                )
        elif has_classifier(self.reference):
            raise DataError(
                f"{self.reference} is a reference of the in-domain classifier, not of {self.name}; "
                f"make one with: tessera eval reference DATA REF.npz --features {self.name}"
            )
        data = open_images(self.reference)
        measured, _ = measure_images(data_source(data, batch=batch), self.extractor, wanted)
        return measured


def _check_dim(known: Measured, name: str) -> None:
    from tessera.metrics.formats import NAMES

    if known.extractor is None and known.dim not in NAMES:
        raise DataError(
            f"{known.name}: features of {known.dim} numbers, which are neither Inception's (2048) "
            f"nor DINOv2's (1024); {name} features cannot be compared with them"
        )


def _known(
    reference: Path | None,
    features: str | None,
    metrics: list[Metric] | None,
    convention: str | None,
) -> tuple[Measured | None, Features]:
    """What a file of statistics or features holds, and the features to compare.

    They are by default what the file says; of images the classifier's, unless Inception is asked
    for.
    """
    from tessera.metrics.formats import is_measured, read_measured
    from tessera.metrics.reference import has_classifier

    if reference is None:
        return None, known_features(features or "inception")
    known: Measured | None = None
    classifier = has_classifier(reference)
    if is_measured(reference) and not classifier:
        known = read_measured(reference, None if features == "classifier" else features)
    if features is not None:
        return known, known_features(features)
    if known is not None:
        return known, known_features(known.extractor or "inception")
    if classifier or metrics == ["fd"] or (metrics is None and convention is None):
        return None, "classifier"
    return None, "inception"


def _is_main() -> bool:
    from tessera import distributed

    return distributed.is_main()


@contextlib.contextmanager
def _session(device: str | None = None) -> Iterator[torch.device]:
    """The processes of a launcher, and warnings for people, each once."""
    from tessera import distributed

    with distributed.session(device) as where, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        try:
            yield where
        finally:
            for message in dict.fromkeys(str(warning.message) for warning in caught):
                if distributed.is_main():
                    typer.secho(f"warning: {message}", fg=typer.colors.YELLOW, err=True)


def _is_pipeline(path: Path) -> bool:
    """Whether a folder is a pipeline's, or a run's, whose previews are no samples."""
    marks = ("config.json", "pipeline/config.json", "recipe.yaml")
    return any((path / mark).is_file() for mark in marks)


def _refuse_pipeline(path: Path) -> None:
    if _is_pipeline(path):
        raise DataError(
            f"{path} is a pipeline; give real images here, or a reference file made of them"
        )


def _source(path: Path, num: int | None, seed: int, batch: int, device: torch.device) -> Source:
    """This process's share of a set of images, or of a pipeline's samples."""
    from tessera.metrics.evaluate import arrays, data_source, share
    from tessera.metrics.images import open_images

    if not _is_pipeline(path):
        return data_source(open_images(path), num=num, seed=seed, batch=batch)
    total = num or _SAMPLED
    seeds = [seed + int(row) for row in share(total)]
    images = (images for images, _ in _sampled(path, seeds, batch, device))
    return arrays(images, total, str(path))


def _sampled(
    path: Path, seeds: list[int], batch: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor | None]]:
    import torch

    from tessera.pipelines.loading import load

    pipeline = load(path, device=device)
    for made in pipeline.sample_batches(seeds, batch=batch):
        labels = None if made.labels is None else torch.from_numpy(made.labels)
        yield torch.from_numpy(made.images).permute(0, 3, 1, 2), labels


def _score_classic(
    samples: Path,
    reference: Callable[[], Reference],
    num: int | None,
    seed: int,
    batch: int,
    as_json: bool,
    device: torch.device,
) -> None:
    """The in-domain classifier's distance and what it recognises."""
    from tessera import distributed
    from tessera.metrics import score as scoring
    from tessera.metrics.evaluate import share
    from tessera.metrics.images import open_images
    from tessera.progress import progress

    if _is_pipeline(samples):
        known, total = reference(), num or _SAMPLED
        seeds = [seed + int(row) for row in share(total)]
        with progress("samples", total, unit="images") as bar:

            def counted() -> Iterator[tuple[Tensor, Tensor | None]]:
                for images, labels in _sampled(samples, seeds, batch, device):
                    yield images, labels
                    bar.advance(len(images) * distributed.world())

            result = scoring.score(counted(), known)
    else:
        data = open_images(samples)  # before a classifier is trained in vain
        known = reference()
        result = scoring.score_images(data, known, num=num, seed=seed, batch=batch)
    if not _is_main():
        return
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        print_score(result, known)

"""`tessera eval`: score images against real ones."""

from __future__ import annotations

import contextlib
import functools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from tessera.cli.nll import nll

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tessera.metrics.evaluate import Metric, Needs, Result, Source
    from tessera.metrics.features import FeatureExtractor, Features
    from tessera.metrics.formats import Measured
    from tessera.metrics.reference import Reference
    from tessera.metrics.score import Score

eval_app = typer.Typer(no_args_is_help=True, help="Score images against real ones.")
eval_app.command()(nll)

FEATURES = typer.Option(None, help="Feature extractor: classifier, inception or dinov2.")
WEIGHTS = typer.Option(None, help="File with the extractor's weights; by default found or loaded.")
_SAMPLED = 1000


@eval_app.command()
def features(
    images: Path = typer.Argument(help="Images (folder, archive, packed set, NPZ) or a pipeline."),
    out: Path = typer.Argument(help="Feature file to write (.npz)."),
    features: str = typer.Option("inception", help="Feature extractor: inception or dinov2."),
    weights: Path | None = WEIGHTS,
    num: int | None = typer.Option(None, min=2, help="Images; of a pipeline 1,000 by default."),
    seed: int = typer.Option(0, min=0, help="A pipeline's first seed; of a drawn subset."),
    batch: int = typer.Option(64, min=1, help="Images at once."),
) -> None:
    """Write the features of every image to OUT, from which any score can be computed later."""
    from tessera.metrics.evaluate import Needs, measure_images
    from tessera.metrics.features import open_extractor
    from tessera.metrics.formats import save_features

    _check_npz(out, "feature")
    with _session() as device:
        source = _source(images, num, seed, batch)
        extractor = open_extractor(_features(features), weights, device)
        wanted = Needs(features=True, spatial=features == "inception")
        measured, _ = measure_images(source, extractor, wanted)
        if _is_main():
            save_features(out, measured)
            _print_table("Features", [*_measured_rows(measured), ("written to", str(out))])


@eval_app.command()
def reference(
    data: Path = typer.Argument(help="Real images: archive, packed set, folder or NPZ."),
    out: Path = typer.Argument(help="Reference file to write (.npz)."),
    features: str = typer.Option("classifier", help="Extractor: classifier, inception or dinov2."),
    weights: Path | None = WEIGHTS,
    seed: int = typer.Option(0, min=0, help="Seed of the classifier's training."),
    training_images: int = typer.Option(
        60_000, min=1, help="Images to train the classifier on, counting repetitions."
    ),
    batch: int = typer.Option(64, min=1, help="Images at once."),
) -> None:
    """Write statistics of the features of DATA to OUT; a classifier is trained on it first."""
    from tessera.metrics.evaluate import Needs, measure_images
    from tessera.metrics.features import open_extractor
    from tessera.metrics.formats import save_statistics
    from tessera.metrics.images import open_images
    from tessera.metrics.reference import build_reference, save_reference

    _check_npz(out, "reference")
    name = _features(features)
    with _session() as device:
        if name != "classifier":
            source = _source(data, None, seed, batch)
            extractor = open_extractor(name, weights, device)
            wanted = Needs(moments=True, spatial_moments=name == "inception")
            measured, _ = measure_images(source, extractor, wanted)
            if _is_main():
                save_statistics(out, measured)
                _print_table("Reference", [*_measured_rows(measured), ("written to", str(out))])
        elif _is_main():
            result = build_reference(
                open_images(data), seed=seed, training_images=training_images, device=device
            )
            save_reference(out, result)
            _print_table("Reference", [*_reference_rows(result), ("written to", str(out))])


@eval_app.command()
def score(
    samples: Path = typer.Argument(
        help="Images (folder, archive, packed set, NPZ), a pipeline, or a feature file."
    ),
    reference: Path = typer.Argument(
        help="Reference or feature file, also EDM's, ADM's, RDM's, torch-fidelity's; or images."
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
        None, min=2, help="Images to score; of a pipeline 1,000 by default, of images all."
    ),
    seed: int = typer.Option(0, min=0, help="A pipeline's first seed; the classifier's seed."),
    batch: int = typer.Option(64, min=1, help="Images at once."),
    training_images: int = typer.Option(
        60_000, min=1, help="As in `reference`, if REFERENCE is a set of images."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """Score SAMPLES against REFERENCE."""
    from tessera.metrics.evaluate import chosen, compare
    from tessera.metrics.formats import is_measured, read_measured
    from tessera.metrics.reference import has_classifier, open_reference

    wanted = _metrics(metrics)
    open_classifier = functools.partial(
        open_reference, reference, seed=seed, training_images=training_images
    )
    with _session() as device:
        known: Measured | None = None
        if is_measured(reference) and not has_classifier(reference):
            named = None if features in (None, "classifier") else features
            known = read_measured(reference, named)
        name = _features(features) if features else _default_features(reference, known, wanted)
        if name == "classifier" and wanted is None:
            if _is_main():
                _score_classic(samples, open_classifier(device=device), num, seed, batch, as_json)
            return
        if wanted is None:
            wanted = ["fid"] if name == "inception" else ["fd"]
        _check_metrics(wanted, name)
        pairs = chosen(wanted, cast(Any, convention and _convention(convention)))
        sides = _Sides(samples, reference, known, name, weights, device)
        sides.open_classifier = open_classifier
        ours, theirs, scores = sides.measure(pairs, num, seed, batch)
        if _is_main():
            results = compare(ours, theirs, pairs, scores, device)
            _print_results(results, ours, theirs, as_json)


class _Sides:
    """Samples and reference of a score, measured with one extractor that is opened when needed."""

    def __init__(
        self,
        samples: Path,
        reference: Path,
        known: Measured | None,
        name: Features,
        weights: Path | None,
        device: torch.device,
    ) -> None:
        self.samples, self.reference, self.known = samples, reference, known
        self.name, self.weights, self.device = name, weights, device
        self.open_classifier: Any = None

    @functools.cached_property
    def classifier(self) -> Reference:
        """The reference with its classifier."""
        result: Reference = self.open_classifier(device=self.device)
        return result

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
            complete,
            measure_images,
            needs,
        )
        from tessera.metrics.formats import Measured, is_measured, read_measured
        from tessera.metrics.images import npz_names

        theirs = self.known
        is_file = is_measured(self.samples) and "arr_0" not in npz_names(self.samples)
        ours = read_measured(self.samples, self.name) if is_file else None
        # What cannot be compared should be said before hours of extraction.
        expected = ours or Measured(str(self.samples), self.name, None)
        if theirs is not None:
            check_comparable(expected, theirs)
            _check_dim(theirs, self.name)
        wanted = needs(pairs, reference=True)
        only_samples = all(metric == "is" for metric, _ in pairs)
        if theirs is not None and not only_samples:
            theirs, _ = complete(theirs, wanted, lambda: self.extractor)
        source = None if ours is not None else _source(self.samples, num, seed, batch)
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
    from tessera.errors import DataError
    from tessera.metrics.formats import NAMES

    if known.extractor is None and known.dim not in NAMES:
        raise DataError(
            f"{known.name}: features of {known.dim} numbers, which are neither Inception's (2048) "
            f"nor DINOv2's (1024); {name} features cannot be compared with them"
        )


def _default_features(reference: Path, known: Measured | None, metrics: Any) -> Features:
    """What a reference file says; of images the classifier, unless a metric needs Inception."""
    from tessera.metrics.reference import has_classifier

    if known is not None:
        return _features(known.extractor or "inception")
    if has_classifier(reference) or metrics in (None, ["fd"]):
        return "classifier"
    return "inception"


def _features(name: str) -> Features:
    from tessera.errors import TesseraError
    from tessera.metrics.features import FEATURES as KNOWN

    if name not in KNOWN:
        raise TesseraError(f"--features {name!r}: there are {', '.join(KNOWN)}")
    return name


def _metrics(text: str | None) -> list[Metric] | None:
    from tessera.errors import TesseraError
    from tessera.metrics.evaluate import METRICS

    if text is None:
        return None
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise TesseraError(f"--metrics {text!r}: there are {', '.join(METRICS)}")
    return cast("list[Metric]", names)


def _check_metrics(metrics: list[Metric], features: Features) -> None:
    from tessera.errors import TesseraError

    only = [metric for metric in metrics if metric in ("fid", "sfid", "is")]
    if features != "inception" and only:
        raise TesseraError(
            f"{', '.join(only)} are made of Inception features, not of {features} features; the "
            "distance on other features is called fd"
        )


def _convention(name: str) -> str:
    from tessera.errors import TesseraError
    from tessera.metrics.evaluate import CONVENTIONS

    if name not in (*CONVENTIONS, "all"):
        raise TesseraError(f"--convention {name!r}: there are {', '.join(CONVENTIONS)} and all")
    return name


def _check_npz(out: Path, what: str) -> None:
    from tessera.errors import TesseraError

    if out.suffix != ".npz":
        raise TesseraError(f"{out}: a {what} file is an NPZ file; give it a name with .npz")


def _is_main() -> bool:
    from tessera import distributed

    return distributed.is_main()


@contextlib.contextmanager
def _session() -> Iterator[torch.device]:
    """The processes of a launcher, and warnings for people, each once."""
    from tessera import distributed

    with distributed.session() as device, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        try:
            yield device
        finally:
            for message in dict.fromkeys(str(warning.message) for warning in caught):
                if distributed.is_main():
                    typer.secho(f"warning: {message}", fg=typer.colors.YELLOW, err=True)


def _is_pipeline(path: Path) -> bool:
    return (path / "config.json").exists() or (path / "pipeline").is_dir()


def _source(path: Path, num: int | None, seed: int, batch: int) -> Source:
    """This process's share of a set of images, or of a pipeline's samples."""
    from tessera.metrics.evaluate import arrays, data_source, share
    from tessera.metrics.images import open_images

    if not _is_pipeline(path):
        return data_source(open_images(path), num=num, seed=seed, batch=batch)
    total = num or _SAMPLED
    seeds = [seed + int(row) for row in share(total)]
    return arrays((images for images, _ in _sampled(path, seeds, batch)), total, str(path))


def _sampled(path: Path, seeds: list[int], batch: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    import torch

    from tessera.distributed import device
    from tessera.pipelines.loading import load

    pipeline = load(path, device=device())
    for made in pipeline.sample_batches(seeds, batch=batch):
        labels = None if made.labels is None else torch.from_numpy(made.labels)
        yield torch.from_numpy(made.images).permute(0, 3, 1, 2), labels


def _score_classic(
    samples: Path, known: Reference, num: int | None, seed: int, batch: int, as_json: bool
) -> None:
    """The in-domain classifier's distance and what it recognises."""
    from tessera.metrics import score as scoring
    from tessera.metrics.images import open_images
    from tessera.progress import progress

    if _is_pipeline(samples):
        seeds = list(range(seed, seed + (num or _SAMPLED)))
        with progress("samples", len(seeds), unit="images") as bar:

            def counted() -> Iterator[tuple[Tensor, Tensor | None]]:
                for images, labels in _sampled(samples, seeds, batch):
                    yield images, labels
                    bar.advance(len(images))

            result = scoring.score(counted(), known)
    else:
        result = scoring.score_images(open_images(samples), known, num=num, seed=seed)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        _print_score(result, known)


def _reference_rows(result: Reference) -> list[tuple[str, str]]:
    facts = result.extractor.facts
    channels, height, width = facts.shape
    task = "quarter turns (no labels)"
    return [
        ("real images", f"{result.statistics.n:,} of {result.name}, {width}x{height}x{channels}"),
        ("features", f"{result.extractor.dim} of the {result.extractor.name}"),
        ("classifier tells apart", f"{facts.outputs} classes" if facts.task == "classes" else task),
        (
            "right on held-out real images",
            f"{facts.accuracy:.1%} of {facts.held_out:,} (chance {1 / facts.outputs:.1%})",
        ),
    ]


def _measured_rows(measured: Measured) -> list[tuple[str, str]]:
    weights = f", weights {measured.weights}" if measured.weights else ""
    count = "an unknown number" if measured.n is None else f"{measured.n:,}"
    return [
        ("images", f"{count} of {measured.name}"),
        ("features", f"{measured.dim} of {measured.extractor}{weights}"),
    ]


def _print_score(result: Score, known: Reference) -> None:
    rows = [("Fréchet distance (in-domain classifier)", f"{result.fd_classifier:.6g}")]
    if result.recognised is not None:
        rows.append(("recognised as their class", f"{result.recognised:.1%}"))
    rows.append(("samples", f"{result.n:,}"))
    _print_table("Score", [*rows, *_reference_rows(known)])


def _print_results(
    results: list[Result], ours: Measured, theirs: Measured | None, as_json: bool
) -> None:
    if as_json:
        document = {
            "results": [result.as_dict() for result in results],
            "samples": {"name": ours.name, "n": ours.n},
            "reference": theirs and {"name": theirs.name, "n": theirs.n},
            "features": {"extractor": ours.extractor, "dim": ours.dim, "weights": ours.weights},
        }
        print(json.dumps(document, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Scores", title_justify="left")
    for column in ("metric", "value", "as", "rule"):
        table.add_column(column, style="bold" if column == "metric" else None)
    for result in results:
        for index, (name, value) in enumerate(result.values.items()):
            first = index == 0
            table.add_row(
                name,
                f"{value:.6g}",
                result.convention if first else "",
                result.rule if first else "",
            )
    Console().print(table)
    rows = [("samples", f"{ours.n:,}" if ours.n else "an unknown number")]
    if theirs is not None:
        rows += [(f"reference {key}", value) for key, value in _measured_rows(theirs)]
    _print_table("", rows)


def _print_table(title: str, rows: list[tuple[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows:
        table.add_row(name, str(value))
    Console().print(table)

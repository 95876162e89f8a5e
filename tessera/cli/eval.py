"""`tessera eval`: score images against real ones."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tessera.cli.app import App
from tessera.cli.eval_checks import (
    check_destination,
    check_metrics,
    check_weights,
    known_convention,
    known_features,
    known_metrics,
)
from tessera.cli.nll import nll
from tessera.cli.parts import OwnParts, import_parts
from tessera.cli.score_tables import (
    measured_rows,
    print_results,
    print_score,
    reference_rows,
)
from tessera.cli.tables import print_facts
from tessera.errors import DataError, TesseraError

if TYPE_CHECKING:
    import torch

    from tessera.metrics.measure import ImageStream
    from tessera.recipes.parts import Parts

eval_app = App(no_args_is_help=True, help="Score images against real ones.")
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
    own_parts: OwnParts = None,
) -> None:
    """Write the features of every image to OUT, from which any score can be computed later."""
    from tessera.metrics.conventions import Needs
    from tessera.metrics.features import open_extractor
    from tessera.metrics.formats import save_features
    from tessera.metrics.measure import measure_images

    check_destination(out, "feature", overwrite=overwrite, source=images)
    parts = import_parts(own_parts)
    with _session(device) as where:
        stream = _images(images, num, seed, batch, where, parts)
        extractor = open_extractor(known_features(features), weights, where)
        wanted = Needs(features=True, spatial=features == "inception")
        measured = measure_images(stream, extractor, wanted)
        if _is_main():
            save_features(out, measured)
            print_facts(
                [*measured_rows(measured), ("written to", str(out))], "Features", boxed=True
            )


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
    own_parts: OwnParts = None,
) -> None:
    """Write statistics of the features of DATA to OUT.

    By default they are the features of a classifier that is trained on DATA first and kept beside
    it, in a hidden file.
    """
    from tessera.metrics.conventions import Needs
    from tessera.metrics.features import open_extractor
    from tessera.metrics.formats import save_statistics
    from tessera.metrics.measure import measure_images
    from tessera.metrics.reference import reference_of, save_reference

    check_destination(out, "reference", overwrite=overwrite, source=data)
    parts = import_parts(own_parts)
    name = known_features(features)
    check_weights(weights, name)
    if name == "classifier" and num is not None:
        raise TesseraError("--num: the classifier is trained on all images; leave it out")
    with _session(device) as where:
        if name != "classifier":
            stream = _images(data, num, seed, batch, where, parts)
            extractor = open_extractor(name, weights, where)
            wanted = Needs(moments=True, spatial_moments=name == "inception")
            measured = measure_images(stream, extractor, wanted)
            if _is_main():
                save_statistics(out, measured)
                print_facts(
                    [*measured_rows(measured), ("written to", str(out))], "Reference", boxed=True
                )
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
            print_facts(
                [*reference_rows(result), ("written to", str(out))], "Reference", boxed=True
            )


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
    own_parts: OwnParts = None,
) -> None:
    """Score SAMPLES against REFERENCE."""
    from tessera.metrics.conventions import chosen
    from tessera.metrics.evaluate import compare, score_stream
    from tessera.metrics.measure import ImageStream
    from tessera.metrics.sides import Sides, open_known, stored_features

    wanted, parts = known_metrics(metrics), import_parts(own_parts)
    tool = None if convention is None else known_convention(convention)
    if reference is not None:
        _refuse_pipeline(reference)
    elif wanted != ["is"]:
        raise TesseraError("name a REFERENCE to compare with; only --metrics is needs none")
    with _session(device) as where:
        asked = None if features is None else known_features(features)
        any_metric = wanted is None and tool is None
        inception = not any_metric and wanted != ["fd"]
        known, name = open_known(reference, asked, inception=inception)
        check_weights(weights, name)
        by_classifier = name == "classifier" and any_metric
        wanted = wanted or (["fid"] if name == "inception" else ["fd"])
        check_metrics(wanted, name)
        pairs = chosen(wanted, tool)
        stored = None if by_classifier else stored_features(samples, name, num, seed)
        sides = Sides(
            stored or _images(samples, num, seed, batch, where, parts), reference, known, name,
            weights=weights, seed=seed, training_images=training_images, batch=batch, device=where,
        )  # fmt: skip
        if by_classifier:
            assert isinstance(sides.samples, ImageStream)
            result = score_stream(sides.samples, sides.classifier)
            if _is_main():
                print_score(result, sides.classifier, as_json)
            return
        ours, theirs = sides.measure(pairs)
        if _is_main():
            print_results(compare(ours, theirs, pairs, where), ours, theirs, as_json)


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


def _refuse_pipeline(path: Path) -> None:
    from tessera.pipelines.stream import is_pipeline

    if path.exists() and is_pipeline(path):
        raise DataError(
            f"{path} is a pipeline; give real images here, or a reference file made of them"
        )


def _images(
    path: Path, num: int | None, seed: int, batch: int, device: torch.device, parts: Parts
) -> ImageStream:
    """This process's share of a set of images, or of a pipeline's samples."""
    from tessera.metrics.images import open_images
    from tessera.metrics.measure import data_source
    from tessera.pipelines.loading import load
    from tessera.pipelines.stream import is_pipeline, sample_stream

    if not is_pipeline(path):
        return data_source(open_images(path), num=num, seed=seed, batch=batch)
    pipeline = load(path, device=device, parts=parts)
    try:
        pipeline.check([seed])
    except TesseraError as error:
        raise TesseraError(
            f"{error}. Make its samples first, with options: tessera sample {path} --out SAMPLES"
        ) from error
    return sample_stream(pipeline, num or _SAMPLED, str(path), seed=seed, batch=batch)

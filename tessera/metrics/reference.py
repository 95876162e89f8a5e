"""Reference files: statistics of real images, and the extractor that they were measured with."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import numpy as np
import torch

from tessera import distributed
from tessera._version import __version__
from tessera.errors import DataError
from tessera.files import atomic_file, user_path
from tessera.metrics.classifier import Classifier, LabelledImages, train_classifier
from tessera.metrics.features import measure
from tessera.metrics.images import batches, npz_names, open_images, read_npz
from tessera.metrics.statistics import FeatureStatistics
from tessera.plain import parse_json

_FORMAT = 1
_WEIGHT = "classifier."


@dataclass(frozen=True)
class Reference:
    """What samples are scored against.

    Attributes:
        name: the real images' set.
        statistics: of the features of all of them.
        extractor: the in-domain classifier that made the features.
    """

    name: str
    statistics: FeatureStatistics
    extractor: Classifier


def build_reference(
    data: LabelledImages,
    *,
    seed: int = 0,
    training_images: int = 60_000,
    device: torch.device | str = "cpu",
    batch: int = 256,
) -> Reference:
    """Train the in-domain classifier on `data` and measure its features of every image.

    Args as for `train_classifier`, and:
        batch: images measured at once.
    """
    classifier = train_classifier(data, seed=seed, training_images=training_images, device=device)
    statistics = measure(classifier, (images for _, images in batches(data, size=batch)), len(data))
    return Reference(data.name, statistics, classifier)


def save_reference(path: str | os.PathLike[str], reference: Reference) -> None:
    """Write an NPZ file of plain arrays: `mu`, `sigma`, `n`, facts as JSON, the weights."""
    facts, weights = reference.extractor.state()
    description = {
        "format": _FORMAT,
        "tessera": __version__,
        "name": reference.name,
        "extractor": reference.extractor.name,
        "classifier": facts,
    }
    arrays = {
        "mu": reference.statistics.mu.numpy(),
        "sigma": reference.statistics.sigma.numpy(),
        "n": np.int64(reference.statistics.n),
        "tessera": np.array(json.dumps(description)),
        **{_WEIGHT + name: weight for name, weight in weights.items()},
    }
    with atomic_file(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_reference(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Reference:
    """Read what `save_reference` wrote.

    Raises:
        DataError: the file is missing, damaged, or was made by another tool.
    """
    path = user_path(path)
    arrays = read_npz(path)
    if "tessera" not in arrays:
        raise DataError(
            f"{path}: not a reference file of tessera. Statistics of other tools do not say which "
            "images and features they come from; make one with: tessera eval reference DATA REF.npz"
        )
    try:
        description = parse_json(str(arrays["tessera"]), str(path))
        name = description["name"]
        if "classifier" not in description:
            raise DataError(
                f"{path}: statistics of {description['extractor']} features, not of an in-domain "
                f"classifier; score with --features {description['extractor']}"
            )
        if description["format"] != _FORMAT:
            raise DataError(
                f"{path}: reference format {description['format']}, this version reads {_FORMAT}; "
                "make it again with: tessera eval reference"
            )
        weights = {
            name.removeprefix(_WEIGHT): array
            for name, array in arrays.items()
            if name.startswith(_WEIGHT)
        }
        classifier = Classifier.from_state(description["classifier"], weights)
        classifier.network.to(device)
        statistics = FeatureStatistics.from_moments(
            int(arrays["n"]), torch.from_numpy(arrays["mu"]), torch.from_numpy(arrays["sigma"])
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: a damaged reference file ({error})") from error
    return Reference(str(name), statistics, classifier)


def has_classifier(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a reference with its own classifier, as `save_reference` writes it."""
    path = user_path(path)
    if path.suffix != ".npz" or "tessera" not in npz_names(path):
        return False
    description = str(read_npz(path, only=("tessera",))["tessera"])
    return '"classifier": {' in description


def open_reference(
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    training_images: int = 60_000,
    device: torch.device | str = "cpu",
    batch: int = 256,
) -> Reference:
    """A reference file, or a data set from which the reference is built now.

    It is the same on every process, of which all must take part. Args as for `build_reference`.

    Raises:
        DataError: neither can be read.
    """
    path = user_path(path)
    if path.suffix == ".npz" and "arr_0" not in npz_names(path):
        return load_reference(path, device)
    built: Reference | None = None
    with distributed.main_first():
        # Trained once: not every device trains to the same bit twice.
        if distributed.is_main():
            built = build_reference(
                open_images(path),
                seed=seed,
                training_images=training_images,
                device=device,
                batch=batch,
            )
            built.extractor.network.cpu()
    shared = distributed.broadcast(built)
    assert shared is not None
    shared.extractor.network.to(device)
    return shared

"""Reference files: statistics of real images, and the extractor that they were measured with."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tessera import distributed
from tessera._version import __version__
from tessera.data.decode import is_image
from tessera.data.labels import LABELS_FILE
from tessera.data.members import FolderMembers
from tessera.errors import DataError
from tessera.files import atomic_file, user_path
from tessera.metrics.classifier import Classifier, LabelledImages, train_classifier
from tessera.metrics.features import feature_statistics
from tessera.metrics.formats import Measured
from tessera.metrics.images import batches, npz_names, open_images, read_npz
from tessera.metrics.statistics import FeatureStatistics
from tessera.plain import parse_json
from tessera.progress import progress

_FORMAT = 1
_METHOD = 2  # of the classifier's training; what was kept of another is made again
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

    def measured(self) -> Measured:
        """The statistics, as other files of statistics hold them."""
        moments = self.statistics.moments()
        return Measured(self.name, self.extractor.name, n=moments.n, moments=moments)


def build_reference(
    data: LabelledImages,
    *,
    seed: int = 0,
    training_images: int | None = None,
    device: torch.device | str = "cpu",
    batch: int = 256,
) -> Reference:
    """Train the in-domain classifier on `data` and measure its features of every image.

    Args as for `train_classifier`, and:
        batch: images measured at once.
    """
    classifier = train_classifier(data, seed=seed, training_images=training_images, device=device)
    statistics = feature_statistics(
        classifier, (images for _, images in batches(data, size=batch)), len(data)
    )
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


def reference_of(
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    training_images: int | None = None,
    device: torch.device | str = "cpu",
    batch: int = 256,
) -> Reference:
    """The reference of the images at `path`, which is built once and kept beside them.

    What is kept is found by the bytes of all of its images and labels, so that it is never that of
    a set that has changed since. Where nothing can be written, there is a warning.

    Args as for `build_reference`.

    Raises:
        DataError: the images cannot be read, or no classifier can be trained on them.
    """
    path = Path(os.path.abspath(path))
    data = open_images(path)
    content = _content(path)
    kept = _kept(path, content, seed, training_images)
    if kept.is_file():
        with contextlib.suppress(DataError):  # damaged, so it is made again
            return load_reference(kept, device)
    made = build_reference(
        data, seed=seed, training_images=training_images, device=device, batch=batch
    )
    try:
        # A set that was changed while it was read is neither the old one nor the new one.
        if _content(path) == content:
            save_reference(kept, made)
            _remove_outdated(path, content)
    except OSError as error:
        warnings.warn(
            f"the classifier of {path} cannot be kept beside it ({error.strerror}), so it will be "
            "trained again. To keep it elsewhere: tessera eval reference",
            UserWarning,
            stacklevel=2,
        )
    return made


def find_reference(path: str | os.PathLike[str]) -> Path | None:
    """A reference file with its own classifier that lies beside the images at `path`.

    It is `NAME.ref.npz`, or what `reference_of` has kept of these very images. Nothing is trained;
    the images are read only if something was kept, to compare them.
    """
    path = Path(os.path.abspath(path))
    for name in (f"{path.name}.ref.npz", f"{path.stem}.ref.npz"):
        beside = path.with_name(name)
        if beside.is_file() and has_classifier(beside):
            return beside
    known = _kept(path, "*", 0, None)
    if not path.exists() or not any(path.parent.glob(glob.escape(known.name).replace("[*]", "*"))):
        return None
    kept = _kept(path, _content(path), 0, None)
    return kept if kept.is_file() else None


def _kept(path: Path, content: str, seed: int, training_images: int | None) -> Path:
    """Where the reference of the images at `path` is kept, beside them."""
    method = repr((_METHOD, _FORMAT, __version__, seed, training_images))
    end = f"-{hashlib.sha256(method.encode()).hexdigest()[:8]}.ref.npz"
    return path.with_name(f".{path.name}.{content}{end}")


def _content(path: Path) -> str:
    """Digits of a checksum over the images and labels of a set."""
    files = [path]
    if path.is_dir():
        names = FolderMembers(path).names
        files = [path / name for name in names if is_image(name) or name == LABELS_FILE]
    sizes = [file.stat().st_size for file in files]
    digest = hashlib.sha256()
    with progress(f"comparing {path.name}", sum(sizes), unit="bytes") as bar:
        for file, size in zip(files, sizes, strict=True):
            digest.update(os.fsencode(file.relative_to(path)) + f"\0{size}\0".encode())
            with open(file, "rb") as opened:
                while part := opened.read(1 << 20):
                    digest.update(part)
                    bar.advance(len(part))
    return digest.hexdigest()[:16]


def _remove_outdated(path: Path, content: str) -> None:
    """Remove what is kept of a set as it was before."""
    kept = re.compile(rf"\.{re.escape(path.name)}\.([0-9a-f]{{16}})-[0-9a-f]{{8}}\.ref\.npz")
    for file in path.parent.iterdir():
        found = kept.fullmatch(file.name)
        if found is not None and found[1] != content:
            file.unlink(missing_ok=True)


def open_reference(
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    training_images: int | None = None,
    device: torch.device | str = "cpu",
    batch: int = 256,
) -> Reference:
    """A reference file, or a data set whose reference is taken from `reference_of`.

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
            built = reference_of(
                path, seed=seed, training_images=training_images, device=device, batch=batch
            )
            built.extractor.network.cpu()
    shared = distributed.broadcast(built)
    assert shared is not None
    shared.extractor.network.to(device)
    return shared

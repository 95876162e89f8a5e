"""Files of statistics and features that the field exchanges, recognised by their keys.

None of them is ever allowed to run code: pickles may only rebuild NumPy arrays and plain values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera._version import __version__
from tessera.errors import DataError
from tessera.files import atomic_file, user_path
from tessera.metrics.classifier import LabelledImages
from tessera.metrics.conventions import Convention
from tessera.metrics.images import npz_names, open_images, read_npz
from tessera.metrics.inception import SPATIAL_DIM, channels_first_order, channels_last_order
from tessera.metrics.statistics import Moments
from tessera.metrics.weights import check_numbers, load_torch
from tessera.pickles import NUMPY, load_pickle
from tessera.plain import parse_json

FORMAT = 2
NAMES = {2048: "inception", 1024: "dinov2"}


@dataclass(frozen=True)
class Measured:
    """What is known of the features of a set of images; parts that nobody asked for are None.

    Attributes:
        name: of the set or file.
        extractor: name of the feature extractor, where known.
        weights: first digits of the checksum of its weights, where known.
        n: number of images, where known.
        moments: of the features.
        spatial_moments: of the spatial features, in the order C, H, W.
        features: float32 or float64 [N, D].
        spatial: float32 or float64 [N, 2023], in the order C, H, W.
        images: the images of which features can be measured still, if the file holds any.
        inception_scores: mean and deviation of the Inception Score, by convention.
        recognised: share of the images that the in-domain classifier takes for their class.
    """

    name: str
    extractor: str | None = None
    weights: str | None = None
    n: int | None = None
    moments: Moments | None = None
    spatial_moments: Moments | None = None
    features: Tensor | None = None
    spatial: Tensor | None = None
    images: LabelledImages | None = None
    inception_scores: Mapping[Convention, tuple[float, float]] = field(default_factory=dict)
    recognised: float | None = None

    @property
    def dim(self) -> int | None:
        """Numbers in a feature vector, where known."""
        if self.features is not None:
            return self.features.shape[1]
        return None if self.moments is None else self.moments.dim


def is_measured(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds statistics or features, rather than images alone."""
    path = user_path(path)
    if path.suffix in (".pkl", ".pt", ".pth"):
        return True
    if path.suffix != ".npz":
        return False
    names = npz_names(path)
    return not names or "arr_0" not in names or "mu" in names


def read_measured(path: str | os.PathLike[str], features: str | None = None) -> Measured:
    """Read a file of statistics or features.

    Args:
        path: our own files; EDM and MAR `.npz` (mu, sigma), EDM2 `.pkl`; ADM `.npz` (mu, sigma,
            mu_s, sigma_s, arr_0); RDM activations (feat, s_feat); caches of torch-fidelity (`.pt`).
        features: the extractor that is wanted, where a file has statistics of several.

    Raises:
        DataError: the file is missing, damaged, unsafe, or none of these.
    """
    path = user_path(path)
    if path.suffix == ".pkl":
        return _from_pickle(path, features)
    if path.suffix in (".pt", ".pth"):
        return _from_torch(path)
    names = npz_names(path)
    # The images of an ADM file are large, and read only when they are needed.
    arrays = read_npz(path, skip=("arr_0", "arr_1"))
    if "feat" in arrays:
        return _described(_activations(path, arrays), arrays, path)
    if "mu" in arrays and "sigma" in arrays:
        found = Measured(path.name, moments=_moments(path, arrays, "mu", "sigma"))
        if "mu_s" in arrays and "sigma_s" in arrays:
            spatial = _moments(path, arrays, "mu_s", "sigma_s")
            if spatial.dim != SPATIAL_DIM:
                raise DataError(f"{path}: 'mu_s' holds {spatial.dim} numbers, not {SPATIAL_DIM}")
            order = channels_first_order(SPATIAL_DIM)
            found = replace(found, spatial_moments=spatial.reordered(order))
        if "arr_0" in names:
            found = replace(found, images=open_images(path))
        return _described(found, arrays, path)
    raise DataError(
        f"{path}: neither statistics (mu, sigma) nor features (feat) nor images (arr_0); "
        f"it holds {', '.join(names) or 'nothing'}"
    )


def save_statistics(path: str | os.PathLike[str], measured: Measured) -> None:
    """Write mu, sigma, mu_s, sigma_s (H, W, C, as in ADM's files), which EDM and ADM read, too."""
    arrays: dict[str, NDArray[Any]] = {}
    if measured.moments is not None:
        arrays |= {"mu": measured.moments.mu.numpy(), "sigma": measured.moments.sigma.numpy()}
    if measured.spatial_moments is not None:
        last = measured.spatial_moments.reordered(channels_last_order(SPATIAL_DIM))
        arrays |= {"mu_s": last.mu.numpy(), "sigma_s": last.sigma.numpy()}
    _save(path, measured, arrays, "H, W, C")


def save_features(path: str | os.PathLike[str], measured: Measured) -> None:
    """Write feat, s_feat (C, H, W), the activations that RDM's tool reads, too."""
    arrays: dict[str, NDArray[Any]] = {}
    if measured.features is not None:
        arrays["feat"] = measured.features.numpy()
    if measured.spatial is not None:
        arrays["s_feat"] = measured.spatial.numpy()
    _save(path, measured, arrays, "C, H, W")


def _save(
    path: str | os.PathLike[str], measured: Measured, arrays: Mapping[str, NDArray[Any]], order: str
) -> None:
    description = {
        "format": FORMAT,
        "tessera": __version__,
        "name": measured.name,
        "extractor": measured.extractor,
        "weights": measured.weights,
        "resize": "TensorFlow 1 bilinear, 299" if measured.extractor == "inception" else None,
        "spatial_order": order,
    }
    facts = {"n": np.int64(measured.n or 0), "tessera": np.array(json.dumps(description))}
    with atomic_file(path) as file:
        np.savez(file, **arrays, **facts)  # type: ignore[arg-type]


def _described(found: Measured, arrays: Mapping[str, NDArray[Any]], path: Path) -> Measured:
    """`found` with what our own files say of themselves, or what the number of features tells."""
    if "tessera" not in arrays:
        return replace(found, extractor=NAMES.get(found.dim or 0))
    try:
        description = parse_json(str(arrays["tessera"]), str(path))
        n = int(arrays["n"]) or None
        moments, spatial = (m and replace(m, n=n) for m in (found.moments, found.spatial_moments))
        return replace(
            found,
            name=description["name"],
            extractor=description["extractor"],
            weights=description.get("weights"),
            n=n,
            moments=moments,
            spatial_moments=spatial,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: a damaged reference file ({error})") from error


def _activations(path: Path, arrays: Mapping[str, NDArray[Any]]) -> Measured:
    features = _matrix(path, "feat", arrays["feat"])
    spatial = _matrix(path, "s_feat", arrays["s_feat"]) if "s_feat" in arrays else None
    if spatial is not None and len(spatial) != len(features):
        raise DataError(f"{path}: {len(features)} rows in 'feat', but {len(spatial)} in 's_feat'")
    return Measured(path.name, n=len(features), features=features, spatial=spatial)


def _matrix(path: Path, name: str, array: NDArray[Any]) -> Tensor:
    if array.ndim != 2 or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise DataError(
            f"{path}: {name!r} must be finite features [N, D], it is {array.dtype} "
            f"{list(array.shape)}"
        )
    return torch.from_numpy(array if array.dtype == np.float64 else array.astype(np.float32))


def _moments(path: Path, arrays: Mapping[str, Any], mu_name: str, sigma_name: str) -> Moments:
    mu, sigma = (np.asarray(arrays[name]) for name in (mu_name, sigma_name))
    if (
        mu.ndim != 1
        or sigma.shape != (len(mu), len(mu))
        or not {mu.dtype.kind, sigma.dtype.kind} <= {"f"}
    ):
        raise DataError(
            f"{path}: {mu_name!r} {mu.dtype} {list(mu.shape)} and {sigma_name!r} {sigma.dtype} "
            f"{list(sigma.shape)} are not a mean [D] and a covariance [D, D]"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise DataError(f"{path}: {mu_name!r} or {sigma_name!r} holds numbers that are not finite")
    mean, covariance = (torch.from_numpy(a.astype(np.float64)) for a in (mu, sigma))
    return Moments(mean, covariance)


def read_array_pickle(path: Path) -> Any:
    """What a pickle of NumPy arrays and plain values holds.

    Raises:
        DataError: the file is missing or damaged, or holds anything else.
    """
    try:
        with open(path, "rb") as file:
            return load_pickle(file, NUMPY)
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except (DataError, OSError) as error:
        raise DataError(f"{path}: not a readable pickle of arrays ({error})") from error


def _from_pickle(path: Path, features: str | None) -> Measured:
    """EDM2's files: num_images, and mu and sigma for each of fid, fd_dinov2."""
    data = read_array_pickle(path)
    keys = {"inception": "fid", "dinov2": "fd_dinov2"}
    if isinstance(data, dict) and "mu" in data and "sigma" in data:
        moments = _moments(path, data, "mu", "sigma")
        return Measured(path.name, NAMES.get(moments.dim), moments=moments)
    found = [name for name, key in keys.items() if isinstance(data, dict) and key in data]
    if not found:
        raise DataError(f"{path}: holds no statistics (fid or fd_dinov2, with mu and sigma)")
    name = features or found[0]
    if name not in found:
        raise DataError(f"{path}: no statistics of {name} features; it has {', '.join(found)}")
    try:
        n = int(data["num_images"]) if "num_images" in data else None
        moments = replace(_moments(path, data[keys[name]], "mu", "sigma"), n=n)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged statistics ({error!r})") from error
    return Measured(path.name, name, n=n, moments=moments)


def _from_torch(path: Path) -> Measured:
    """torch-fidelity's caches: a tensor of features, or a dict of mu and sigma."""
    scalars = {type(np.dtype(name)) for name in ("float32", "float64", "int64")}
    reconstruct = np.ndarray.__reduce__(np.zeros(1))[0]
    allowed: list[Any] = [np.ndarray, np.dtype, *scalars]
    allowed += [
        (reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")
    ]
    data = load_torch(path, "cache of torch-fidelity", allowed)
    for name, value in data.items() if isinstance(data, dict) else [("features", data)]:
        if isinstance(value, Tensor):
            check_numbers(path, str(name), value)
    if isinstance(data, dict) and "mu" in data and "sigma" in data:
        moments = _moments(path, data, "mu", "sigma")
        return Measured(path.name, NAMES.get(moments.dim), moments=moments)
    if isinstance(data, Tensor) and data.ndim == 2:
        features = _matrix(path, "features", _plain(data).numpy())
        return Measured(path.name, NAMES.get(features.shape[1]), n=len(features), features=features)
    raise DataError(f"{path}: neither features [N, D] nor a dict of mu and sigma")


def _plain(features: Tensor) -> Tensor:
    """Without gradients, and in a type that NumPy has."""
    return features.detach().float() if features.dtype == torch.bfloat16 else features.detach()

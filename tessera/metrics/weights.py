"""Where published weights are found: a given file, the cache of torch.hub, or the internet."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tessera import distributed
from tessera.errors import DataError
from tessera.files import sha256, user_path


@dataclass(frozen=True)
class Weights:
    """A published file of weights.

    Attributes:
        title: what they are, for messages.
        file: name of the file.
        url: where it is published.
        digest: first digits of its SHA-256; None where none is published.
        others: names that the same file goes by elsewhere.
    """

    title: str
    file: str
    url: str
    digest: str | None = None
    others: tuple[str, ...] = ()


INCEPTION = Weights(
    "the Inception weights of FID",
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    "6726825d",
    ("pt_inception-2015-12-05-6726825d.pth",),
)
DINOV2 = Weights(
    "the weights of DINOv2 ViT-L/14",
    "dinov2_vitl14_pretrain.pth",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
)


_MAX_BYTES = 8 * 2**30
"""The largest file that is read; DINOv2's ViT-L has 1.2 GB, features of 50,000 images 0.4 GB."""


def find_weights(wanted: Weights, path: str | os.PathLike[str] | None = None) -> Path:
    """The file: `path` if given, else from the cache of torch.hub, where a download puts it.

    Raises:
        DataError: it is not there and cannot be downloaded; the message says what to put where.
    """
    if path is not None:
        file = user_path(path)
        if not file.is_file():
            raise DataError(f"{file}: there is no such file; it should be {wanted.title}")
        return file
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    # A process that comes late must not find the download of another and take a shorter way.
    with distributed.main_first():
        for name in (wanted.file, *wanted.others):
            if (cache / name).is_file():
                return cache / name
        _download(wanted, cache / wanted.file)
    return cache / wanted.file


def _download(wanted: Weights, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(wanted.url, str(target), wanted.digest, progress=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{wanted.title} are not on this machine and cannot be downloaded ({error}).\n"
            f"Download {wanted.url}\non another machine and put the file at {target}\n"
            "or anywhere, and name it with --weights. Without it: --features classifier"
        ) from error


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict in a `.pth` or `.safetensors` file, and the digits of its checksum.

    Nothing in the file is executed.

    Raises:
        DataError: the file is damaged or too large, or holds something else than finite tensors.
    """
    if path.suffix == ".safetensors":
        check_size(path)
        try:
            state = safetensors.torch.load_file(path)
        except Exception as error:  # a damaged file may raise nearly anything
            reason = "".join(str(error).strip().splitlines()[:1])
            raise DataError(f"{path}: not a readable file of weights ({reason})") from error
    else:
        state = load_torch(path, "file of weights")
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"{path}: not a state dict of tensors")
    for name, tensor in state.items():
        check_numbers(path, str(name), tensor)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise DataError(
                f"{path}: {str(name)[:80]!r} holds numbers that are not finite. Download or copy "
                "the file again"
            )
    return state, sha256(path)[:8]


def load_torch(path: Path, what: str, allowed: Sequence[Any] = ()) -> Any:
    """What a file of `torch.save` holds: tensors and plain values; nothing in it is executed.

    Args:
        what: what messages call such a file.
        allowed: further classes and functions that it may name, as `safe_globals` takes them.

    Raises:
        DataError: the file is missing, damaged, too large, compressed, or names something else.
    """
    check_size(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                    raise DataError("it is compressed, which torch.save does not do")
        with torch.serialization.safe_globals([*allowed]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise nearly anything
        reason = "".join(str(error).strip().splitlines()[:1])
        raise DataError(f"{path}: not a readable {what} ({reason})") from error


def check_size(path: Path) -> None:
    """Raise for files that are larger than any that is read here.

    Raises:
        DataError: it is, or there is none.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: there is no such file") from error
    if size > _MAX_BYTES:
        raise DataError(f"{path}: {size:,} bytes, of which at most {_MAX_BYTES:,} are read")


def check_numbers(path: Path, name: str, tensor: Tensor) -> None:
    """Raise for a tensor with more numbers than are stored of it.

    Raises:
        DataError: it repeats them.
    """
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise DataError(f"{path}: {name[:80]!r} has more numbers than are stored of it")

"""The pipeline folder: `config.json` and weights as safetensors; nothing in it is executed.

    config.json            format, version, kind, the recipe, images seen, class names, the weights
                           with their checksums, the default first, and the kinds of the parts
    model.safetensors      the network's averaged weights, float32
    model-<name>.safetensors   further averages of the same run, if there are any
    <part>/                a folder for each part: a pipeline, or a codec

`kind` tells a reader what to expect: a pipeline of kind "experts" has no weights of its own, but a
part `expert-<k>` for each expert.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
from torch import Tensor, nn

from tessera._version import __version__
from tessera.errors import CheckpointError, TesseraError
from tessera.files import (
    atomic_file,
    atomic_folder,
    is_hub_id,
    read_json,
    sha256,
    user_path,
    write_json,
)
from tessera.pipelines import hub
from tessera.plain import parse_json
from tessera.recipes.parts import Parts
from tessera.recipes.schema import Recipe

FORMAT = "tessera-pipeline"
VERSION = 2
READABLE = (1, 2)


@dataclass(frozen=True)
class WeightsFile:
    """One average of the weights: its name, file and SHA-256."""

    name: str
    file: str
    sha256: str


@dataclass(frozen=True)
class FolderConfig:
    """What `config.json` says.

    Attributes:
        recipe: the recipe as plain JSON values.
        images_seen: images that the model was trained on.
        class_names: one for each class, or None.
        weights: the averages in the folder, the default first.
        parts: sub-folders, "pipeline" or "codec" by name, in the order of their use.
    """

    kind: str
    recipe: dict[str, Any]
    images_seen: int
    class_names: tuple[str, ...] | None
    weights: tuple[WeightsFile, ...]
    parts: Mapping[str, str]


@dataclass(frozen=True)
class Opened:
    """A pipeline folder that is being read.

    Attributes:
        folder, config: where and what it is.
        recipe: checked.
        parts: the pipelines in it, by name.
        ema: name of the average that is wanted; None for the default.
        own_parts: what the caller handed over in place of external parts of the recipe.
    """

    folder: Path
    config: FolderConfig
    recipe: Recipe
    parts: Mapping[str, Any]
    ema: str | None
    own_parts: Parts

    def load_weights(self, network: nn.Module) -> WeightsFile:
        """Read the wanted average into `network`.

        Raises:
            CheckpointError: there is none, or it is damaged or another network's.
        """
        entry = choose_weights(self.config, self.ema)
        load_weights(self.folder, entry, network)
        return entry


WritePart = tuple[Literal["pipeline", "codec"], Callable[[Path], None]]
"""Kind of a part, and a function that writes its folder."""


def write_folder(
    folder: Path,
    kind: str,
    recipe: dict[str, Any],
    states: Mapping[str, Mapping[str, Tensor]],
    *,
    images_seen: int,
    class_names: Sequence[str] | None,
    parts: Mapping[str, WritePart] | None = None,
) -> None:
    """Write a pipeline folder, whole or not at all.

    Args:
        kind: of the pipeline.
        recipe: as plain JSON values.
        states: the network's state dict for each named average, the default first.
        parts: by the name of their sub-folders.

    Raises:
        CheckpointError: something else than a pipeline is in the way.
    """
    _check_replaceable(folder)
    with atomic_folder(folder) as part:
        files = []
        for index, (name, state) in enumerate(states.items()):
            file = "model.safetensors" if index == 0 else f"model-{name}.safetensors"
            with atomic_file(part / file) as stream:
                stream.write(safetensors.torch.save(_saveable(state), metadata={"format": "pt"}))
            files.append(WeightsFile(name, file, sha256(part / file)))
        for name, (_, write) in (parts or {}).items():
            write(part / name)
        config = {
            **_header(kind, images_seen, class_names),
            "weights": [asdict(file) for file in files],
            "parts": {name: kind for name, (kind, _) in (parts or {}).items()},
            "recipe": recipe,
        }
        write_json(part / "config.json", config)


def _header(kind: str, images_seen: int, class_names: Sequence[str] | None) -> dict[str, Any]:
    """What the configuration of every kind of pipeline begins with."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "written_by": f"tessera {__version__}",
        "images_seen": images_seen,
        "class_names": None if class_names is None else list(class_names),
    }


def _check_replaceable(folder: Path) -> None:
    """Raise if something else than a pipeline would be lost in the place of a new one."""
    if not folder.exists() or _is_pipeline(folder):
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise CheckpointError(
            f"{folder} exists and is no pipeline; saving would remove it. Name another folder"
        )


def _is_pipeline(folder: Path) -> bool:
    """Whether a folder's `config.json` is ours, of whatever version: other tools have one, too."""
    if not folder.is_dir():
        return False
    try:
        config = read_json(folder / "config.json")
    except OSError:
        return False
    except TesseraError:  # damaged: ours if there is nothing else than we write
        ours = re.compile(r"config\.json|model(-[^/]+)?\.safetensors|expert-\d+|codec")
        return all(ours.fullmatch(path.name) for path in folder.iterdir())
    return isinstance(config, dict) and config.get("format") == FORMAT


RELEASED_SUFFIXES = (".pkl", ".pt", ".pth", ".ckpt", ".safetensors")
"""Endings of the files that `tessera convert` is for."""


def find_folder(source: str | Path) -> Path:
    """The pipeline folder that `source` names: itself, a run folder around it, or a hub id.

    Raises:
        CheckpointError: there is no pipeline under that name.
    """
    path = user_path(source)
    for folder in (path, path / "pipeline"):
        if (folder / "config.json").is_file():
            return folder
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in RELEASED_SUFFIXES)
        how = f". {path.name} has a checkpoint in it: {_how_to_convert(files[0])}" if files else ""
        raise CheckpointError(
            f"{path} holds no pipeline: neither config.json nor pipeline/config.json is there. "
            f"Name a pipeline folder, or the folder of a run that has saved a checkpoint{how}"
        )
    if path.is_file():
        raise CheckpointError(f"{path} is a file and no pipeline. {_how_to_convert(path)}")
    if is_hub_id(source):
        return hub.download(str(source))
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*/")], 1)
    hint = f"Did you mean {path.parent / near[0]}? " if near else ""
    raise CheckpointError(
        f"there is no pipeline {str(source)!r}: no such folder. {hint}Name a pipeline folder, the "
        "folder of a run, or a Hugging Face id like user/name or user/name@revision"
    )


def _how_to_convert(path: Path) -> str:
    folder = path.with_suffix("") if path.suffix else path.with_name(f"{path.name}-pipeline")
    return (
        "If it is a released checkpoint, make a pipeline of it once: "
        f"tessera convert {path} {folder}"
    )


def read_config(folder: Path) -> FolderConfig:
    """Read and check `config.json`.

    Raises:
        CheckpointError: it is damaged, or of another format or a newer version.
    """
    path = folder / "config.json"
    try:
        config = parse_json(path.read_bytes(), str(path), error=CheckpointError)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Save or download the pipeline again"
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not the configuration of a tessera pipeline. Of other tools' models, "
            "released checkpoints can be made into one: tessera convert CHECKPOINT FOLDER"
        )
    version = config.get("version")
    if version not in READABLE:
        newer = isinstance(version, int) and version > VERSION
        raise CheckpointError(
            f"{path} has format version {version!r}; this tessera ({__version__}) reads version "
            f"{VERSION}. " + ("Install a newer tessera" if newer else "Save the pipeline again")
        )
    wrong = [key for key, fits in _FIELDS.items() if not fits(config.get(key, _DEFAULTS.get(key)))]
    if wrong:
        raise CheckpointError(
            f"{path} is incomplete or damaged: {', '.join(wrong)}. Save or download the pipeline "
            "again"
        )
    names = config.get("class_names")
    return FolderConfig(
        kind=config["kind"],
        recipe=config["recipe"],
        images_seen=config["images_seen"],
        class_names=None if names is None else tuple(names),
        weights=tuple(WeightsFile(**entry) for entry in config["weights"]),
        parts=_parts(config),
    )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _weights(value: Any) -> bool:
    """Whether a value is a list of what `WeightsFile` holds."""
    keys = {field.name for field in fields(WeightsFile)}
    return isinstance(value, list) and all(
        isinstance(entry, dict) and entry.keys() == keys and _texts([*entry.values()])
        for entry in value
    )


def _folders(value: Any) -> bool:
    """Whether a value names the kinds of parts by the names of folders."""
    return isinstance(value, dict) and all(
        Path(name).name == name and kind in ("pipeline", "codec") for name, kind in value.items()
    )


_DEFAULTS: dict[str, Any] = {"experts": [], "parts": {}}
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "kind": lambda value: isinstance(value, str),
    "recipe": lambda value: isinstance(value, dict),
    "images_seen": lambda value: type(value) is int and 0 <= value < 2**63,
    "class_names": lambda value: value is None or _texts(value),
    "weights": _weights,
    "experts": lambda value: _texts(value) and _folders(dict.fromkeys(value, "pipeline")),
    "parts": _folders,
}
"""What the fields of `config.json` hold."""


def holds(folder: Path, recipe: dict[str, Any], images_seen: int) -> bool:
    """Whether a whole pipeline is there, of this recipe and as many images or more.

    Of more images it is where a run has gone back to the checkpoint before a damaged one.
    """
    try:
        config = read_config(folder)
        if not all(sha256(folder / entry.file) == entry.sha256 for entry in config.weights):
            return False
    except (CheckpointError, OSError, ValueError):
        return False
    same = config.images_seen == images_seen and config.recipe == recipe
    return bool(config.weights) and (same or config.images_seen > images_seen)


def _parts(config: Mapping[str, Any]) -> dict[str, str]:
    """The parts of a folder; version 1 knew experts only."""
    parts: dict[str, str] = config.get(
        "parts", dict.fromkeys(config.get("experts", ()), "pipeline")
    )
    return parts


def choose_weights(config: FolderConfig, name: str | None) -> WeightsFile:
    """The average called `name`; the default for None.

    Raises:
        CheckpointError: the pipeline has no average of that name.
    """
    for entry in config.weights:
        if name is None or entry.name == name:
            return entry
    known = ", ".join(entry.name for entry in config.weights) or "none"
    raise CheckpointError(
        f"the pipeline has no averaged weights called {name!r}. What it has: {known}"
    )


def start_from(source: str | Path, network: nn.Module) -> None:
    """Give `network` the default weights of the pipeline that `source` names (see `find_folder`).

    Raises:
        CheckpointError: there is none, it is damaged, or its network is another one.
    """
    folder = find_folder(source)
    try:
        load_weights(folder, choose_weights(read_config(folder), None), network)
    except CheckpointError as error:
        raise CheckpointError(f"training.initial_weights={source}: {error}") from error


def load_weights(folder: Path, entry: WeightsFile, network: nn.Module) -> None:
    """Read the weights into `network`.

    Raises:
        CheckpointError: the file is missing or damaged, or its tensors are not the network's.
    """
    path = folder / entry.file
    if Path(entry.file).name != entry.file or not path.is_file():
        raise CheckpointError(
            f"{path} is missing. Save or download the pipeline again, with all its files"
        )
    if sha256(path) != entry.sha256:
        raise CheckpointError(
            f"{path} is damaged or was changed: its checksum is not the one in config.json. "
            "Save or download the pipeline again"
        )
    try:
        state = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Save or download the pipeline again"
        ) from error
    problems = mismatches(state, network.state_dict())
    if problems:
        raise CheckpointError(
            f"{path} does not fit the network of the recipe: "
            + "; ".join(problems)
            + ". It fits the recipe that the pipeline was saved with"
        )
    broken = not_finite(state)
    if broken:
        raise CheckpointError(
            f"{path}: {broken}. A model with such weights makes no images; use another average or "
            "an earlier checkpoint"
        )
    network.load_state_dict(state)


def mismatches(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What differs between two state dicts in names, shapes and types, a few examples each.

    All floating types are alike: they are converted when they are loaded.
    """
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    types = [
        f"{name} {_type(state[name])} instead of {_type(tensor)}"
        for name, tensor in expected.items()
        if name in state and not _same_type(state[name], tensor)
    ]
    kinds = (
        ("missing", missing),
        ("unknown", unknown),
        ("of another shape", shapes),
        ("of another type", types),
    )
    return [
        f"{len(found)} tensors {kind} ({', '.join(found[:3])}{', …' if len(found) > 3 else ''})"
        for kind, found in kinds
        if found
    ]


def not_finite(state: Mapping[str, Tensor]) -> str | None:
    """The tensors that hold NaN or infinities, in words; None if there are none."""
    found = [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if not found:
        return None
    more = ", …" if len(found) > 3 else ""
    return f"{len(found)} tensors hold NaN or infinities ({', '.join(found[:3])}{more})"


def _same_type(tensor: Tensor, expected: Tensor) -> bool:
    alike = tensor.is_floating_point() and expected.is_floating_point()
    return alike or tensor.dtype == expected.dtype


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _saveable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU copies where needed; safetensors takes no two tensors that share memory."""
    result: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in state.items():
        value = tensor.detach().to("cpu").contiguous()
        if value.untyped_storage().data_ptr() in taken:
            value = value.clone()
        taken.add(value.untyped_storage().data_ptr())
        result[name] = value
    return result

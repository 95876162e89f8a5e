"""The pipeline folder: `config.json` and weights as safetensors; nothing in it is executed.

    config.json            format, version, kind; for kind "diffusion": the recipe, images seen,
                           class names, and the weights with their checksums, the default first
    model.safetensors      the network's averaged weights, float32
    model-<name>.safetensors   further averages of the same run, if there are any

A pipeline of kind "experts" has no weights of its own but a folder `expert-<k>` for each expert,
which is a pipeline itself, and the thresholds between them. `kind` tells a reader what to expect.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from tessera._version import __version__
from tessera.errors import CheckpointError, require_extra
from tessera.files import atomic_file, atomic_folder, sha256, write_json
from tessera.plain import parse_json

FORMAT = "tessera-pipeline"
VERSION = 1


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
        experts: sub-folders with a pipeline for each expert, from the cleanest; kind "experts".
        thresholds: of the signal-to-noise ratio, between the experts.
    """

    kind: str
    recipe: dict[str, Any]
    images_seen: int
    class_names: tuple[str, ...] | None
    weights: tuple[WeightsFile, ...]
    experts: tuple[str, ...] = ()
    thresholds: tuple[float, ...] = ()


def write_folder(
    folder: Path,
    recipe: dict[str, Any],
    states: Mapping[str, Mapping[str, Tensor]],
    *,
    images_seen: int,
    class_names: Sequence[str] | None,
) -> None:
    """Write a pipeline folder of kind "diffusion", whole or not at all.

    Args:
        recipe: as plain JSON values.
        states: the network's state dict for each named average, the default first.

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
        config = {
            **_header("diffusion", images_seen, class_names),
            "weights": [asdict(file) for file in files],
            "recipe": recipe,
        }
        write_json(part / "config.json", config)


def write_experts(
    folder: Path,
    recipe: dict[str, Any],
    save: Sequence[Callable[[Path], None]],
    thresholds: Sequence[float],
    *,
    images_seen: int,
    class_names: Sequence[str] | None,
) -> None:
    """Write a pipeline folder of kind "experts", whole or not at all.

    Args:
        save: for each expert a function that writes its pipeline folder.

    Raises:
        CheckpointError: something else than a pipeline is in the way.
    """
    _check_replaceable(folder)
    with atomic_folder(folder) as part:
        names = [f"expert-{index}" for index in range(len(save))]
        for name, write in zip(names, save, strict=True):
            write(part / name)
        config = {
            **_header("experts", images_seen, class_names),
            "weights": [],
            "experts": names,
            "thresholds": list(thresholds),
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
    if not folder.exists() or (folder / "config.json").is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise CheckpointError(
            f"{folder} exists and is no pipeline; saving would remove it. Name another folder"
        )


def find_folder(source: str | Path) -> Path:
    """The pipeline folder that `source` names: itself, a run folder around it, or a hub id.

    Raises:
        CheckpointError: there is no pipeline under that name.
    """
    path = Path(source)
    for folder in (path, path / "pipeline"):
        if (folder / "config.json").is_file():
            return folder
    if path.is_dir():
        raise CheckpointError(
            f"{path} holds no pipeline: neither config.json nor pipeline/config.json is there. "
            "Name a pipeline folder, or the folder of a run that has saved a checkpoint"
        )
    if path.suffix in (".pkl", ".pt") and path.is_file():
        raise CheckpointError(
            f"{path} is not a pipeline. If it is a checkpoint of EDM's released code, make a "
            f"pipeline of it once: tessera convert {path} {path.with_suffix('')}"
        )
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return _download(str(source))
    raise CheckpointError(
        f"there is no pipeline {str(source)!r}. Name a pipeline folder, the folder of a run, or a "
        "Hugging Face id like user/name"
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
            "checkpoints of EDM's released code can be made into one: tessera convert"
        )
    version = config.get("version")
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        raise CheckpointError(
            f"{path} has format version {version!r}; this tessera ({__version__}) reads version "
            f"{VERSION}. " + ("Install a newer tessera" if newer else "Save the pipeline again")
        )
    try:
        names = config["class_names"]
        return FolderConfig(
            kind=str(config["kind"]),
            recipe=dict(config["recipe"]),
            images_seen=int(config["images_seen"]),
            class_names=None if names is None else tuple(map(str, names)),
            weights=tuple(WeightsFile(**entry) for entry in config["weights"]),
            experts=tuple(map(str, config.get("experts", ()))),
            thresholds=tuple(map(float, config.get("thresholds", ()))),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is incomplete or damaged ({error!r}). Save or download the pipeline again"
        ) from error


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
    network.load_state_dict(state)


def mismatches(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What differs between two state dicts in names and shapes, a few examples each."""
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    kinds = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    return [
        f"{len(found)} tensors {kind} ({', '.join(found[:3])}{', …' if len(found) > 3 else ''})"
        for kind, found in kinds
        if found
    ]


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


def _download(repository: str) -> Path:
    hub = require_extra("huggingface_hub", "hub", f"There is no folder {repository!r}; the hub")
    try:
        folder = hub.snapshot_download(
            repository, allow_patterns=["config.json", "*.safetensors", "*/config.json"]
        )
    except Exception as error:  # the client's errors are of many kinds, all of them the user's
        raise CheckpointError(
            f"there is no folder {repository!r}, and it could not be downloaded from the Hugging "
            f"Face hub: {error}"
        ) from error
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(f"{repository} on the Hugging Face hub is not a tessera pipeline")
    return Path(folder)

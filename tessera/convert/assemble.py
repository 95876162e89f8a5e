"""One or two checkpoints as one pipeline: a model, its two sets of weights, a relay, or experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from tessera.convert import relay
from tessera.convert.checkpoint import AVERAGE, TRAINED, CheckpointFile
from tessera.convert.families import AUTOENCODER, open_checkpoint, wrong_kind
from tessera.convert.flat import is_state_dict, state_dict
from tessera.convert.kl16 import autoencoder_config, build_autoencoder, save_autoencoder
from tessera.convert.records import read_tensors
from tessera.convert.run import (
    Part,
    Read,
    describe_source,
    merged,
    read_opened,
    read_part,
    read_source,
    reading,
    settings_of,
)
from tessera.errors import CheckpointError
from tessera.files import user_path
from tessera.pipelines.base import Pipeline
from tessera.pipelines.diffusion import DiffusionPipeline
from tessera.pipelines.experts import assemble
from tessera.pipelines.folder import WritePart, not_finite, write_folder
from tessera.pipelines.relay import RelayPipeline
from tessera.recipes.loading import dump_recipe
from tessera.recipes.schema import Recipe

Kind = Literal["model", "relay", "experts", "autoencoder"]

_PLACES = ("first", "second")


@dataclass(frozen=True)
class Conversion:
    """What will be written: one model, or several as one pipeline; or the autoencoder of latents.

    Attributes:
        kind: one model, the stages of a relay, experts, or an autoencoder.
        parts: its models, in their order.
        whole: the pipeline of several models, without weights.
        autoencoder: one of diffusers; there are no models then.
    """

    kind: Kind
    parts: tuple[Part, ...]
    whole: Pipeline | None = None
    autoencoder: Any = None

    def write(self, dest: str | Path) -> Path:
        """Write the pipeline folder, whole or not at all.

        Raises:
            CheckpointError: it exists.
        """
        folder = free_folder(dest)
        if self.autoencoder is not None:
            save_autoencoder(self.autoencoder, folder)
            return folder
        if self.whole is None:
            self.parts[0].write(folder)
            return folder

        def writer(part: Part) -> WritePart:
            return "pipeline", part.write

        name = "stage" if self.kind == "relay" else "expert"
        write_folder(
            folder,
            self.kind,
            dump_recipe(self.whole.recipe),
            {},
            images_seen=self.whole.images_seen,
            class_names=None,
            parts={f"{name}-{k}": writer(part) for k, part in enumerate(self.parts)},
        )
        return folder


def free_folder(dest: str | Path) -> Path:
    """A folder that does not exist.

    Raises:
        CheckpointError: it does.
    """
    folder = user_path(dest)
    if folder.exists():
        raise CheckpointError(f"{folder} exists already. Name another folder, or remove it first")
    return folder


def plan_conversion(
    sources: Sequence[str | Path], *, kind: str | None = None, options: Sequence[str] = ()
) -> Conversion:
    """Read one or two checkpoints and check them; nothing is run, and nothing written.

    Two make one pipeline: averaged and trained weights of one model, the stages of a relay from
    the lowest resolution to the highest, or experts from the cleanest noise levels to the noisiest.

    Args:
        kind: of the checkpoints, see `FAMILIES`; by default it is found out.
        options: `key=value` for what a file does not say: keys of the recipe, `preset=NAME`, and
            those of the family. Of two files, `first.key=value` and `second.key=value` are for one.

    Raises:
        CheckpointError: a file cannot be read, is of no kind known here, or does not say enough.
        RecipeError: the library has no such network, or an option does not fit.
        TesseraError: two files that do not belong together.

    Example:
        >>> plan = plan_conversion(["DiT-XL-2-256x256.pt"])  # doctest: +SKIP
        >>> plan.write("dit-xl")  # doctest: +SKIP
    """
    paths = [user_path(source) for source in sources]
    if not 1 <= len(paths) <= 2:
        raise CheckpointError("name one checkpoint, or the two that make one pipeline")
    if len(paths) == 1:
        source = open_checkpoint(paths[0])
        if (found := autoencoder_in(source, kind)) is not None:
            with found.source.about():
                return Conversion("autoencoder", (), autoencoder=build_autoencoder(found.tensors))
        return Conversion("model", (read_part(read_opened(source, kind, options)),))
    reads = [
        read_source(path, kind, _options_of(place, options)) for place, path in enumerate(paths)
    ]
    if _halves(reads):
        return Conversion("model", (_both_weights(reads),))
    reads = _as_stages(reads)
    recipes = [read.settled().recipe for read in reads]
    if all(recipe.snr_splits for recipe in recipes):
        return _experts(reads, recipes)
    if any(recipe.start_shape is not None for recipe in recipes):
        return _relay(reads)
    raise CheckpointError(
        f"{paths[0]} and {paths[1]} are two models, and nothing says how they make one pipeline. "
        "For experts give the thresholds between them, like snr_splits=0.25; the second stage of a "
        "relay has twice the resolution or more. Convert them one by one for two pipelines"
    )


class Autoencoder(NamedTuple):
    """A KL autoencoder of latents in a file: its tensors, by their released names."""

    source: CheckpointFile
    tensors: Mapping[str, Tensor]


def autoencoder_in(source: CheckpointFile, kind: str | None = None) -> Autoencoder | None:
    """The KL autoencoder in a file; None if it holds something else.

    Args:
        kind: of checkpoint, "kl16" for this one; by default it is found out.

    Raises:
        CheckpointError: its autoencoder is damaged or none of diffusers', or it holds none and
            `kind` says so.
    """
    if kind not in (None, AUTOENCODER):
        return None
    data = source.data.get("model") if isinstance(source.data, dict) else None
    marks = {"encoder.conv_in.weight", "quant_conv.weight"}
    if not is_state_dict(data) or not marks <= {*(data or ())}:
        if kind == AUTOENCODER:
            raise wrong_kind(source, kind)
        return None
    with reading(source):
        state = read_tensors(state_dict(source, data, "model"))
    if broken := not_finite(state):
        raise source.error(broken)
    with source.about():
        autoencoder_config(state)  # which says what does not fit
    return Autoencoder(source, state)


def _options_of(place: int, options: Sequence[str]) -> list[str]:
    """The options of one of two files."""
    own = []
    for option in options:
        prefix, dot, rest = option.partition(".")
        if not (dot and prefix in _PLACES):
            own.append(option)
        elif prefix == _PLACES[place]:
            own.append(rest)
    return own


def _halves(reads: Sequence[Read]) -> bool:
    """Whether the files hold the averaged and the trained weights of one network."""
    names = [{*read.description.weights} for read in reads]
    tensors = [
        sorted((facts.name, facts.shape) for facts in next(iter(read.tensors.values())))
        for read in reads
    ]
    return names in ([{AVERAGE}, {TRAINED}], [{TRAINED}, {AVERAGE}]) and tensors[0] == tensors[1]


def _both_weights(reads: Sequence[Read]) -> Part:
    averaged, trained = sorted(reads, key=lambda read: AVERAGE not in read.description.weights)
    images = [read.description.images_seen for read in (averaged, trained)]
    if images[0] != images[1]:
        raise CheckpointError(
            f"{trained.source.path} and {averaged.source.path} are not of the same moment of a "
            f"training: their names say {images[1]} and {images[0]} images"
        )
    # What one file says of the model holds for the other.
    description = replace(averaged.description, weights=trained.description.weights)
    return merged(read_part(averaged), read_part(replace(trained, description=description)))


def _as_stages(reads: Sequence[Read]) -> list[Read]:
    """The files, of which the second is a second stage if its pictures say so and it does not."""
    first, second = reads
    related = {read.family.kind for read in reads} <= {"edm", "relay"}
    if not related or any(_deblurs(read) for read in reads):
        return [*reads]
    small, large = (read.description.said["data"]["resolution"] for read in reads)
    if large <= small or large % small:
        return [*reads]
    settings = settings_of(relay.FAMILY, second.options, first=small)
    return [first, describe_source(second.source, relay.FAMILY, settings)]


def _deblurs(read: Read) -> bool:
    found = read.description
    return any(
        sections.get("objective", {}).get("kind") == "blur"
        for sections in (found.said, found.assumed)
    )


def _experts(reads: Sequence[Read], recipes: Sequence[Recipe]) -> Conversion:
    parts = []
    for place, (read, recipe) in enumerate(zip(reads, recipes, strict=True)):
        settings = read.settings
        if recipe.expert is None:
            overrides = [*settings.overrides, f"expert={place}"]
            settings = replace(settings, overrides=overrides)
        parts.append(read_part(replace(read, settings=settings)))
    whole = assemble(_pipelines(parts))
    return Conversion("experts", tuple(parts), whole)


def _relay(reads: Sequence[Read]) -> Conversion:
    parts = [read_part(read) for read in reads]
    return Conversion("relay", tuple(parts), RelayPipeline(_pipelines(parts)))


def _pipelines(parts: Sequence[Part]) -> list[DiffusionPipeline]:
    """The parts as pipelines without numbers, which check whether they fit each other."""
    pipes = [part.pipe for part in parts if isinstance(part.pipe, DiffusionPipeline)]
    if len(pipes) < len(parts):
        raise CheckpointError("only denoisers can be stages of a relay, or experts")
    return pipes

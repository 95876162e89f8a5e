"""`tessera convert`: released checkpoints to pipeline folders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tessera.cli.tables import print_facts, print_rows
from tessera.errors import CheckpointError
from tessera.files import user_path

if TYPE_CHECKING:
    from tessera.convert.assemble import Autoencoder
    from tessera.convert.run import Part, Read


def convert(
    words: list[str] = typer.Argument(
        metavar="SRC [SRC2] DEST [KEY=VALUE]...",
        help="A checkpoint; a second one for two stages of a relay, two experts, or averaged and "
        "trained weights; the pipeline folder to write; what the files do not say.",
    ),
    kind: str | None = typer.Option(None, help="Of the checkpoint. (default: found out)"),
    inspect: bool = typer.Option(
        False, "--inspect", help="Print what is in SRC, with all its tensors, and write nothing."
    ),
) -> None:
    """Make a pipeline of a released checkpoint; nothing in it is run.

    EDM, Patch Diffusion, LEGO, relay diffusion, PDM, guided diffusion, DiT, energy diffusion, MAR:
    docs/checkpoints.md names the files. preset=NAME takes what a file does not say from a recipe.
    """
    from tessera.convert.assemble import autoencoder_in, free_folder, plan_conversion
    from tessera.convert.families import open_checkpoint
    from tessera.convert.run import read_opened

    paths, options = split_words(words)
    if inspect:
        for path in map(user_path, paths):
            source = open_checkpoint(path)
            if (autoencoder := autoencoder_in(source, kind)) is not None:
                print_autoencoder(autoencoder)
            else:
                print_checkpoint(read_opened(source, kind, options))
        return
    if len(paths) < 2:
        raise CheckpointError(
            f"name the folder to write behind the checkpoint: tessera convert {' '.join(paths)} "
            "FOLDER; or look at it only, by --inspect"
        )
    *sources, dest = paths
    free_folder(dest)
    plan = plan_conversion(sources, kind=kind, options=options)
    for part in plan.parts:
        print_part(part)
    folder = plan.write(dest)
    if plan.kind == "autoencoder":
        print(f"written to {folder}, an autoencoder of latents: codec.model={folder}")
        return
    print(f"written to {folder}; its images: tessera sample {folder} --out samples/")


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The paths and the options among the words of the command."""
    options = [w for w in words if re.match(r"-{0,2}[a-z_][\w.]*=", w) and not Path(w).exists()]
    return [word for word in words if word not in options], options


def print_part(part: Part) -> None:
    """What was found of a model."""
    recipe = part.recipe
    channels, side, _ = recipe.shape
    rows = {
        "checkpoint": f"{part.family.title}, {part.source.path.name} ({part.source.container})",
        "network": recipe.network.kind,
        "preconditioning": recipe.preconditioning.kind,
        "parameters": f"{part.parameters:,}",
        "images": f"{side} x {side}, {channels} channels",
        "classes": str(recipe.data.num_classes or "none"),
        "weights": ", ".join(part.states),
        "images seen": f"{part.images_seen:,}" if part.images_seen else "not known",
    }
    origins = [(f"from {title}", ", ".join(of)) for title, of in part.settled.origins.items()]
    ignored = [("ignored", line) for line in _ignored(part.ignored.items())]
    print_facts([*rows.items(), *origins, *ignored, *(("note", note) for note in part.notes)])


def print_checkpoint(read: Read) -> None:
    """What is in a file, and all its tensors."""
    from tessera.errors import TesseraError

    source, found = read.source, read.description
    rows = [
        ("checkpoint", f"{read.family.title}, {source.path.name} ({source.container})"),
        ("kind", read.family.kind),
        ("weights", ", ".join(found.weights)),
        ("images seen", f"{found.images_seen:,}" if found.images_seen else "not known"),
    ]
    try:
        settled = read.settled()
    except TesseraError as error:
        rows.append(("still open", str(error)))
    else:
        rows += [(f"from {title}", ", ".join(of)) for title, of in settled.origins.items()]
    print_facts([*rows, *(("note", note) for note in found.notes)])
    for name, tensors in read.tensors.items():
        print_rows(
            ("tensor", "shape", "type"),
            [(t.name, " x ".join(map(str, t.shape)) or "one", t.dtype) for t in tensors],
            title=f"{name}: {len(tensors)} tensors",
        )


def print_autoencoder(found: Autoencoder) -> None:
    """What is in a file that holds an autoencoder of latents, and all its tensors."""
    from tessera.convert.kl16 import autoencoder_config

    source, tensors = found.source, found.tensors
    config = autoencoder_config(tensors)
    attention = [name for name in config["up_block_types"] if name.startswith("Attn")]
    print_facts(
        {
            "checkpoint": f"KL autoencoder of latents, {source.path.name} ({source.container})",
            "kind": "kl16",
            "parameters": f"{sum(tensor.numel() for tensor in tensors.values()):,}",
            "images": f"{config['in_channels']} channels",
            "latents": f"{config['latent_channels']} channels, "
            f"1/{2 ** (len(config['block_out_channels']) - 1)} of the side",
            "widths": ", ".join(map(str, config["block_out_channels"])),
            "attention": "in the decoder's levels, too" if attention else "between the halves",
        }
    )
    print_rows(
        ("tensor", "shape", "type"),
        [
            (name, " x ".join(map(str, t.shape)) or "one", str(t.dtype).removeprefix("torch."))
            for name, t in tensors.items()
        ],
        title=f"{len(tensors)} tensors",
    )


def _ignored(items: Iterable[tuple[str, str]]) -> list[str]:
    """The tensors that have no place, a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in items:
        reasons.setdefault(reason, []).append(name)
    return [
        f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}: {reason}"
        for reason, names in reasons.items()
    ]

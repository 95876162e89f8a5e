"""`tessera push`: a pipeline to the Hugging Face hub, with a model card."""

from __future__ import annotations

import tempfile
from pathlib import Path

import typer

from tessera.cli.parts import OwnParts, import_parts
from tessera.errors import TesseraError


def push(
    pipeline: str = typer.Argument(help="Pipeline folder, run folder, or Hugging Face id."),
    repository: str = typer.Argument(metavar="USER/NAME", help="Where it goes on the hub."),
    licence: str | None = typer.Option(
        None, metavar="ID", help="The hub's name of it, like apache-2.0. (default: other)"
    ),
    score: list[Path] = typer.Option(
        [],
        "--score",
        metavar="FILE.json",
        help="Scores for the card, as `tessera eval score --json` prints them; may be repeated.",
    ),
    samples: int = typer.Option(16, min=0, help="Images in the card's grid; 0 for none."),
    batch: int = typer.Option(64, min=1, help="Images at once."),
    include_vae: bool = typer.Option(
        False, "--include-vae", help="Send the VAE along, though the recipe names it on the hub."
    ),
    private: bool = typer.Option(False, "--private", help="For your eyes only."),
    revision: str | None = typer.Option(
        None, metavar="BRANCH", help="Branch that gets it, made if need be. (default: main)"
    ),
    message: str | None = typer.Option(None, metavar="TEXT", help="Of the commit."),
    out: Path | None = typer.Option(
        None, help="Write the folder that would be sent here, and send nothing."
    ),
    device: str | None = typer.Option(None, help="cpu, cuda, ... (default: the fastest)"),
    own_parts: OwnParts = None,
) -> None:
    """Share a pipeline on the Hugging Face hub, with a model card that is made for it.

    The token is that of `hf auth login`, or of the environment variable HF_TOKEN. Broken off, the
    same command goes on where it was.
    """
    from tessera.cli.sample import plain_warnings
    from tessera.files import atomic_folder
    from tessera.pipelines.folder import find_folder
    from tessera.pipelines.hub import find_token
    from tessera.pipelines.loading import load
    from tessera.sharing.push import PURPOSE, check_repository, make_folder, upload
    from tessera.sharing.scores import read_scores

    check_repository(repository)
    if out is None:
        find_token(PURPOSE)  # before the work, not after it
    elif out.exists():
        raise TesseraError(f"{out} exists already. Name another folder, or remove it first")
    tables = [read_scores(path) for path in score]
    folder = find_folder(pipeline)
    with plain_warnings():
        pipe = load(folder, device=device, parts=import_parts(own_parts))

        def make(target: Path, link: bool) -> None:
            reason = make_folder(
                pipe, folder, target, repository, licence=licence, scores=tables,
                pictures=samples, batch=batch, link=link, include_vae=include_vae,
            )  # fmt: skip
            if reason is not None and samples:
                print(f"note: the card has no sample grid: {reason}")
            if licence is None and not (folder / "README.md").is_file():
                print("note: the card names no licence; name yours by --licence, like apache-2.0")

        if out is not None:
            with atomic_folder(out) as target:
                make(target, False)
            print(f"written to {out}; send it: tessera push {out} {repository}")
            return
        with tempfile.TemporaryDirectory(prefix="tessera-push-") as name:
            make(Path(name), True)
            done = upload(
                Path(name), repository, private=private, revision=revision, message=message
            )
    print(f"pushed to {done.url}")
    print(f"its images: tessera sample {repository}@{done.commit} --out samples/")
    print(f'in Python: tessera.load("{repository}", revision="{done.commit}")')

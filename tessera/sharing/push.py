"""Sending a pipeline to the Hugging Face hub: the folder is made whole first, then uploaded."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.errors import TesseraError, require_extra
from tessera.files import atomic_file
from tessera.images import grid, save_png
from tessera.pipelines.base import Pipeline
from tessera.pipelines.hub import FILES, find_token, hub_problem
from tessera.pipelines.options import check_batch
from tessera.sharing.card import CARD, PICTURE, model_card
from tessera.sharing.portable import copy_pipeline
from tessera.sharing.scores import ScoreTable, run_scores

_NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?")
PURPOSE = "sending a pipeline to the hub"


@dataclass(frozen=True)
class Pushed:
    """Where a pipeline is now.

    Attributes:
        commit: hash of the commit.
        url: of the commit.
    """

    commit: str
    url: str


def check_repository(repository: str) -> None:
    """Check that a name is written like `user/name` on the hub.

    Raises:
        TesseraError: it is not.
    """
    parts = repository.split("/")
    good = len(parts) == 2 and all(_NAME.fullmatch(part) and len(part) <= 96 for part in parts)
    if not good or ".." in repository or "--" in repository or repository.endswith(".git"):
        raise TesseraError(
            f"{repository!r} is no name on the hub. Give one as user/name, of letters, digits, "
            "-, _ and ., each part with a letter or digit at both ends, without -- and .."
        )


def make_folder(
    pipe: Pipeline,
    folder: Path,
    target: Path,
    repository: str,
    *,
    licence: str | None = None,
    scores: Sequence[ScoreTable] = (),
    pictures: int = 16,
    batch: int = 64,
    link: bool = False,
    include_vae: bool = False,
) -> str | None:
    """Write what is sent: the pipeline without local paths, a sample grid and the model card.

    A card that stands in the pipeline folder already is taken as it is, with its grid.

    Args:
        pipe: opened from `folder`.
        target: an empty folder.
        repository: user/name on the hub.
        licence: the hub's name of it; None for "other".
        scores: tables for the card, besides what the run of the pipeline has measured.
        pictures: in the grid, of the seeds from 0 on.
        batch: pictures made at once.
        link, include_vae: see `copy_pipeline`.

    Returns:
        Why there is no sample grid, if there is none.

    Raises:
        CheckpointError: a file of the pipeline is missing or damaged.
        TesseraError: `licence` or `scores` for a card that is there already, or an autoencoder of
            a model that has none.
    """
    own = folder / CARD
    if own.is_file() and (licence is not None or scores):
        raise TesseraError(
            f"{own} is sent as it is; `licence` and `score` are for a card that is written here. "
            "Leave them out, or remove that file"
        )
    copy_pipeline(folder, target, link=link, include_vae=include_vae)
    if own.is_file():
        for name in (CARD, PICTURE):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
        return None
    reason = _draw(pipe, target / PICTURE, pictures, batch)
    measured = run_scores(folder, pipe.recipe, pipe.images_seen)
    card = model_card(
        pipe,
        repository,
        licence=licence,
        scores=[*([measured] if measured else []), *scores],
        pictures=0 if reason else pictures,
        with_codec=(target / "codec").is_dir(),
    )
    with atomic_file(target / CARD) as file:
        file.write(card.encode())
    return reason


def _draw(pipe: Pipeline, path: Path, pictures: int, batch: int) -> str | None:
    """Write the sample grid; why not, of a model that needs more than seeds."""
    if not pictures:
        return "none was asked for"
    check_batch(batch)
    try:
        pipe.check(range(pictures))
    except TesseraError as error:
        return str(error)
    save_png(path, grid(pipe.sample(range(pictures), batch=batch)))
    return None


def upload(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> Pushed:
    """Send a folder, by the hub's own client; what is there already is not sent again.

    Of an older pipeline there, files that are in this one no more are removed.

    Args:
        private: make the repository for its owner's eyes only.
        revision: branch that gets the commit; made if there is none.
        message: of the commit.

    Raises:
        TesseraError: it cannot be sent: no token, no permission, no connection.
    """
    token = find_token(PURPOSE)
    hub = require_extra("huggingface_hub", "hub", PURPOSE)
    api = hub.HfApi(token=token)
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private:
            _check_private(api, repository)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message=message or "A pipeline of tessera",
            delete_patterns=list(FILES),
        )
    except TesseraError:
        raise
    except Exception as error:  # the client's errors are of many kinds
        name = repository if revision is None else f"{repository}@{revision}"
        raise TesseraError(
            f"{repository} was not sent: {hub_problem(error, name)}. What has arrived is kept: the "
            "same command goes on from there"
        ) from error
    return Pushed(str(done.oid), str(done.commit_url))


def _check_private(api: Any, repository: str) -> None:
    """Refuse a repository that was there before and is public."""
    if not api.model_info(repository).private:
        raise TesseraError(
            f"{repository} is there already, and public. Make it private on its page on the hub, "
            "leave out `private`, or choose another name"
        )

"""The Hugging Face hub: pipelines by their ids, and its errors in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tessera.errors import CheckpointError, TesseraError, require_extra
from tessera.files import split_hub_id
from tessera.progress import note

FILES = ["config.json", "*.safetensors", "*/config.json"]
"""Patterns of what a pipeline consists of, at any depth; nothing else is downloaded."""

# The client's errors of a connection that could not be made or broke off, in all its versions.
_BROKEN_OFF = {
    "TransportError", "RequestException", "ConnectionError", "TimeoutError",
    "LocalEntryNotFoundError", "OfflineModeIsEnabled",
}  # fmt: skip


def download(name: str) -> Path:
    """The pipeline folder of `user/name` or `user/name@revision`, from the hub or its cache.

    Raises:
        CheckpointError: there is none, or it cannot be had.
    """
    repository, revision = split_hub_id(name)
    hub = require_extra("huggingface_hub", "hub", f"There is no folder {name!r}; the hub")
    note(f"there is no folder {name}; asking the Hugging Face hub")
    try:
        folder = Path(
            hub.snapshot_download(repository, revision=revision, allow_patterns=list(FILES))
        )
    except Exception as error:  # the client's errors are of many kinds, all of them the user's
        raise CheckpointError(
            f"there is no folder {name!r}, and it could not be downloaded from the Hugging Face "
            f"hub: {hub_problem(error, name)}"
        ) from error
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{name} on the Hugging Face hub is not a tessera pipeline")
    return folder


def find_token(purpose: str) -> str:
    """The user's token, from HF_TOKEN or the hub's own login.

    Raises:
        TesseraError: there is none.
    """
    hub = require_extra("huggingface_hub", "hub", purpose)
    token: str | None = hub.get_token()
    if not token:
        raise TesseraError(
            f"{purpose} needs a token of the Hugging Face hub that may write. Make one at "
            "https://huggingface.co/settings/tokens, then log in by `hf auth login`, or put it "
            "into the environment variable HF_TOKEN"
        )
    return token


def hub_problem(error: Exception, name: str) -> str:
    """What is wrong with `name` on the hub, and what to do.

    The client's classes are known by their names: they have moved between its versions.
    """
    repository, revision = split_hub_id(name)
    chain = list(_chain(error))
    kinds = {kind.__name__ for part in chain for kind in type(part).__mro__}
    statuses = (
        int(getattr(getattr(part, "response", None), "status_code", 0) or 0) for part in chain
    )
    status = next(filter(None, statuses), 0)
    if "RevisionNotFoundError" in kinds:
        return (
            f"{repository} has no revision {revision or 'main'!r}. Name a branch, a tag or the "
            f"whole hash of a commit, as {repository}@main"
        )
    if "GatedRepoError" in kinds:
        return f"{repository} is given to those only who asked for it, on its page on the hub"
    if status == 403:
        return (
            f"your token may not do that with {repository} (403). Use a token that may write, and "
            "a name of your own or of an organisation that you are in"
        )
    if status == 401 and "RepositoryNotFoundError" not in kinds:
        return "your token is not valid (401). Log in by `hf auth login`, or set HF_TOKEN anew"
    if "RepositoryNotFoundError" in kinds or status == 404:
        return (
            f"there is no {repository}, or it is private and your token may not see it. Check the "
            "name; for a private one log in by `hf auth login`, or set HF_TOKEN"
        )
    if kinds & _BROKEN_OFF or status >= 500 or status == 429:
        return f"the hub cannot be reached, or the connection broke off ({_line(error)})"
    return _line(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__

"""Every family of checkpoints, and which of them a file is of."""

from __future__ import annotations

from pathlib import Path

from tessera.convert import dit, edm, energy, guided, lego, mar, patch, pdm, relay
from tessera.convert.checkpoint import CheckpointFile, Family
from tessera.convert.records import ClosedObject, brief
from tessera.convert.snapshots import open_snapshot
from tessera.convert.unpickle import read_container
from tessera.errors import CheckpointError

# A converter for another family is one file with a `FAMILY`, and its entry here. Relay diffusion
# comes before EDM, whose classes it has.
FAMILIES: tuple[Family, ...] = (
    patch.FAMILY,
    lego.FAMILY,
    relay.FAMILY,
    edm.FAMILY,
    pdm.FAMILY,
    guided.FAMILY,
    energy.FAMILY,
    mar.FAMILY,
    dit.FAMILY,
)

AUTOENCODER = "kl16"
"""The kind of file that holds no model, but the autoencoder of latents."""

_KNOWN = ", ".join((*(family.kind for family in FAMILIES), AUTOENCODER))
_CLASSES = frozenset(pair for family in FAMILIES for pair in family.classes)


def open_checkpoint(path: Path) -> CheckpointFile:
    """Open a file, with nothing in it run.

    Raises:
        CheckpointError: it cannot be read, or refers to what is not allowed.
    """
    data, container = read_container(path, _CLASSES)
    return CheckpointFile(path, data, container)


def find_family(source: CheckpointFile, kind: str | None = None) -> Family:
    """The family that a file is of, by its content, or that of the kind that the caller names.

    Raises:
        CheckpointError: of none, or not of that kind.
    """
    if kind not in (None, AUTOENCODER, *(family.kind for family in FAMILIES)):
        raise CheckpointError(f"`kind={kind}`: there is none. Choose {_KNOWN}")
    for family in FAMILIES:
        if kind in (None, family.kind) and family.recognise(source):
            return family
    # The families of EDM's networks share their containers; what a file is for, the caller knows.
    if kind == "edm" and relay.FAMILY.recognise(source):
        return edm.FAMILY
    if kind == "relay" and edm.FAMILY.recognise(source):
        return relay.FAMILY
    if kind is not None:
        raise wrong_kind(source, kind)
    raise source.error(f"{contents(source)}, which is of no kind known here. Known are {_KNOWN}")


def wrong_kind(source: CheckpointFile, kind: str) -> CheckpointError:
    """The error about a file that is not of the kind that the caller names."""
    return source.error(f"it is not of the kind {kind}: {contents(source)}. Leave out `kind`")


def contents(source: CheckpointFile) -> str:
    """What is in a file, in a few words."""
    snapshot = open_snapshot(source)
    if snapshot is not None:
        return f"its network is a {brief(snapshot.class_name)}"
    if isinstance(source.data, ClosedObject):
        return f"it holds a {brief(source.data.class_name)}"
    if not isinstance(source.data, dict):
        return f"it holds a {type(source.data).__name__} and no network"
    keys = [brief(key) for key in [*source.data][:6]]
    more = ", …" if len(source.data) > 6 else ""
    return f"it holds {', '.join(keys) or 'nothing'}{more}"

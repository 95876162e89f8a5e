"""Checkpoints of Patch Diffusion (Wang et al. 2023): EDM's U-Nets with coordinates as input."""

from __future__ import annotations

from tessera.convert.checkpoint import CheckpointFile, Data, Description, Family, Settings
from tessera.convert.edm import UNetKind, describe_unet, unet_sections
from tessera.convert.snapshots import Snapshot, made_of, need_snapshot
from tessera.errors import RecipeError
from tessera.recipes.loading import parse_recipe

_CLASS = "Patch_EDMPrecond"
_KIND = UNetKind(coordinates=2, arguments=frozenset({"out_channels"}))


def _describe(source: CheckpointFile, settings: Settings) -> Description:
    snapshot = need_snapshot(source)
    said, assumed = unet_sections(snapshot, _KIND)
    _check_channels(snapshot)
    said["coords"] = {"frequencies": 0}
    if _fits(said, view := {"kind": "patches"}):
        assumed["view"] = view
    return describe_unet(source, snapshot, said, assumed)


def _check_channels(snapshot: Snapshot) -> None:
    """Raise unless its input is the image and two coordinates."""
    given = snapshot.given
    width, images = given.get("img_channels"), given.get("out_channels")
    if not isinstance(width, int) or images != width - 2:
        raise snapshot.source.error(
            f"its {_CLASS} takes {width} channels and puts out {images}; two more than it puts out "
            "are known here, the coordinates"
        )


def _fits(said: Data, view: Data) -> bool:
    """Whether the usual sizes of patches fit the network, which it can have been trained on."""
    try:
        parse_recipe({"name": "x", **said, "view": view})
    except RecipeError:
        return False
    return True


FAMILY = Family("patch", "Patch Diffusion", lambda source: made_of(source, _CLASS), _describe)

"""A small file of every kind of released checkpoint, in every container that the kind comes in."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from golden_cases import case, load, weights
from mar_case import document
from released_files import (
    SNAPSHOT,
    STATE,
    Persistent,
    network,
    recorded_file,
    released_modules,
    write_snapshot,
    write_state,
)
from released_states import RECORDED, arguments, parameters, write_torch
from torch import Tensor

from tessera.convert.guided import released_state
from tessera.convert.records import ClosedObject, StoredTensor
from tessera.recipes.build import build_network
from tessera.recipes.loading import parse_recipe
from tessera.recipes.schema import Recipe

GUIDED = ("data.resolution=16", "network.head_channels=16", "attention_order=split")
PATCHED = ("data.resolution=16", "network.head_channels=16", "network.attention_order=split")
_ADM: dict[str, Any] = {
    "model_channels": 16, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [16],
}  # fmt: skip


class ReleasedKind(NamedTuple):
    """How a file of a kind is made.

    Attributes:
        family: what the converter calls it.
        write: makes the file in a folder.
        options: what the file does not say.
    """

    family: str
    write: Callable[[Path], Path]
    options: tuple[str, ...] = ()


def dit_tensors() -> dict[str, Tensor]:
    """A recorded network of DiT."""
    found: dict[str, Tensor] = torch.load(RECORDED / "dit-released-oldformat.pt", weights_only=True)
    return found


def energy_state(name: str = "energy_mean_pool") -> dict[str, Any]:
    """A training state of energy diffusion, of a recorded network."""
    tensors = {f"dit.{key}": value for key, value in weights(load("energy", name)).items()}
    tensors["alpha"] = torch.tensor(0.01)
    args = arguments(energy_grad_multiplier=1.0, linear_then_mean=False, diffusion_timesteps=500)
    return {"model": tensors, "model_ema": parameters(tensors), "epoch": 1, "args": args}


def _mar(folder: Path) -> Path:
    tensors = weights(load("mar", "mar_forward_patch2_eval"))
    content = {"model": tensors, "model_ema": parameters(tensors)}
    content["args"] = arguments(patch_size=2, vae_stride=16)
    return write_torch(folder / "checkpoint-last.pth", content)


def _mar_heads() -> str:
    config = document()["cases"]["mar_forward_patch2_eval"]["config"]
    return f"network.heads={config['encoder_num_heads']}"


def _unet(kind: str, **changes: Any) -> tuple[Recipe, dict[str, Tensor]]:
    """A U-Net of 32 channels with random weights, and its recipe."""
    section = {"kind": kind, **_ADM, "model_channels": 32, "head_channels": 16}
    recipe = parse_recipe(
        {
            "name": "tiny",
            "data": {"resolution": 16, "num_classes": 3},
            "network": section | changes.pop("network", {}),
            "preconditioning": {"kind": "discrete"},
            "objective": {"kind": "discrete"},
            "sampling": {"kind": "ddpm"},
            **changes,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return recipe, build_network(recipe).state_dict()


def _guided(folder: Path, old: bool = False, **changes: Any) -> Path:
    recipe, state = _unet("adm_unet", network={"groups": 32}, **changes)
    return write_torch(
        folder / "ema_0.9999_010000.pt", released_state(recipe, state, "split"), old=old
    )


def _pdm(folder: Path, **changes: Any) -> Path:
    _, state = _unet("patched_unet", network={"patch_size": 2, "attn_resolutions": [8]}, **changes)
    return write_torch(folder / "ema_0.9999_010000.pt", parameters(state))


def _edm_network(class_name: str = "EDMPrecond", **given: Any) -> Persistent:
    """A preconditioned ADM network of random weights."""
    recipe = parse_recipe(
        {
            "name": "tiny",
            "data": {"resolution": 16, "num_classes": 2},
            "network": {"kind": "adm_unet", **_ADM, "attn_resolutions": []},
        }
    )
    tensors = {f"model.{k}": v for k, v in build_network(recipe).state_dict().items()}
    shown = {**_ADM, "attn_resolutions": [], "model_type": "DhariwalUNet"}
    return network(
        class_name, tensors, img_resolution=16, img_channels=3, label_dim=2, **shown, **given
    )


def _relay(folder: Path, container: str) -> Path:
    net = _edm_network(eff_attn=True)
    if container == "pickle":
        blur = Persistent("BlurLoss", _init_kwargs={"up_scale": 4, "block_scale": 0.15})
        return write_snapshot(folder / "second.pkl", net, loss_fn=blur)
    if container == "zip":
        return write_state(folder / "training-state-000128.pt", net, ema=net, step=128_000)
    with released_modules():
        content = {"net": net, "ema": net, "step": 128_000, "optimizer_state": {}}
        return write_torch(folder / "training-state-000128.pt", content, old=True)


def _patch(folder: Path) -> Path:
    config = case("patch", "net_implicit")["config"]
    given = {k: v for k, v in config.items() if k not in ("precond", "note")}
    net = network("Patch_EDMPrecond", weights(load("patch", "net_implicit")), **given)
    return write_snapshot(folder / "network-snapshot-000128.pkl", net)


def _lego(folder: Path) -> Path:
    path = folder / "network-snapshot-000128.pkl"
    path.write_bytes((RECORDED / "lego-pg-cond-network-snapshot-000128.pkl").read_bytes())
    return path


def _dit(folder: Path, container: str) -> Path:
    if container == "training":
        raw = dit_tensors()
        content = {"model": raw, "ema": raw, "opt": {"state": {}}, "args": arguments()}
        return write_torch(folder / "0050000.pt", content)
    return write_torch(folder / "dit.pt", dit_tensors(), old=container == "old")


def _kl16(folder: Path) -> Path:
    return write_torch(folder / "kl16.ckpt", {"model": weights(load("mar", "vae_tiny"))})


_TWO, _THREE = ("network.heads=2",), ("network.heads=3",)
_LARGE = ("low_resolution=8",)
KINDS: dict[str, ReleasedKind] = {
    "edm.pkl": ReleasedKind("edm", lambda folder: recorded_file(SNAPSHOT, folder)),
    "edm.pt": ReleasedKind("edm", lambda folder: recorded_file(STATE, folder)),
    "patch.pkl": ReleasedKind("patch", _patch),
    "lego.pkl": ReleasedKind("lego", _lego),
    "relay.pkl": ReleasedKind("relay", lambda folder: _relay(folder, "pickle")),
    "relay.pt": ReleasedKind("relay", lambda folder: _relay(folder, "zip")),
    "relay, old": ReleasedKind("relay", lambda folder: _relay(folder, "old")),
    "pdm.pt": ReleasedKind("pdm", _pdm, PATCHED),
    "pdm, enlarging": ReleasedKind(
        "pdm", lambda folder: _pdm(folder, low_resolution=8), (*PATCHED, *_LARGE)
    ),
    "guided.pt": ReleasedKind("guided-diffusion", _guided, GUIDED),
    "guided, old": ReleasedKind("guided-diffusion", lambda folder: _guided(folder, True), GUIDED),
    "guided, enlarging": ReleasedKind(
        "guided-diffusion", lambda folder: _guided(folder, low_resolution=8), (*GUIDED, *_LARGE)
    ),
    "dit.pt": ReleasedKind("dit", lambda folder: _dit(folder, "zip"), _THREE),
    "dit, old": ReleasedKind("dit", lambda folder: _dit(folder, "old"), _THREE),
    "dit, training": ReleasedKind("dit", lambda folder: _dit(folder, "training"), _THREE),
    "energy.pth": ReleasedKind(
        "energy", lambda folder: write_torch(folder / "checkpoint-last.pth", energy_state()), _TWO
    ),
    "mar.pth": ReleasedKind("mar", _mar, (_mar_heads(),)),
    "kl16.ckpt": ReleasedKind("kl16", _kl16),
}


@functools.cache
def released_bytes(name: str) -> tuple[str, bytes]:
    """The name and the content of a file of a kind."""
    with tempfile.TemporaryDirectory() as folder:
        path = KINDS[name].write(Path(folder))
        return path.name, path.read_bytes()


def released(name: str, folder: Path) -> Path:
    """A file of a kind, in a folder."""
    file, data = released_bytes(name)
    path = folder / file
    path.unlink(missing_ok=True)  # which may still be mapped
    path.write_bytes(data)
    return path


def places_of_weights(data: Any) -> list[tuple[dict[str, Any], str]]:
    """Every (dictionary, key) in an opened file where a tensor of its default weights is."""
    keys = ("ema", "model_ema", "net", "model")
    return [*_places(next((data[key] for key in keys if key in data), data))]


def _places(value: Any) -> Iterator[tuple[Any, str]]:
    if isinstance(value, ClosedObject):
        for name in ("_parameters", "_buffers", "_modules"):
            yield from _places(value.state.get(name))
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, StoredTensor):
                yield value, key
            else:
                yield from _places(item)

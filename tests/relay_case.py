"""The recorded cases of relay diffusion."""

from __future__ import annotations

import json
from typing import Any

from golden_cases import GOLDEN, load, recorded_network, weights

from tessera.diffusion.preconditioning import Edm, Preconditioned

DOCUMENT = json.loads((GOLDEN / "relay" / "cases.json").read_text(encoding="utf-8"))


def relay_case(name: str) -> dict[str, Any]:
    """The description of one case."""
    found: dict[str, Any] = next(c for c in DOCUMENT["cases"] if c["case"] == name)
    return found


def recorded_denoiser(name: str) -> Preconditioned:
    """A recorded network of 16x16 images, in evaluation mode."""
    config = DOCUMENT["nets"][name]["config"]
    network = recorded_network(config)
    state = weights(load("relay", name), "w.")
    network.load_state_dict({k.removeprefix("model."): v.float() for k, v in state.items()})
    return Preconditioned(network.eval(), Edm(), (3, 16, 16), config["label_dim"])

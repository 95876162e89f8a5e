"""The models that the recorded MAR cases describe, and recorded random numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from golden_cases import GOLDEN, load, weights
from torch import Tensor

from tessera.diffusion.discrete import Discrete
from tessera.diffusion.masked import MaskedModel
from tessera.networks.mar import Mar

PROCESS = Discrete("cosine", prediction="eps")


def document() -> dict[str, Any]:
    """All that is said of the cases."""
    found: dict[str, Any] = json.loads((GOLDEN / "mar" / "cases.json").read_text())
    return found


def own_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of our parameters instead of the released ones."""
    return {name.replace("diffloss.net.", "head."): value for name, value in tensors.items()}


def recorded(name: str) -> tuple[MaskedModel, dict[str, Tensor], dict[str, Any]]:
    """(model with the recorded weights, tensors, configuration) of a case."""
    golden, c = load("mar", name), document()["cases"][name]["config"]
    network = Mar(
        c["latent_size"],
        c["vae_embed_dim"],
        c["class_num"],
        patch=c["patch_size"],
        width=c["encoder_embed_dim"],
        depth=c["encoder_depth"],
        heads=c["encoder_num_heads"],
        decoder_width=c["decoder_embed_dim"],
        decoder_depth=c["decoder_depth"],
        decoder_heads=c["decoder_num_heads"],
        mlp_ratio=c["mlp_ratio"],
        buffer=c["buffer_size"],
        attn_dropout=c["attn_dropout"],
        dropout=c["proj_dropout"],
        head_width=c["diffloss_w"],
        head_depth=c["diffloss_d"],
    )
    network.load_state_dict(own_names(weights(golden)), strict=True)
    shape = (c["vae_embed_dim"], c["latent_size"], c["latent_size"])
    return MaskedModel(network, PROCESS, shape, c["class_num"]), golden, c


class RecordedTokens:
    """The recorded draws of a training step, of the masked tokens only.

    Args:
        golden: of the case; numbers of tokens are recorded for all B L of them, M times over.
        masked: int64 [B, n], the places.
        count: of tokens, L.
    """

    def __init__(self, golden: Mapping[str, Tensor], masked: Tensor, tokens: int) -> None:
        self.golden, self.masked, self.tokens = golden, masked, tokens

    def _of_masked(self, values: Tensor) -> Tensor:
        batch, count = self.masked.shape
        values = values.reshape(-1, batch, self.tokens, *values.shape[1:]).transpose(0, 1)
        places = self.masked[:, None].expand(-1, values.shape[1], -1)
        places = places.reshape(*places.shape, *[1] * (values.ndim - 3)).expand(
            batch, values.shape[1], count, *values.shape[3:]
        )
        return values.gather(2, places)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        assert purpose == "noise"
        found = self._of_masked(self.golden["in.noise"])
        assert found.shape[1:3] == shape[:2]
        return found

    def integers(self, purpose: str, high: int, *shape: int) -> Tensor:
        assert (purpose, high) == ("timestep", 1000)
        return self._of_masked(self.golden["in.t"])

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        if purpose == "label_dropout":
            return self.golden["in.drop_uniform"]
        order = self.golden["in.orders"]
        return order.argsort(dim=1).to(torch.float32)  # whose argsort is the order

    def step(self, purpose: str) -> float:
        raise AssertionError("the mask ratio was not recorded")


class RecordedLoop:
    """The recorded draws of a generation loop, an iteration at a time."""

    def __init__(self, golden: Mapping[str, Tensor], variant: int, batch: int) -> None:
        self.golden, self.name, self.batch, self.step = golden, f"in.v{variant}", batch, 0

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        first = self.golden[f"{self.name}.init{self.step}"]
        draws = self.golden[f"{self.name}.draws{self.step}"][:, : len(first)]
        self.step += 1
        both = torch.cat([first[None], draws[:-1]])  # the last step adds no noise
        return both.reshape(len(both), self.batch, -1, first.shape[1]).transpose(0, 1)

    def integers(self, high: int) -> Tensor:
        raise AssertionError("the loop draws no classes")

"""The small network that denoises tokens one by one, told a vector each (Li et al. 2024, MAR).

A residual MLP whose norms are modulated by the noise level and the vector together. It works on
rows, [N, d], of any number of images. Parameters carry the names of the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.model import Tuning
from tessera.networks.transformer import FinalLayer, TimestepEmbedding


class DiffusionHead(nn.Module):
    """Noisy tokens to noise, and to where the log variance of a reverse step lies between bounds.

    Args:
        channels: d, numbers of a token.
        cond_width: of the vectors that tokens are told.
        width: of the MLP.
        depth: number of its blocks.
    """

    def __init__(self, channels: int, cond_width: int, width: int, depth: int) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        self.time_embed = TimestepEmbedding(width)
        self.cond_embed = nn.Linear(cond_width, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ModulatedBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)
        self._initialise()

    def _initialise(self) -> None:
        """Every block starts as the identity, and the output as 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=0.02)
        for block in (*self.res_blocks, self.final_layer):
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def blocks(self) -> Iterator[nn.Module]:
        """The repeated blocks."""
        yield from self.res_blocks

    def tuning(self) -> dict[str, Tuning]:
        """No weight decay."""
        return {name: Tuning(decay=False) for name, _ in self.named_parameters()}

    def times(self, steps: Tensor, count: int) -> Tensor:
        """Embeddings [N, W] of steps [N], whole numbers below `count`.

        Where that is less work, of all steps there are, of which each row then takes its own.
        """
        if len(steps) <= count:
            embedded: Tensor = self.time_embed(steps)
            return embedded
        table = self.time_embed(torch.arange(count, device=steps.device))
        return F.embedding(steps.to(torch.int64), table)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """Noisy tokens x [N, d] and what they are told, [N, W], to [N, 2 d].

        Args:
            told: embeddings of the noise level (`times`) and of the vector (`cond_embed`), added.

        Returns:
            The noise; then v, in which -1 stands for the least log variance and 1 for the largest.
        """
        h = self.input_proj(x)
        active = F.silu(told)
        for block in self.res_blocks:
            h = block(h, active)
        output: Tensor = self.final_layer(h[:, None], told)[:, 0]
        return output


class ModulatedBlock(nn.Module):
    """h + gate MLP(LN(h) (1 + scale) + shift), an affine norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, h: Tensor, active: Tensor) -> Tensor:
        """h [N, W] to the same; `active` [N, W] is SiLU of what tokens are told, for all blocks."""
        shift, scale, gate = self.adaLN_modulation[1](active).to(h.dtype).chunk(3, dim=-1)
        u = self.mlp(torch.addcmul(shift, self.in_ln(h).to(h.dtype), scale + 1))
        return torch.addcmul(h, gate, u)

"""The layers of diffusion transformers: DiT blocks with adaLN-zero (Peebles & Xie 2023), and plain
ones (ViT, Dosovitskiy et al. 2021).

Tokens are [B, T, D]; the conditioning vector is [B, D] and is broadcast over an image's tokens, so
what depends on it is computed once an image. Attention may be confined to spans of consecutive
tokens. Parameters carry the names of the released LEGO and MAR checkpoints.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.networks.layers import Dropout, PositionalEmbedding

_SHORT = 16
"""Spans of fewer tokens than this are short."""
_SQUARE = 2048
"""Spans of at most this many tokens may keep their square of attention weights in memory."""


def sincos_table(width: int, rows: int, columns: int) -> Tensor:
    """`sincos` of every place in a grid, row after row, float32 [1, rows columns, width]."""
    row, column = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in (rows, columns)), indexing="ij"
    )
    return sincos(column.flatten(), row.flatten(), width)[None]


def sincos(columns: Tensor, rows: Tensor, width: int) -> Tensor:
    """Sines and cosines of places in a grid, each [...] and not only whole: [..., width], float32.

    The first half encodes the column, the second the row; in each, sines at the frequencies
    10000^(-i / (width / 4)), then cosines. Computed in the places' own precision.
    """
    index = torch.arange(width // 4, dtype=columns.dtype, device=columns.device)
    frequency = 10000.0 ** -(index / (width // 4))
    angles = [place[..., None] * frequency for place in (columns, rows)]
    table = torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=-1)
    return table.to(torch.float32)


class TimestepEmbedding(nn.Module):
    """The noise level as a vector: 256 frequency features through two layers, [B] to [B, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = PositionalEmbedding(256)
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, noise: Tensor) -> Tensor:
        dtype = next(self.mlp.parameters()).dtype
        embedding: Tensor = self.mlp(self.features(noise).to(dtype))
        return embedding


class Attention(nn.Module):
    """Self-attention among the tokens of each span.

    Args:
        width: D.
        heads: must divide D.
        dropout: share of the attention weights that is left out while training.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, span: int) -> Tensor:
        """[B, T, D] to the same; each `span` consecutive tokens, of T, see one another."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x)
        dropout = self.dropout if self.training else 0.0
        h = attend(qkv.reshape(-1, span, 3, self.heads, width // self.heads), dropout)
        output: Tensor = self.proj(h.reshape(batch, tokens, width))
        return output

    def at(self, x: Tensor, rows: Tensor) -> Tensor:
        """What `forward` gives the tokens `rows` [B, n] of x [B, T, D], one span: [B, n, D]."""
        batch, _, width = x.shape
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(tokens_at(x, rows), weight[:width], bias[:width])
        kv = F.linear(x, weight[width:], bias[width:])
        q = q.reshape(batch, -1, self.heads, width // self.heads).transpose(1, 2)
        kv = kv.reshape(batch, -1, 2, self.heads, width // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind()
        h = attend_to(q, k, v, self.dropout if self.training else 0.0)
        output: Tensor = self.proj(h.reshape(batch, -1, width))
        return output


def tokens_at(x: Tensor, rows: Tensor) -> Tensor:
    """The tokens `rows`, int64 [B, n], of x [B, T, D]: [B, n, D]."""
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))


def attend(qkv: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of qkv [N, n, 3, heads, d], as [N, n, heads, d]."""
    if qkv.shape[1] < _SHORT and torch.compiler.is_compiling() and not dropout:
        return _attend_fused(qkv)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return attend_to(q, k, v, dropout)


def attend_to(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of q [N, heads, m, d] and k, v [N, heads, n, d]: [N, m, heads, d].

    Args:
        dropout: share of the weights that is left out.
    """
    tokens = k.shape[-2]
    # The flash kernels are made for long spans: over a few tokens they spend their time on being
    # called; and that of the CPU computes in bfloat16 no faster than in float32, unlike products.
    explicit = tokens < _SHORT or (
        tokens <= _SQUARE and q.device.type == "cpu" and q.dtype == torch.bfloat16
    )
    if dropout or not explicit:
        h: Tensor = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)
        return h
    scale = q.shape[-1] ** -0.5
    if tokens < q.shape[-1]:  # scaled where there are fewer numbers
        scores = (q @ k.transpose(-1, -2)).mul(scale)
    else:
        scores = (q * scale) @ k.transpose(-1, -2)
    weights = scores.softmax(dim=-1).to(v.dtype)
    return torch.matmul(weights, v).transpose(1, 2)


def _attend_fused(qkv: Tensor) -> Tensor:
    """`attend` as products and sums, which the compiler fuses into one pass over qkv.

    Products of matrices as small as a span of few tokens would cost more in calls than in work.
    """
    q, k, v = qkv.to(torch.float32).unbind(dim=2)
    scores = (q[:, :, None] * k[:, None]).sum(dim=-1) * q.shape[-1] ** -0.5  # [N, n, n, heads]
    weights = scores.softmax(dim=2)
    mixed: Tensor = (weights[..., None] * v[:, None]).sum(dim=2)
    return mixed.to(qkv.dtype)


class Mlp(nn.Module):
    """Two layers with a GELU (its tanh form) between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.fc2(gelu(self.fc1(x)))
        return output


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # (1 + tanh u) / 2 = sigmoid 2u, which is one exponential: half the time on a CPU.
    h = x.to(torch.float32)
    u = math.sqrt(2 / math.pi) * (h + 0.044715 * h.pow(3))
    return (h * torch.sigmoid(2 * u)).to(x.dtype)


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(h) (1 + scale) + shift, with shift and scale [B, 1, D] and a norm without parameters."""
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=1e-6), scale + 1)


class ViTBlock(nn.Module):
    """Attention and an MLP with exact GELU, each behind an affine norm.

    Args:
        width, heads, mlp_ratio: D, heads of the attention, hidden layer of the MLP / D.
        attn_dropout: see `Attention`.
        dropout: after the attention, the GELU and the MLP.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        *,
        attn_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, attn_dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = ExactMlp(width, int(width * mlp_ratio), dropout)
        self.dropout = Dropout(dropout)

    def forward(self, h: Tensor, rows: Tensor | None = None) -> Tensor:
        """h [B, T, D] to the same.

        Args:
            rows: give the tokens of these numbers only, int64 [B, n]: [B, n, D]. The others are
                still seen by them, but take no part in anything else.
        """
        x = self.norm1(h)
        if rows is None:
            seen = self.attn(x, h.shape[1])
        else:
            h, seen = tokens_at(h, rows), self.attn.at(x, rows)
        h = h + self.dropout(seen)
        output: Tensor = h + self.mlp(self.norm2(h))
        return output


class ExactMlp(nn.Module):
    """Two layers with an exact GELU between; dropout after both."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))
        return output


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated before and gated after by the conditioning vector."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, h: Tensor, c: Tensor, span: int) -> Tensor:
        """h [B, T, D] and c [B, D] to h; attention is confined to spans of so many tokens."""
        s1, k1, g1, s2, k2, g2 = self.adaLN_modulation(c)[:, None].to(h.dtype).chunk(6, dim=-1)
        h = torch.addcmul(h, g1, self.attn(modulate(h, s1, k1), span))
        return torch.addcmul(h, g2, self.mlp(modulate(h, s2, k2)))


class FinalLayer(nn.Module):
    """Tokens [B, T, D] to outputs [B, T, out], modulated by the conditioning vector."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].to(h.dtype).chunk(2, dim=-1)
        output: Tensor = self.linear(modulate(h, shift, scale))
        return output
